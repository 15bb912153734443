"""`evenkeel plan live`: the devices of a Ray cluster that runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evenkeel.cli import app
from evenkeel.config import ConfigError
from evenkeel.runtime.cluster import nodes_of
from evenkeel.tools.clusters_live import cluster_of
from evenkeel.tools.devices import published

ROOT = Path(__file__).parents[2]
OWN = """
devices:
  cpu:
    memory_gib: 4
    memory_gb_per_s: 10
    teraflops: {fp32: 0.05}
    inside: {gb_per_s: 2}
    between: {gb_per_s: 1}
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return str(path)


def test_the_cpus_of_a_running_cluster(shared_ray: str, own: str) -> None:
    """In this process; test_plan_command.py starts one."""
    options = ["--address", shared_ray, "--devices", own, "--config", str(ROOT / "conf/local.yaml"), "--json"]
    done = CliRunner().invoke(app, ["plan", "live", *options, "scaling.use_gpu=false"], catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["cluster"] == [{"device": "cpu", "devices": 6, "nodes": 1}]


NODES = [
    {"CPU": 4.0, "node:10.0.0.1": 1.0},
    {"CPU": 96.0, "GPU": 8.0, "accelerator_type:H100": 1.0},
    {"CPU": 96.0, "GPU": 8.0, "accelerator_type:H100": 1.0},
    {"CPU": 48.0, "GPU": 4.0, "accelerator_type:A100-40G": 1.0},
]
"""As ray.nodes() tells of a cluster with a head without GPUs."""


def test_gpus_by_what_ray_says_of_their_nodes() -> None:
    found = cluster_of(NODES, True, published())
    kinds = [(kind.device.name, kind.devices, count) for kind, count in found.nodes]
    assert kinds == [("NVIDIA H100 80GB HBM3", 8, 2), ("NVIDIA A100-SXM4-40GB", 4, 1)]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([{"GPU": 1.0, "accelerator_type:K80": 1.0}], "cluster: unknown device 'K80'; the nearest that is known: "),
        ([{"GPU": 2.0}], "cluster: Ray does not say what kind of GPU a node with 2 of them has"),
        (NODES[:1], "cluster: none of the 1 nodes of the running cluster has a GPU; with scaling.use_gpu=false"),
    ],
)
def test_what_cannot_be_planned_for_is_said(nodes: list[dict[str, float]], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        cluster_of(nodes, True, published())
    assert str(raised.value).startswith(message)


def test_the_nodes_of_the_cluster_that_is_connected_to(shared_ray: str) -> None:
    (node,) = nodes_of(shared_ray)
    assert node["CPU"] == 6


def test_where_no_cluster_runs_that_is_said() -> None:
    code = "from evenkeel.runtime.cluster import nodes_of\nnodes_of(None)"
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200)
    assert "NoClusterError: no cluster runs here: RAY_ADDRESS is not set" in done.stderr
