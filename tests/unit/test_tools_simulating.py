"""`evenkeel simulate`, as a user's shell sees it, and what it makes of its options."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from math import inf, nan, prod
from pathlib import Path
from typing import Any

import pytest

from evenkeel.config_values import ConfigError
from evenkeel.sim.goodput.costs import Costs
from evenkeel.sim.goodput.outages import Drawn, read_trace
from evenkeel.sim.goodput.setting import CAUSES, Outcome, Setting
from evenkeel.sim.goodput.study import Point
from evenkeel.tools import goodput_plot, goodput_text, simulating, virtual_run
from evenkeel.tools.goodput_text import Result
from evenkeel.tools.virtual_run import Nodes

ROOT = Path(__file__).parents[2]
TRACE = ROOT / "jobs" / "bench" / "traces" / "bamboo-p3.csv"
SMALL = ("4x2", "--params", "1e8", "--layers", "8", "--step-seconds", "10", "--tokens", "1e6", "--days", "1")
COSTS = ("--cost", "regroup_s=20", "--cost", "start_s=60", "--cost", "save_stall_s=1")


def simulate(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "COLUMNS": "140"}
    command = [sys.executable, "-m", "evenkeel.cli", "simulate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_sweep_as_json_with_a_plot(tmp_path: Path) -> None:
    picture = tmp_path / "spares.png"
    options = ("--failures-per-node-day", "2", "--spares", "0,2", "--seeds", "2", "--price", "3")
    done = simulate(*SMALL, *COSTS, *options, "--plot", str(picture), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["setting"]["workers"] == 8
    assert found["setting"]["costs"]["regroup_s"] == 20
    assert found["setting"]["failures"] == {"per_node_day": 2.0, "repair_hours": 24.0, "rack": 1, "rack_share": 0.0}
    assert found["varied"] == ["spares"]
    none, two = found["points"]
    assert (none["varied"], two["varied"]) == ({"spares": 0}, {"spares": 2})
    for point in (none, two):
        assert list(point["seconds"]) == list(CAUSES)
        assert sum(point["seconds"].values()) == pytest.approx(86400)
        assert point["goodput"]["mean"] == pytest.approx(point["seconds"]["productive"] / 86400)
        assert point["goodput"]["low"] < point["goodput"]["mean"] < point["goodput"]["high"]
        assert point["incidents"] > 0
        assert point["cost"] == pytest.approx(3 * point["device_hours"])
        assert point["cost_per_token"]["mean"] == pytest.approx(point["cost"] / point["tokens"], rel=0.05)
    assert two["goodput"]["mean"] > none["goodput"]["mean"]
    assert none["device_hours"] < 24 * 8 < two["device_hours"] + 24 * 4
    assert found["answers"][-1].startswith("Cheapest: spares ")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_setting_in_words() -> None:
    done = simulate(*SMALL, "--failures-per-node-day", "0", "--seeds", "1", "--interval", "none")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "8 workers (data x pipeline x tensor = 4 x 1 x 2), steps of 10 s, 24 h, 1 seed"
    assert lines[1] == "goodput 100.00 %"
    assert lines[3].split("  ")[0] == "where time went"
    assert [line.split()[0] for line in lines[4:12]] == list(CAUSES)
    assert "incidents  0.0; never went back" in lines
    assert "steps      8,640, 8.64e+09 tokens" in lines
    assert " events in " in lines[-1]


def test_bad_input_is_one_line_and_2(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("0,add,a\n9,remove,b\n")
    done = simulate(*SMALL, "--trace", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"evenkeel: command line: --trace: {path}:2: removes b, which is not there\n"


ASKED: dict[str, Any] = {"cluster": "4x2", "params": 1e8, "layers": 8, "step_seconds": 10.0, "tokens": 1e6, "days": 1.0}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"cluster": None}, "CLUSTER: is missing; expected nodes at full strength x devices of each"),
        ({"cluster": "4by2"}, "cluster: '4by2' is not understood; expected \"8xH100\""),
        ({"cluster": "0x8"}, "CLUSTER: '0x8' has no devices; expected nodes at full strength x devices of each"),
        ({"cluster": "8x8xGTX9"}, "cluster: "),
        ({"cluster": "8xH100+4xA100"}, "CLUSTER: '8xH100+4xA100' has nodes of 4 and 8 devices; simulated are nodes"),
        ({"cluster": "1x8xH100+1x8xA100", "trace": TRACE}, "--trace: does not say which kind a node is of"),
        ({"layers": None}, "--params: and --layers say what is trained"),
        ({"layers": 0}, "--layers: is 0; a model has at least 1"),
        ({"params": -1.0}, "--params: is -1; expected a number of parameters"),
        ({"params": nan}, "--params: is nan; expected a number of parameters"),
        ({"config": [Path("x.yaml")]}, "--params: says what --config says too"),
        ({"params": None, "layers": None, "config": [Path("/nowhere/x.yaml")]}, "/nowhere/x.yaml: cannot be read"),
        ({"step_seconds": None}, "--step-seconds: is missing"),
        ({"step_seconds": -2.0}, "step_s is -2.0; it must be above 0"),
        ({"tokens": None}, "--tokens: is missing"),
        ({"tokens": 0.0}, "tokens_per_step is 0.0; it must be above 0"),
        ({"days": -1.0}, "--days: is -1; it must be above 0"),
        ({"days": inf}, "--days: is inf; it must be above 0"),
        ({"pipeline": 3}, "CLUSTER: 4 nodes of 2 devices are 8 workers, but 1 pipelines of 3 stages with TP 2 are 6"),
        ({"pipeline": 4, "layers": 3}, "--pipeline: is 4, but the model has only 3 layers"),
        ({"tensor": 4}, "tensor is 4, but a node has 2 devices"),
        ({"micro_batches": 3}, "--micro-batches: is 3, for 4 pipelines"),
        ({"min_nodes": 5}, "min_workers is 10, but full strength is 8 workers"),
        ({"rate": -1.0}, "failures: -1.0 failures per node-day"),
        ({"repair_hours": 0.0}, "failures: a repair takes 0.0 s"),
        ({"rack": 4, "rack_share": 2.0}, "failures: a share of 2.0"),
        ({"trace": Path("/nowhere.csv")}, "--trace: /nowhere.csv: cannot be read: No such file or directory"),
        ({"given": ["regroup=3"]}, "--cost: 'regroup=3': unknown key 'regroup'; nearest valid key: regroup_s"),
        ({"given": ["regroup_s=soon"]}, "--cost: 'regroup_s=soon': 'soon' is no number; expected regroup_s=SECONDS"),
        ({"given": ["regroup_s=-1"]}, "--cost: costs: regroup_s is -1.0; it must be 0 or more"),
        ({"price": -1.0}, "price_per_device_hour is -1.0; it must be 0 or more"),
        ({"spares": "0,many"}, "--spares: 'many' is no whole number; expected one, or several such as 0,2,4,8"),
        ({"spares": "0,-2"}, "--spares: '-2' is no whole number"),
        ({"spares": "1,2,1"}, "--spares: '1,2,1' names a value twice"),
        ({"copies": "0"}, "copies is 0; it must be at least 1"),
        ({"copies": "1,none"}, "--copies: 'none' is no whole number (or all)"),
        ({"interval": "often"}, "--interval: 'often' is no whole number (or none)"),
        ({"trace": TRACE, "seeds": 3}, "--seeds: is 3, but a trace is the same for every seed; leave it out"),
        (
            {"rate": 1e9, "repair_hours": 1e-6},
            "--failures-per-node-day: 1e+09 failures per node-day, repaired in 1e-06 h",
        ),
        ({"step_seconds": 1e-9}, "--days: 86400 s of steps of 1e-09 s are 8.64e+13 steps; no more than 1e+08 are"),
        ({"cluster": "9999999x9999"}, "CLUSTER: 9,999,999 nodes of 9,999 devices; no more than 100,000 nodes and"),
        ({"spares": "0,999999999"}, "--spares: 999,999,999 make 1,000,000,003 nodes; no more than 100,000 are"),
        ({"copies": "9" * 400}, "--copies: 999999999999... is more than can be simulated"),
        ({"layers": 10**9}, "--layers: is 1000000000; a model has at least 1, and no more than 10,000 are simulated"),
        ({"tokens": 1e300}, "--tokens: is 1e+300; expected those of a step"),
        ({"price": 1e300}, "--price: is 1e+300; expected that of a device for an hour"),
        ({"plot": Path("goodput.pdf")}, "--plot: 'goodput.pdf': expected a name that ends in .png or .svg"),
        ({"plot": Path("/nowhere/x.png")}, "--plot: /nowhere/x.png: there is no folder /nowhere"),
    ],
)
def test_what_is_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        simulating.simulate(**{**ASKED, **said})
    assert message in str(caught.value)


def test_processes_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for processes in (1, 2):
        simulating.simulate(**ASKED, rate=3.0, seeds=2, interval="0,100", processes=processes, as_json=True)
        told = json.loads(capsys.readouterr().out)
        for point in told["points"]:
            assert point.pop("cpu_s") > 0
            assert point.pop("events_per_s") > 0
        found.append(told)
    assert found[0] == found[1]
    assert len({tuple(point["goodput_by_seed"]) for point in found[0]["points"]}) == 2


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput_plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--plot: needs matplotlib, which is not installed"):
        goodput_plot.check(Path("x.png"))


# ---------------------------------------------------------------- what is made of the options


def test_a_configuration_says_what_is_trained() -> None:
    trained = virtual_run.of_config([ROOT / "conf" / "local.yaml"])
    size = sum(prod(p.shape) for layer in trained.shape.layers for p in layer.params)
    block = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704 + 2 * 256  # attention, feed-forward, norms
    assert size == 2 * 256 * 256 + 4 * block + 256
    degrees = (trained.data, trained.pipeline, trained.tensor, trained.micro_batches, trained.tokens)
    assert degrees == (2, 2, 1, 8, 16 * 128)
    assert virtual_run.cluster(None, trained) == Nodes(4, 1)
    assert trained.precision == "fp32"
    full = virtual_run.at_full_strength(trained, 4, 1)
    assert (full.data, full.pipeline, full.min_workers) == (2, 2, 1)


def test_a_model_by_its_size() -> None:
    trained = virtual_run.of_size(70e9, 80)
    size = sum(prod(p.shape) for layer in trained.shape.layers for p in layer.params)
    assert (len(trained.shape.layers), size) == (80, pytest.approx(70e9, rel=1e-6))
    nodes = virtual_run.cluster("2048x8xH100", trained)
    ((kind, count),) = nodes.kinds
    assert (nodes.count, nodes.devices, kind.name, count) == (2048, 8, "NVIDIA H100 80GB HBM3", 2048)
    step_s = virtual_run.step_seconds(replace(trained, tokens=16e6), nodes)
    assert step_s == pytest.approx(6 * 70e9 * 16e6 / (16384 * 989.4e12 * 0.4), rel=1e-6)
    assert virtual_run.cluster("2048x8", trained) == Nodes(2048, 8)
    full = virtual_run.at_full_strength(trained.with_said(8, None, None, 16e6), 2048, 8)
    assert (full.data, full.pipeline, full.tensor, full.micro_batches) == (256, 8, 8, 4096)
    assert full.min_workers == 64  # one pipeline


def test_nodes_of_two_kinds() -> None:
    """By what the tables say that training reaches of 989.4 and 312 TFLOP/s; spares are of the kind named first."""
    trained = virtual_run.of_size(1e9, 8).with_said(2, 8, 32, 1e6)
    nodes = virtual_run.cluster("2x8xH100+2x8xA100", trained)
    values = {"step_s": None, "duration_s": 86400.0, "min_nodes": None, "per_node": True, "price": 0.0}
    base = virtual_run.base(trained, nodes, Drawn(0.1), Costs(), **values)
    fast, slow = nodes.kinds[0][0], nodes.kinds[1][0]
    reached = [kind.flops["bf16"] * kind.reached for kind in (fast, slow)]
    assert base.slower == {fast.name: 1.0, slow.name: pytest.approx(reached[0] / reached[1])}
    assert base.step_s == pytest.approx(6 * 1e9 * 1e6 / (16 * sum(reached)), rel=1e-6)
    assert list(base.kinds.values()) == [fast.name] * 2 + [slow.name] * 2
    axes = {"spares": (0, 1), "copies": (None,), "mirror_every": (0,), "interval": (0,)}
    (_, without), (_, with_one) = virtual_run.settings(base, axes)
    assert without.kinds == base.kinds
    assert with_one.kinds == {**base.kinds, "node00004": fast.name}
    assert with_one.policy.rebalance
    assert virtual_run.cluster("2x8xH100+2x8xH100", trained).slower("bf16") == {}


def test_unequal_nodes_are_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a failure all is at full pace but for the first steps, until their speeds are known."""
    said = {**ASKED, "cluster": "2x1xH100+2x1xA100", "tensor": 1, "micro_batches": 60, "rate": 0.0, "seeds": 1}
    simulating.simulate(**said, processes=1, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert set(told["setting"]["slower"].values()) > {1.0}
    (point,) = told["points"]
    assert 0 < point["seconds"]["degraded"] < 300
    assert point["goodput"]["mean"] > 0.99


def setting(**changed: Any) -> Setting:
    trained = virtual_run.of_size(1e8, 8).with_said(2, 2, 16, 1e6)
    values = {"step_s": 10.0, "duration_s": 86400.0, "min_nodes": None, "per_node": True, "price": 0.0}
    return virtual_run.base(trained, Nodes(4, 2), Drawn(0.1), Costs(), **{**values, **changed})


def test_all_combinations_of_what_is_tried() -> None:
    axes = {"spares": (0, 2), "copies": (None,), "mirror_every": (0,), "interval": (0, 50, None)}
    found = virtual_run.settings(setting(), axes)
    assert [varied for varied, _ in found] == [{"spares": s, "interval": i} for s in (0, 2) for i in (0, 50, None)]
    assert [len(made.nodes) for _, made in found] == [4, 4, 4, 6, 6, 6]
    assert found[5][1].nodes[:4] == found[0][1].nodes  # so that these meet the same failures
    assert [(made.spares, made.checkpoint_every) for _, made in found[3:]] == [(2, 0), (2, 50), (2, None)]


def test_a_trace_has_nodes_of_its_own() -> None:
    trace = read_trace(TRACE)
    trained = virtual_run.of_size(1e8, 8).with_said(2, 1, 64, 1e6)
    base = virtual_run.base(
        trained, Nodes(32, 1), trace, Costs(), step_s=1.0, duration_s=virtual_run.duration(None, trace), min_nodes=2,
        per_node=True, price=0.0,
    )  # fmt: skip
    assert (len(base.nodes), base.workers, base.duration_s, base.min_workers) == (18, 32, 40920.0, 2)
    axes = {"spares": (0, 4), "copies": (None,), "mirror_every": (0,), "interval": (0,)}
    assert [len(made.nodes) for _, made in virtual_run.settings(base, axes)] == [18, 18]


# ---------------------------------------------------------------- what it says


def result(axes: dict[str, dict[int | None, list[float]]], seeds: int = 3, price: float = 0.0) -> Result:
    """Points of one axis with the goodputs by seed."""
    ((axis, goodputs),) = axes.items()
    made = []
    for value, by_seed in goodputs.items():
        outcomes = tuple(_outcome(g, price * (1 + (value or 0))) for g in by_seed)
        made.append(Point({axis: value} if len(goodputs) > 1 else {}, outcomes))
    names = (axis,) if len(goodputs) > 1 else ()
    return Result(setting(), seeds, names, tuple(made), (0.5,) * len(made))


def _outcome(goodput: float, cost: float) -> Outcome:
    seconds = dict.fromkeys(CAUSES, 0.0) | {"productive": 86400 * goodput, "redo": 86400 * (1 - goodput)}
    restores = {"mirror": 0, "checkpoint": 2}
    return Outcome(86400.0, seconds, 10, 1e9 * goodput, 3.6e6, cost, 3, restores, 1000, 2000, ())


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (
            {"spares": {0: [0.8, 0.82, 0.81], 2: [0.9, 0.9, 0.9], 4: [0.9005, 0.9005, 0.9005]}},
            "Enough: spares 2, goodput 90.00 % (95 %: 90.00 to 90.00). More gain less than 0.1 points "
            "(4: +0.05 (0.05 to 0.05)).",
        ),
        (
            {"spares": {0: [0.8], 2: [0.9]}},
            "Not shown to be enough: spares 2, goodput 90.00 %, the most that was tried, gains +10.00 points over 0.",
        ),
        (
            {"copies": {1: [0.8], None: [0.9995]}},
            "Enough: copies all, goodput 99.95 %. More could not gain 0.1 points.",
        ),
        (
            {"interval": {0: [0.9, 0.9, 0.93], 50: [0.91, 0.89, 0.92], None: [0.5, 0.5, 0.53]}},
            "Best: checkpoint every optimum, goodput 91.00 % (95 %: 86.70 to 95.30) (others, in points: "
            "50: -0.33 (-3.20 to 2.54); none: -40.00 (-40.00 to -40.00)). Not worse for sure: 50.",
        ),
    ],
)
def test_the_answer(axes: dict[str, dict[int | None, list[float]]], expected: str) -> None:
    theory = ["By theory no more than 2 nodes are in repair at the same time, 99 % of the time."]
    assert goodput_text.answers(result(axes)) == [expected, *(theory if "spares" in axes else [])]


def test_seeds_that_do_not_tell() -> None:
    """The means say that 1 is enough; by their spread 2 may gain more, and a single seed has no spread at all."""
    by_seed: dict[int | None, list[float]] = {0: [0.5, 0.6, 0.7], 1: [0.9] * 3, 2: [0.9, 0.9, 0.9022]}
    first, second, _ = goodput_text.answers(result({"spares": by_seed}))
    assert first == (
        "3 seeds do not tell whether spares 1 is enough, as more may gain 0.1 points (2: +0.07 (-0.24 to 0.39)); "
        "about 421 would."
    )
    assert second.startswith("Not shown to be enough: spares 2, goodput 90.07 % (95 %: 89.76 to 90.39), the most")
    single = goodput_text.answers(result({"copies": {1: [0.9], 2: [0.9]}}, seeds=1))
    assert single[0].startswith("Enough: copies 1, goodput 90.00 %.")
    assert single[1] == "One seed does not tell how sure that is: --seeds 5 would."


def test_the_cheapest_is_named() -> None:
    found = goodput_text.answers(result({"spares": {0: [0.5], 3: [0.9]}}, price=9.0))
    assert found[-1] == "Cheapest: spares 0, 0.018 per million tokens."


def test_a_sweep_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    goodput_text.show(result({"mirror_every": {0: [0.8, 0.9, 0.8], 5: [0.9, 0.9, 0.9]}}, price=1.0))
    head, title, none, five, *_, last = capsys.readouterr().out.splitlines()
    assert head.endswith("24 h, 3 seeds")
    assert title.split("  ")[0] == "mirror every"
    assert none.split() == ["none", "83.33", "68.99", "to", "97.68", "16.67", "3.0", "0.001204"]
    assert five.split() == ["5", "90.00", "90.00", "to", "90.00", "10.00", "3.0", "0.006667"]
    assert last == "6,000 events in 1.0 s of CPU time, 6,000 a second"


def test_a_sweep_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Small causes share a column then; the sum is still all of the time."""
    seconds = dict.fromkeys(CAUSES, 864.0) | {"productive": 81216.0, "starved": 432.0, "redo": 432.0}
    outcome = Outcome(86400.0, seconds, 10, 1e9, 3.6e6, 1.0, 3, {}, 1000, 2000, ())
    made = tuple(Point({"spares": n}, (outcome,) * 3) for n in (0, 1))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    goodput_text.show(Result(setting(), 3, ("spares",), made, (0.5, 0.5)))
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if "goodput" in line)
    assert "rest" in head
    assert "redo" not in head
    (row,) = [line.split() for line in lines if line.split()[:2] == ["0", "94.00"]]
    shares = [float(word) for word in (row[1], *row[5:-2])]
    assert sum(shares) == pytest.approx(100)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("count", [1, 3])
def test_plots(tmp_path: Path, suffix: str, count: int) -> None:
    path = tmp_path / f"goodput{suffix}"
    goodputs: dict[int | None, list[float]] = {n: [0.8 + n / 100, 0.81, 0.82] for n in range(count)}
    goodput_plot.draw(result({"spares": goodputs}), path)
    content = path.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
        return
    told = ["goodput [% of time]", "lost [% of time]", "redo", *(["spares [nodes]"] if count > 1 else [])]
    assert [word for word in told if f">{word}<".encode() not in content] == []


def test_a_model_that_cannot_be_built_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  name: nowhere:make\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: model\.name: .*nowhere"):
        virtual_run.of_config([path])
    path.write_text("model:\n  layerz: 4\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: model\.layerz: unknown key; nearest valid key: model\.layers"):
        virtual_run.of_config([path])
