"""`evenkeel profile` on a real Ray: measured once, kept, and of no consequence to what is trained."""

import json
import sys
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
from ray_runs import SAVING, Finished, Site, merged

from evenkeel.config import ConfigError
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.runtime import profiling
from evenkeel.runtime.profiling import choose_nodes, link_rounds
from evenkeel.store.profiles import Key, ProfileRecord
from evenkeel.store.run_directory import RunDirectory
from evenkeel.tools.profiling import profile

TENSOR = {"model": {"kv_heads": 2}, "parallel": {"data": 1, "pipeline": 1, "tensor": 2}}
OWN = """
from torch import nn
import torch
from evenkeel.data.dataset import Data, TensorDataset
from evenkeel.engine.model import LayerSpec, Model

class Angry(nn.Linear):
    def forward(self, x):
        if x.requires_grad:
            raise RuntimeError("not on this device")
        return super().forward(x)

def model(config):
    return Model((LayerSpec("a", lambda: nn.Linear(4, 8)), LayerSpec("b", lambda: nn.Linear(8, 3))))

def angry(config):
    return Model((LayerSpec("a", lambda: nn.Linear(4, 8)), LayerSpec("b", lambda: Angry(8, 3))))

def data(config):
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    return Data(TensorDataset(inputs, (inputs[:, 0] > 0).long()), None)
"""


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "LAYERS_S", 0.2)
    monkeypatch.setattr(profiling, "LINK_S", 0.2)


def said(capsys: pytest.CaptureFixture[str], *words: str, **options: Any) -> tuple[dict[str, Any], str]:
    """What is printed as JSON, and what beside it."""
    profile(list(words), as_json=True, **options)
    out, err = capsys.readouterr()
    return json.loads(out), err


def times(record: ProfileRecord) -> dict[tuple[str, int], int]:
    """How many layers have a time, by kind and TP degree."""
    for layers in record.profile.layers.values():
        assert all(layer.total_s > 0 for layer in layers)
    return {key: len(layers) for key, layers in record.profile.layers.items()}


def test_measured_once_kept_shown_and_of_no_consequence_to_the_losses(
    site: Site, truth: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    file, own = site._config(SAVING, "run"), site._own("run")
    first, err = said(capsys, *own, config=[file])
    directory = RunDirectory.at(first.pop("directory"))
    assert err == "" and json.loads((Path(directory.url) / "profile.json").read_text()) == first
    record = directory.read_profile()
    assert record is not None and times(record) == {("cpu", 1): 4}
    assert list(record.profile.links) == [("cpu", "cpu", "inside")]
    assert record.kept_bytes[1] == record.kept_bytes[2] > record.output_bytes[1] > record.output_bytes[-1] == 0
    again, err = said(capsys, *own, config=[file])
    assert err == "" and again["time"] == first["time"]
    profile([directory.url])
    assert "blocks.1" in capsys.readouterr().out
    done = site.run(SAVING)
    assert (done.status, done.err) == (0, "")
    assert [line["loss"] for line in done.directory.metrics()] == [line["loss"] for line in truth.directory.metrics()]
    assert directory.read_profile() == record


def test_a_run_begins_with_shares_by_its_profile_and_has_the_same_losses(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 is made slow, and was measured so; in the first world already it has less to do."""
    plain = {"train": {"precision": "fp64", "global_batch": 20, "steps": 6}}
    slow = {**plain, "parallel": {"rebalance": True}, "emulate": {"slowdown": {1: 4.0}}}
    found, _ = said(capsys, *site._own("run"), config=[site._config(slow, "run")])
    assert [device["kind"] for device in found["devices"]] == ["cpu", "cpu-slowed-4x"]
    seconds = {t["kind"]: sum(t["forward_s"] + t["backward_s"]) for t in found["times"]}
    assert 2 < seconds["cpu-slowed-4x"] / seconds["cpu"] < 8  # on a machine in use, whose processor time varies
    assert len(found["links"]) == 1
    done, without = site.run(slow), site.run(plain, name="plain")
    assert (done.status, done.err, without.status) == (0, "", 0)
    first = done.worlds()[0]
    shares = [stop - start for start, stop in (p["micro_batches"] for p in first["layout"]["pipelines"])]
    assert sum(shares) == 10 and shares[1] in (1, 2, 3)
    assert first["reason"].endswith("as it was profiled")
    assert "it begins as it was profiled: a micro-batch takes cpu " in done.out
    losses, same = ([line["loss"] for line in run.directory.metrics()] for run in (done, without))
    assert losses == pytest.approx(same, rel=1e-10)


def test_a_run_with_a_damaged_profile_says_so_and_runs_without(site: Site) -> None:
    path = Path(site._directory("run").url)
    path.mkdir(parents=True)
    (path / "profile.json").write_text("{")
    done = site.run({"parallel": {"rebalance": True}})
    assert (done.status, done.err) == (0, "")
    assert f"profile not used: {path}/profile.json: " in done.out


def test_one_that_does_not_fit_is_measured_anew_and_tp_groups_together(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    key = Key("decoder", "fp32", 4, ("embed",), "")
    site._directory("run").write_profile(ProfileRecord(key, (), (), (), (1,), (0,), 0.0, 0.0))
    found, err = said(capsys, *site._own("run"), config=[site._config(TENSOR, "run")])
    assert "profile.json does not fit: it is of micro-batch 4, not 2; measuring" in err
    record = site._directory("run").read_profile()
    assert record is not None and found["seconds"] == record.seconds
    assert times(record) == {("cpu", 1): 4, ("cpu", 2): 4} and record.degrees() == {1, 2}


def test_a_run_is_measured_by_its_own_configuration_wherever_it_lies_now(
    site: Site, truth: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    site.copy(truth)
    moved = site.folder / "elsewhere"
    (site.folder / "runs" / "run").rename(moved)
    found, _ = said(capsys, str(moved))
    assert found["directory"] == str(moved) and (moved / "profile.json").exists()
    assert found["key"]["layers"] == ["embed", "blocks.0", "blocks.1", "head"]


@pytest.fixture
def code(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A user's own code in the working directory."""
    monkeypatch.chdir(site.folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "of_my_own", raising=False)
    (site.folder / "of_my_own.py").write_text(OWN)
    return site


def own_model(site: Site, name: str) -> Path:
    file = site.folder / "own.json"
    own = {"model": {"name": f"of_my_own:{name}"}, "data": {"name": "of_my_own:data"}}
    file.write_text(json.dumps({**merged({}), **own}))
    return file


def test_a_model_of_ones_own(code: Site, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = said(capsys, *code._own("run"), config=[own_model(code, "model")])
    assert found["key"]["layers"] == ["a", "b"] and found["output_bytes"] == [2 * 8 * 4, 0]


def test_what_a_model_raises_is_told_in_one_line(code: Site) -> None:
    with pytest.raises(ConfigError, match=r"model\.name: could not be measured: RuntimeError: not on this device$"):
        profile(code._own("run"), config=[own_model(code, "angry")])


def test_links_of_different_nodes_are_measured_at_once() -> None:
    """Four kinds, two nodes of each, two workers on the first: each link once, no node twice at a time."""
    infos = [
        WorkerInfo(WorkerId(f"{kind}{i}"), NodeId(f"{kind}-{node}"), i, kind=kind)
        for kind in "abcd"
        for i, node in enumerate((1, 1, 2))
    ]
    node_of = {info.worker_id: info.node_id for info in infos}
    rounds = link_rounds(infos)
    for links in rounds:
        nodes = [node for *_, one, other in links for node in {node_of[one], node_of[other]}]
        assert len(set(nodes)) == len(nodes)
    told = [(kinds, where) for links in rounds for kinds, where, *_ in links]
    between = [((a, b), "between") for a, b in combinations_with_replacement("abcd", 2)]
    assert sorted(told) == sorted([*between, *(((a, a), "inside") for a in "abcd")])
    for (a, b), where, one, other in (link for links in rounds for link in links):
        assert one != other and (one[0], other[0]) == (a, b) and (node_of[one] == node_of[other]) == (where == "inside")
    assert len(rounds) <= 5  # of 14 links
    assert link_rounds(infos[:1]) == [] and link_rounds([]) == []


def test_some_workers_of_each_kind_of_node_are_enough() -> None:
    cpu = {"CPU": 8.0, "node:10.0.0.1": 1.0, "memory": 7.0}
    gpu = {"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 1.0}
    small = {"CPU": 4.0}
    nodes = [("a", cpu), ("b", {**cpu, "memory": 9.0}), ("c", cpu), ("d", small), ("e", gpu), ("f", {"CPU": 0.5})]
    assert choose_nodes(nodes, {"CPU": 1.0}, 2) == ["a", "a", "b", "d", "d", "e", "e"]
    assert choose_nodes(nodes, {"GPU": 1.0}, 8) == ["e", "e", "e", "e"]
    assert choose_nodes([("a", cpu), ("b", cpu)], {"CPU": 5.0}, 2) == ["a", "b"]
    assert choose_nodes(nodes, {"TPU": 1.0}, 2) == []
