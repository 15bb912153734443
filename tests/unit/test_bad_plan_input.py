"""Clusters, tables and profiles with anything in them: a plan of finite numbers, or one line that refuses."""

import json
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from evenkeel.config import ConfigError, load_config
from evenkeel.plan.hardware import Cluster
from evenkeel.plan.parallel import Limits
from evenkeel.plan.workload import LayerWork, Profile, Workload
from evenkeel.store.errors import StoreError
from evenkeel.store.profiles import from_json
from evenkeel.tools.clusters import read_cluster
from evenkeel.tools.devices import published
from evenkeel.tools.plan_text import record
from evenkeel.tools.planning import UNSAID, Asked, Other, _answer

WORK = Workload(
    tuple(LayerWork(f"layer{i}", 1e9, 2e9, 10**6, 10**6, 10**6, 10**6, 10**5, 10**5) for i in range(3)), "fp32", 256, 8
)
CONFIG = load_config([], values={**UNSAID, "train": {"steps": 1, "global_batch": 8}})
KIND = "NVIDIA H100 80GB HBM3"
MOST_DEVICES = 64
"""To plan for: what a large cluster takes is another question."""

# Numbers near the ends of what a float holds are what arithmetic breaks on; a plain text or list is of the wrong type.
NUMBERS = st.one_of(
    st.floats(),
    st.sampled_from([0, -1, 1, 5e-324, 1e-300, 1e-30, 1e30, 1e300, 2**63, 10**400]),
    st.integers(-(10**20), 10**20),
)
ANYTHING = NUMBERS | st.text(max_size=20) | st.sampled_from([None, True, [], {}, [[1]], {"a": 1}, "1e5", "x" * 5000])

TABLE = {
    "memory_gib": 80,
    "memory_gb_per_s": 3350,
    "teraflops": {"fp32": 67},
    "inside": {"gb_per_s": 450, "latency_us": 4},
    "between": {"gb_per_s": 50, "latency_us": 14},
    "aliases": ["Own"],
    "devices_per_node": 8,
    "reached": 0.4,
}
PROFILE = {
    "format": 1,
    "key": {"model": "m", "precision": "fp32", "micro_batch": 2, "layers": ["a", "b", "c"], "fingerprint": "0"},
    "devices": [{"kind": KIND, "memory": 0}],
    "times": [{"kind": KIND, "tensor": 1, "forward_s": [0.001] * 3, "backward_s": [0.002] * 3}],
    "links": [{"kinds": [KIND, KIND], "where": "inside", "bytes_per_s": 1e10, "latency_s": 1e-6}],
    "kept_bytes": [1000] * 3,
    "output_bytes": [10, 10, 0],
    "time": 1.0,
    "seconds": 1.0,
    "versions": {},
}


def places(values: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place within nested mappings and lists."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [place for key, value in inner for place in ((*at, key), *places(value, (*at, key)))]


def with_value(values: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy in which this stands there."""
    copy = json.loads(json.dumps(values))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


def check(cluster: Cluster, profile: Profile | None = None) -> None:
    if cluster.devices > MOST_DEVICES:
        return
    told = record(_answer(Asked(CONFIG, cluster, WORK, Limits(), profile), Other.UNIFORM))
    assert isfinite(told["plan"]["step_s"]) and told["plan"]["step_s"] > 0
    json.dumps(told, allow_nan=False)


def check_refusal(error: Exception) -> None:
    text = str(error)
    assert text and "\n" not in text and len(text) < 1500


@given(place=st.sampled_from(places(TABLE)), value=ANYTHING)
@example(place=("memory_gib",), value=1e300)
@example(place=("memory_gb_per_s",), value=5e-324)
@example(place=("reached",), value=5e-324)
@example(place=("inside", "latency_us"), value=1e308)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_table_of_ones_own(tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    path = tmp_path / "own.yaml"
    nodes = [{"kind": "Mine", "count": 1, "devices": 2}]
    path.write_text(json.dumps({"devices": {"Mine": with_value(TABLE, place, value)}, "nodes": nodes}))
    try:
        check(read_cluster(str(path), published()))
    except ConfigError as error:
        check_refusal(error)


@given(place=st.sampled_from(places([{"kind": "H100", "count": 2, "devices": 4}])), value=ANYTHING)
@example(place=(0, "count"), value=10_000_000)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_clusters_file(tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps({"nodes": with_value([{"kind": "H100", "count": 2, "devices": 4}], place, value)}))
    try:
        check(read_cluster(str(path), published()))
    except ConfigError as error:
        check_refusal(error)


PARTS = ["8", "2x4x", "x", "H100", "T4", "A100", "+", " ", "-", "0", "1e5", ".", "×", "٣", "²", "\n", "\0", "/", "~"]


@given(st.lists(st.sampled_from(PARTS), max_size=6).map("".join) | st.text(max_size=30))
@example("8xH100+")
@example("1" * 5000 + "xH100")
@example("8x" + "H" * 5000)
@settings(deadline=None)
def test_a_cluster_in_short(text: str) -> None:
    try:
        check(read_cluster(text, published()))
    except ConfigError as error:
        check_refusal(error)


@given(place=st.sampled_from(places(PROFILE)), value=ANYTHING)
@example(place=("links", 0, "bytes_per_s"), value=5e-324)
@example(place=("times", 0, "tensor"), value=65536)
@settings(deadline=None)
def test_a_profile(place: tuple[Any, ...], value: Any) -> None:
    try:
        check(read_cluster("8xH100", published()), from_json(with_value(PROFILE, place, value), "profile.json").profile)
    except (ConfigError, StoreError) as error:
        check_refusal(error)


@pytest.mark.parametrize("seconds", [0.0, 5e-324, 1e-300])
def test_a_profile_of_zeros_is_none(seconds: float) -> None:
    values = json.loads(json.dumps(PROFILE))
    values["times"][0] |= {"forward_s": [seconds] * 3, "backward_s": [seconds] * 3}
    with pytest.raises(StoreError, match=r"profile\.json: damaged: .* at TP 1 takes no time"):
        from_json(values, "profile.json")


def test_layers_that_take_nothing_are_no_mistake() -> None:
    values = with_value(PROFILE, ("times", 0, "forward_s"), [0.0] * 3)
    values = with_value(values, ("times", 0, "backward_s"), [0.0, 0.0, 1.0])
    check(read_cluster("8xH100", published()), from_json(values, "profile.json").profile)
