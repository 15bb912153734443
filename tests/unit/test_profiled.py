"""What a profile says before anything is measured in training, and what a run makes of the one in its directory."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenkeel.config import Config, load_config
from evenkeel.control.policy import Policy
from evenkeel.core.codec import dump, load
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.plan.layout import Planned, Wish, plan_layout
from evenkeel.plan.speeds import Speeds
from evenkeel.plan.workload import LayerTime, Profile
from evenkeel.runtime.profiled import key_of, lacking, profiled
from evenkeel.store.profiles import DeviceRecord, ProfileRecord, TimesRecord
from evenkeel.store.run_directory import RunDirectory

MICROS = 30


def model(layers: int) -> ModelShape:
    shapes = tuple(LayerShape(f"block{i}", (ParamShape(f"block{i}", (4, 4), 0),)) for i in range(layers))
    return ModelShape(shapes, tensor_divides=4)


def profile(**seconds: list[float]) -> Profile:
    """Seconds of each layer by kind of device, a third of them forward."""
    times = {(kind, 1): tuple(LayerTime(s / 3, 2 * s / 3) for s in layers) for kind, layers in seconds.items()}
    return Profile(times)


def workers(*kinds: str) -> list[WorkerInfo]:
    return [WorkerInfo(WorkerId(f"w{i}"), NodeId("a"), i, kind=kind) for i, kind in enumerate(kinds)]


def first_layout(speeds: Speeds | None, infos: list[WorkerInfo], data: int, pipeline: int, layers: int) -> Layout:
    wish = Wish(data, pipeline, 1, len(infos), len(infos))
    planned = plan_layout(infos, wish, model(layers), MICROS, None, speeds)
    assert isinstance(planned, Planned)
    return planned.layout


def test_the_first_shares_are_by_the_profile() -> None:
    speeds = Speeds.profiled(profile(fast=[0.1] * 4, slow=[0.4] * 4), 1)
    layout = first_layout(speeds, workers("slow", "fast"), 2, 1, 4)
    assert [p.share for p in layout.pipelines] == [6, 24]
    assert [p.share for p in first_layout(None, workers("slow", "fast"), 2, 1, 4).pipelines] == [15, 15]


def test_the_first_cuts_are_by_the_profile_also_where_all_devices_are_alike() -> None:
    """The last layer takes as long as the others together, of which the model's word says nothing."""
    speeds = Speeds.profiled(profile(cpu=[0.1, 0.1, 0.1, 0.3]), 1)
    stages = first_layout(speeds, workers("cpu", "cpu"), 1, 2, 4).pipelines[0].stages
    assert [(s.start, s.stop) for s in stages] == [(0, 3), (3, 4)]


@given(
    st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=4),
    st.lists(st.floats(0.0, 5.0), min_size=2, max_size=6).filter(lambda layers: sum(layers) > 1e-3),
)
def test_pace_times_cost_is_what_was_profiled_where_kinds_differ_by_a_factor(
    paces: list[float], layers: list[float]
) -> None:
    said = {f"kind{i}": [pace * seconds for seconds in layers] for i, pace in enumerate(paces)}
    speeds = Speeds.profiled(profile(**said), 1)
    assert speeds is not None and sum(speeds.costs) == pytest.approx(1)
    for kind, seconds in said.items():
        assert [speeds.kinds[kind] * cost for cost in speeds.costs] == pytest.approx(seconds)


def test_nothing_is_said_of_another_tp_degree_or_by_zeros() -> None:
    assert Speeds.profiled(profile(cpu=[0.1]), 2) is None
    assert Speeds.profiled(profile(cpu=[0.0, 0.0]), 1) is None
    speeds = Speeds.profiled(profile(cpu=[0.0, 0.0], gpu=[0.0, 0.2]), 1)
    assert speeds is not None and (speeds.costs, dict(speeds.kinds)) == ((0.0, 1.0), {"gpu": pytest.approx(0.2)})


def test_what_was_measured_comes_before_the_profile() -> None:
    infos = workers("A", "A", "B", "C")
    speeds = Speeds((1.0,), {infos[0].worker_id: 0.3}, kinds={"A": 0.1, "B": 0.2})
    assert dict(speeds.for_all(infos).paces) == pytest.approx({"w0": 0.3, "w1": 0.3, "w2": 0.6, "w3": 0.3})
    assert dict(replace(speeds, paces={}).for_all(infos).paces) == pytest.approx(
        {"w0": 0.1, "w1": 0.1, "w2": 0.2, "w3": 0.4 / 3}
    )
    assert set(Speeds((1.0,), kinds={"X": 9.0}).for_all(infos).paces.values()) == {1.0}


def test_a_policy_with_it_is_written_into_a_controllers_trace_and_read_back() -> None:
    speeds = Speeds.profiled(profile(cpu=[0.1, 0.3], gpu=[0.1, 0.1]), 1)
    policy = Policy(model(2), Wish(1, 1, 1, 1, 1), 1, 1, profiled=speeds, slowed=((1, 4.0),))
    assert load(json.loads(json.dumps(dump(policy, Policy))), Policy) == policy


# ---------------------------------------------------------------- in a run's directory


def config_of(folder: Path, **changes: Any) -> Config:
    run = {"name": "r", "storage_path": str(folder)}
    sections = {"run": run, "train": {"steps": 9}, "scaling": {"workers": [1, 4]}}
    return load_config([], values={**sections, **changes})


def kept(config: Config, *kinds: str, micro_batch: int | None = None) -> RunDirectory:
    """A profile of a model of two layers."""
    shape = model(2)
    directory = RunDirectory.of(config.run.storage_path, config.run.name)
    key = key_of(config, shape)
    record = ProfileRecord(
        replace(key, micro_batch=micro_batch or key.micro_batch),
        tuple(DeviceRecord(kind, 0) for kind in kinds),
        tuple(TimesRecord(kind, 1, (0.1, 0.1), (0.2, 0.2)) for kind in kinds),
        (),
        (1, 1),
        (1, 0),
        1.0,
        1.0,
    )
    directory.write_profile(record)
    return directory


def test_one_that_fits_is_used_and_said(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    found = profiled(config, model(2), kept(config, "cpu", "gpu"))
    assert found.speeds is not None and prod(found.speeds.costs) == pytest.approx(0.25)
    assert found.note == "it begins as it was profiled: a micro-batch takes cpu 0.6 s, gpu 0.6 s"


def test_none_changes_nothing_and_says_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    found = profiled(config, model(2), RunDirectory.of(str(tmp_path), "r"))
    assert (found.speeds, found.note) == (None, "")
    apart = config_of(tmp_path, parallel={"rebalance": False})
    found = profiled(apart, model(2), kept(apart, "cpu"))
    assert (found.speeds, found.note) == (None, "")


def test_of_another_one_a_line_tells_why_it_is_not_used(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    directory = kept(config, "cpu", micro_batch=7)
    where = f"profile not used: {directory.url}/profile.json: "
    found = profiled(config, model(2), directory)
    assert found.speeds is None
    assert found.note == f"{where}it is of micro-batch 7, not {config.train.micro_batch}"
    found = profiled(config, model(3), kept(config, "cpu"))
    assert found.speeds is None and found.note == f"{where}it is of another model, of 2 layers, not 3"
    tensor = config_of(tmp_path, parallel={"tensor": 2})
    found = profiled(tensor, model(2), directory)
    assert found.speeds is None and found.note == f"{where}it has no times at TP 2"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1}', "null"])
def test_a_damaged_one_is_not_used_and_a_line_says_so(tmp_path: Path, text: str) -> None:
    config = config_of(tmp_path)
    directory = kept(config, "cpu")
    (Path(directory.url) / "profile.json").write_text(text)
    found = profiled(config, model(2), directory)
    assert found.speeds is None and "\n" not in found.note
    assert found.note.startswith(f"profile not used: {directory.url}/profile.json: ")


def test_all_zeros_are_no_profile(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    directory = kept(config, "cpu")
    file = Path(directory.url) / "profile.json"
    values = json.loads(file.read_text())
    values["times"][0] |= {"forward_s": [0.0, 0.0], "backward_s": [0.0, 0.0]}
    file.write_text(json.dumps(values))
    assert "cpu at TP 1 takes no time" in profiled(config, model(2), directory).note


def test_what_a_configuration_lacks_in_a_profile(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    record = kept(config, "cpu", "cpu-slowed-4x").read_profile()
    assert record is not None and lacking(config, record) == ""
    slow = {"slowdown": {1: 4.0, 2: 6.4}}
    assert lacking(config_of(tmp_path, emulate=slow), record) == "it has no times of devices slowed 6.4 times"
    assert lacking(config_of(tmp_path, emulate={**slow, "from_step": 5}), record) == ""
    assert lacking(config_of(tmp_path, parallel={"tensor": 2}), record) == "it has no times for TP 2"
