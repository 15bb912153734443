"""`evenkeel plan`, as a user's shell sees it. Here and not in tests/unit, as counting a model needs torch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from evenkeel.cli import app
from evenkeel.config import ConfigError
from evenkeel.plan.cost import StageMemory
from evenkeel.plan.plans import PipelinePlan, Plan, StagePlan
from evenkeel.plan.workload import LayerTime
from evenkeel.store.errors import StoreError
from evenkeel.store.run_directory import RunDirectory
from evenkeel.tools.devices import published
from evenkeel.tools.plan_text import seconds, why_longer

ROOT = Path(__file__).parents[2]
SMALL = ("--config", str(ROOT / "conf/local.yaml"), "parallel.tensor=null")
"""A decoder of 3.1 million parameters, float32."""


def evenkeel(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "COLUMNS": "80"}
    command = [sys.executable, "-m", "evenkeel.cli", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def planned(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["plan", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as raised:
        CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------- what it prints


def test_the_layout_is_drawn_and_explained() -> None:
    done = evenkeel("2xH100+2xT4", *SMALL, "train.global_batch=64", "--compare", "uniform")
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout
    what = "decoder: 3,082,496 parameters in 6 layers, fp32; a step is 32 micro-batches of 256 tokens"
    assert " ".join(text.split()).startswith(what)
    assert "on 4 devices: 1 x 2 H100, 1 x 2 T4" in text
    assert "│ H100" in text and "│ layers 0-5" in text
    for part in ("a step takes", "tokens/s", "Why\n  - a step takes", "Memory of each device", "Other TP degrees"):
        assert part in text
    assert re.search(r"^ +planned +uniform\nstep ", text, re.MULTILINE)
    assert text.endswith(("planned and uniform are equally fast\n", "times as fast as uniform\n"))
    drawn = [line for line in text.splitlines() if line.startswith(("╭", "│", "╰"))]
    assert max(map(cell_len, drawn)) <= 80


def test_the_unequal_cluster_of_the_documentation() -> None:
    found = planned(str(ROOT / "conf/cluster.yaml"), *SMALL, "parallel.tensor=1", "--compare", "uniform")
    assert [(node["device"], node["devices"], node["nodes"]) for node in found["cluster"]] == [
        ("NVIDIA H100 80GB HBM3", 8, 4),
        ("A100-old", 8, 4),
        ("NVIDIA L40S", 4, 4),
    ]
    assert found["plan"]["step_s"] <= found["uniform"]["step_s"]
    assert found["others"] == {}


def test_json_adds_up() -> None:
    found = planned("8xH100+16xA100", *SMALL, "train.global_batch=96")
    plan = found["plan"]
    assert sum(p["count"] * p["share"] for p in plan["pipelines"]) == found["micro_batches"] == 48
    used = plan["tensor"] * sum(p["count"] * len(p["stages"]) for p in plan["pipelines"])
    assert used + sum(idle["devices"] for idle in plan["idle"]) == 24
    for pipeline in plan["pipelines"]:
        cuts = [stage["layers"] for stage in pipeline["stages"]]
        assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])]
        assert cuts[-1][1] == found["layers"] == 6
    assert plan["tokens_per_s"] == pytest.approx(48 * found["tokens"] / plan["step_s"])
    assert plan["bound_s"] <= plan["step_s"] <= min(o["step_s"] for o in found["others"].values())


def test_a_tp_degree_that_is_asked_for_is_kept_to() -> None:
    found = planned("8xH100", *SMALL, "parallel.tensor=2")
    assert (found["plan"]["tensor"], found["others"]) == (2, {})


def test_own_devices_change_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("devices: {H100: {reached: 0.04, memory_gb_per_s: 335}}")
    slow = planned("1xH100", *SMALL, "--devices", str(path))
    fast = planned("1xH100", *SMALL)
    assert slow["plan"]["step_s"] == pytest.approx(10 * fast["plan"]["step_s"])


DIGITS = """
import torch
from evenkeel.data.dataset import Data, TensorDataset
def load(config):
    return Data(TensorDataset(torch.zeros(8, 64), torch.zeros(8, dtype=torch.int64)))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a dataset of the user's."""
    (tmp_path / "own_digits.py").write_text(DIGITS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("own")
def test_a_model_of_ones_own() -> None:
    found = planned("2xL4", "model.name=own_model:build", "model.widths=[256,256]", "data.name=own_digits:load")
    assert (found["model"], found["layers"], found["parameters"]) == ("own_model:build", 3, 85_002)


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0xH100", *SMALL), "cluster: '0xH100': expected 1 to 10,000,000 devices"),
        (("8xH10O", *SMALL), "cluster: unknown device 'H10O'; the nearest that is known: H100;"),
        (
            ("8xT4", *SMALL, "train.precision=bf16"),
            "device 'Tesla T4' has no flops for train.precision bf16; it has: fp32",
        ),
        (("8xH100", *SMALL, "parallel.tensor=3"), "TP degree 3 is not possible: it must divide 2"),
        (("8xH100", *SMALL, "model.layer=3"), "model.layer: unknown key; nearest valid key: model.layers"),
        (("8xH100", *SMALL, "--address", "127.0.0.1:1"), "--address: is for the cluster 'live', not for '8xH100'"),
        (("live", *SMALL, "--address", "127.0.0.1:1"), "cluster: no cluster answers at '127.0.0.1:1'"),
        (("nowhere.yaml", *SMALL), "nowhere.yaml: cannot be read: No such file or directory"),
        (("8xH100", "--config", "nowhere.yaml"), "nowhere.yaml: cannot be read: No such file or directory"),
        (("8xH100", *SMALL, "data.path=/nowhere"), "data.path: there is no file or directory /nowhere"),
        (("8xH100", *SMALL, "model.name=nowhere:build"), "model.name: cannot import 'nowhere'"),
    ],
)
def test_bad_input_is_named(arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(*arguments)


def test_bad_input_is_one_line_and_2() -> None:
    done = evenkeel("-8xH100", *SMALL)
    assert done.returncode == 2
    done = evenkeel("8xH100+", *SMALL)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("evenkeel: cluster: '' is not understood")


def test_a_negative_speed_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("devices: {H100: {teraflops: {fp32: -1}}}")
    assert (
        refused("8xH100", *SMALL, "--devices", str(path))
        == f"{path}: devices.H100.teraflops.fp32: is -1; must be above 0"
    )


def test_a_model_that_fits_nowhere_says_what_is_missing_and_what_would_do() -> None:
    large = ("model.d_model=8192", "model.layers=80", "model.heads=64", "model.kv_heads=8", "parallel.tensor=2")
    told = refused("2xT4", *SMALL, *large)
    assert told.startswith("the model does not fit")
    assert re.search(r"lacks? [\d,]+ bytes", told)
    assert re.search(r"it would fit on \d+ nodes of 2 Tesla T4", told)


def test_where_only_the_micro_batch_is_too_large_one_that_fits_is_named() -> None:
    told = refused("1xT4", *SMALL, "train.micro_batch=4096", "train.global_batch=4096")
    (size,) = re.findall(r"it would fit here with train\.micro_batch=(\d+)$", told)
    assert planned("1xT4", *SMALL, f"train.micro_batch={size}", "train.global_batch=4096")["plan"]["step_s"] > 0
    assert "does not fit" in refused("1xT4", *SMALL, f"train.micro_batch={2 * int(size)}", "train.global_batch=4096")


def test_a_layer_that_cannot_be_counted_is_named(own: Path) -> None:
    (own / "looking.py").write_text(LOOKS)
    told = refused("2xL4", "model.name=looking:build", "data.name=own_digits:load")
    assert "model.name: 'looking:build' raised ValueError: layer 'looks' cannot be counted without values" in told


LOOKS = """
from torch import nn
from evenkeel.engine.model import LayerSpec, Model
class Looks(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
    def forward(self, x):
        return self.linear(x) * (1 if x.sum().item() else 2)
def build(config):
    return Model(layers=(LayerSpec("looks", Looks),))
"""


# ---------------------------------------------------------------- small parts


def a_plan(busy_s: float, compute_s: float, sum_s: float, tensor: int = 1) -> Plan:
    node = published().find("H100", "", "").node(8)
    stage = StagePlan(node, (0, 6), LayerTime(busy_s / 3, 2 * busy_s / 3), StageMemory(1, 1, 1, 1))
    pipeline = PipelinePlan(1, 1, (stage,), compute_s, 0.5)
    step_s = compute_s + 0.5 + sum_s
    return Plan(tensor, (pipeline,), 1, sum_s, step_s, step_s, 1.0, ())


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (a_plan(5, 6, 1), "2 s more in the slowest stage"),
        (a_plan(3, 9, 1), "5 s more to fill and drain the pipeline"),
        (a_plan(3, 4, 1.5), "500 ms more to sum gradients"),
        (a_plan(3, 4, 1), "no part of the step is longer"),
    ],
)
def test_why_another_degree_loses(other: Plan, why: str) -> None:
    assert why_longer(other, a_plan(3, 4, 1)) == why


def test_seconds_in_a_unit_that_suits() -> None:
    assert [seconds(t) for t in (0, 3.2e-5, 0.0123, 1.5, 612.34, 12345.6)] == [
        "0 s",
        "32 µs",
        "12.3 ms",
        "1.5 s",
        "612 s",
        "12,346 s",
    ]


# ---------------------------------------------------------------- what was measured


def a_profile(run: Path, *, keys: dict[str, Any]) -> None:
    """As `evenkeel profile` leaves it: an H100; each layer takes 2 ms forward and 4 ms backward, and keeps 1 MB."""
    from evenkeel.config import load_config
    from evenkeel.engine.model import model_shape
    from evenkeel.models.registry import load_model
    from evenkeel.runtime.profiled import key_of
    from evenkeel.store.profiles import DeviceRecord, ProfileRecord, TimesRecord

    config = load_config([ROOT / "conf/local.yaml"], ["run.name=measured"], keys)
    shape = model_shape(load_model(config.model.name, config.model.options))
    name, depth = published().find("H100", "", "").name, shape.depth
    times = TimesRecord(name, 1, (0.002,) * depth, (0.004,) * depth)
    kept, handed_on = (10**6,) * depth, (0,) * depth
    record = ProfileRecord(key_of(config, shape), (DeviceRecord(name, 0),), (times,), (), kept, handed_on, 1.0, 1.0)
    directory = RunDirectory.at(str(run))
    directory.write_profile(record)
    directory.close()


def test_what_was_measured_is_believed(tmp_path: Path) -> None:
    a_profile(tmp_path, keys={})
    found = planned("1xH100", *SMALL, "--profile", str(tmp_path))
    (pipeline,) = found["plan"]["pipelines"]
    (stage,) = pipeline["stages"]
    assert (stage["forward_s"], stage["backward_s"]) == (pytest.approx(6 * 0.002), pytest.approx(6 * 0.004))
    assert pipeline["compute_s"] == pytest.approx(8 * 6 * 0.006)
    assert stage["memory"]["activations"] == 6 * 10**6


def test_what_was_measured_of_another_model_is_refused(tmp_path: Path) -> None:
    a_profile(tmp_path, keys={"model": {"d_ff": 128}})
    told = refused("1xH100", *SMALL, "--profile", str(tmp_path))
    why = "the model, or what it is given, has changed since"
    assert told == f"{tmp_path}/profile.json: does not fit this configuration: {why}"


def test_what_was_measured_of_other_devices_is_refused(tmp_path: Path) -> None:
    a_profile(tmp_path, keys={})
    told = refused("1xT4", *SMALL, "--profile", str(tmp_path))
    assert told == f"{tmp_path}/profile.json: is of NVIDIA H100 80GB HBM3, of which the cluster has none"


def test_a_run_without_a_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"profile.json: is not there; measure with: evenkeel profile"):
        CliRunner().invoke(app, ["plan", "1xH100", *SMALL, "--profile", str(tmp_path)], catch_exceptions=False)
