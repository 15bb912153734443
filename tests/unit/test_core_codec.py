"""Every message goes to JSON and comes back equal; what does not fit is refused by type and field."""

import json
import math
from dataclasses import dataclass
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evenkeel.control import messages as m
from evenkeel.core.boxes import Box
from evenkeel.core.codec import CodecError, dump, load
from evenkeel.core.ids import NodeId, Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.model import Shard
from evenkeel.core.vote import Flags
from evenkeel.core.world import World

IDENTITY = WorkerInfo(WorkerId("w0001"), NodeId("n1"), 17)


def trip(value: Any, tp: Any) -> Any:
    return load(json.loads(json.dumps(dump(value, tp), allow_nan=False)), tp)


# Log's free fields come back as JSON has them, so they get a strategy of their own; a nan never equals itself.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
st.register_type_strategy(Flags, st.integers(0, 7).map(Flags))
st.register_type_strategy(float, st.floats(allow_nan=False))
logs = st.builds(m.Log, fields=st.dictionaries(st.text(max_size=5), json_values, max_size=3))


@pytest.mark.parametrize(
    ("union", "message"),
    [(union, tp) for union in (m.Event, m.Command, m.Entry) for tp in get_args(union)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_message_comes_back_equal(union: Any, message: Any) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(logs if message is m.Log else st.from_type(message))
    def check(value: Any) -> None:
        assert trip(value, union) == value

    check()


@given(st.floats())
def test_floats_keep_every_bit(value: float) -> None:
    again = trip(value, float)
    if math.isnan(value):
        assert math.isnan(again)
    else:
        assert (again, math.copysign(1, again)) == (value, math.copysign(1, value))


def test_a_tag_stands_only_where_there_is_a_choice() -> None:
    assert dump(m.WorkerReady(IDENTITY), m.Event)["type"] == "WorkerReady"
    assert "type" not in dump(IDENTITY, WorkerInfo)
    held = dump(m.Held(Shard(0, 1, 0, 1), Version(3, 2)), m.Held)
    assert held["version"] == {"step": 3, "generation": 2}


@dataclass(frozen=True)
class Pair:
    both: tuple[int, str]
    either: int | None


def test_fixed_tuples_and_options() -> None:
    assert trip(Pair((1, "a"), None), Pair) == Pair((1, "a"), None)
    assert trip(Pair((1, "a"), 4), Pair) == Pair((1, "a"), 4)


@pytest.mark.parametrize(
    ("data", "tp", "says"),
    [
        ({"type": "Nonsense"}, m.Event, "type 'Nonsense' is not one of Started, WorkerReady"),
        ({}, m.Event, "type None is not one of"),
        ({"type": "StopRequested", "reason": 7}, m.Event, "StopRequested.reason: str expected, not 7"),
        ({"type": "StopRequested"}, m.Event, "StopRequested: field 'reason' of StopRequested is missing"),
        ({"type": "Tick", "x": 1}, m.Event, "Tick: Tick has no field 'x'"),
        ({"type": "EpochBegun", "epoch": True}, m.Entry, "EpochBegun.epoch: int expected, not True"),
        ({"both": [1], "either": None}, Pair, "Pair.both: 2 items expected, not 1"),
        ({"start": [3], "stop": [1]}, Box, "Box: not a box"),
        ({"step": 1.5, "generation": 0}, Version, "Version.step: int expected, not 1.5"),
        ("x", float, "a float expected, not 'x'"),
        (10**400, float, "a float expected, not 1000"),
        ({"type": ["x" * 9000]}, m.Event, "type ['xxx"),
        ({"x" * 9000: 1}, Version, "Version has no field 'xxx"),
        ({"step": [[0] * 9000] * 9000, "generation": 0}, Version, "step: int expected, not [[0, 0, 0, 0, 0, 0, ...]"),
        (99, m.Started, "Started expected, not 99"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(data: Any, tp: Any, says: str) -> None:
    with pytest.raises(CodecError) as caught:
        load(data, tp)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_dump_refuses_too() -> None:
    with pytest.raises(CodecError, match=r"EpochBegun\.epoch: int expected, not '1'"):
        dump(m.EpochBegun("1"), m.Entry)  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="a value that JSON has expected"):
        dump(m.Log("e", 1, 1, {"bad": {1, 2}}), m.Command)
    with pytest.raises(CodecError, match="World"):
        dump(IDENTITY, World)


def test_what_was_written_before_a_field_was_there_has_its_default() -> None:
    """Journals outlive versions of the program: World.measure_every, for one, is younger than the first of them."""
    written = dump(m.Answered(WorkerId("w1"), 2, 1, m.Answer(m.Position())), m.Event)
    del written["answer"]["diverged"]
    assert load(written, m.Event) == m.Answered(WorkerId("w1"), 2, 1, m.Answer(m.Position()))
    del written["answer"]["position"]
    with pytest.raises(CodecError, match="field 'position' of Answer is missing"):
        load(written, m.Event)
