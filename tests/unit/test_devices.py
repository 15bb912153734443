"""Device tables, the user's own over them, and clusters in short and from files."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from evenkeel.config import ConfigError
from evenkeel.plan.hardware import Cluster
from evenkeel.tools.clusters import read_cluster
from evenkeel.tools.devices import catalogue, published

ROOT = Path(__file__).parents[2]


def kinds(cluster: Cluster) -> list[tuple[int, int, str]]:
    return [(count, kind.devices, kind.device.name) for kind, count in cluster.nodes]


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return str(path)


# ---------------------------------------------------------------- what comes with the package


def test_every_published_table_says_where_it_is_from() -> None:
    tables = published().tables
    assert len(tables) >= 16
    for table in tables:
        assert "data sheet" in table.source or "white paper" in table.source or "specifications" in table.source, table
        assert table.inside.source and table.between.source, table
        assert table.inside.gb_per_s >= table.between.gb_per_s, table
        assert table.teraflops["fp32"] > 0, table


def test_no_two_devices_share_a_name() -> None:
    names = [name.lower() for table in published().tables for name in (table.name, *table.aliases)]
    assert len(names) == len(set(names))


def test_names_are_what_torch_says_and_short_ones() -> None:
    find = published().find
    assert find("NVIDIA H100 80GB HBM3", "", "") is find("h100", "", "")
    assert find("A100", "", "").name == "NVIDIA A100-SXM4-80GB"
    assert find("Tesla T4", "", "") is find("T4", "", "")


def test_a_table_in_the_units_of_the_planner() -> None:
    node = published().find("H100", "", "").node(8)
    assert node.device.memory == 80 * 2**30
    assert node.device.flops["bf16"] == pytest.approx(989.4e12)
    assert node.device.bytes_per_s == pytest.approx(3.35e12)
    assert node.inside.bytes_per_s == pytest.approx(450e9)
    assert node.between.latency_s == pytest.approx(14e-6)


def test_old_devices_have_no_bf16() -> None:
    assert all("bf16" not in published().find(name, "", "").teraflops for name in ("V100-16", "V100-32", "T4"))


def test_the_tables_are_seen_beside_the_other_configuration() -> None:
    beside = sorted(path.name for path in (ROOT / "conf/devices").glob("*.yaml"))
    assert beside == sorted(path.name for path in (ROOT / "platform/evenkeel/devices").glob("*.yaml"))
    assert len(beside) == len(published().tables)


def test_a_wheel_has_the_tables(tmp_path: Path) -> None:
    """`pip install .` is not editable: what is no module comes along only where the build is told so."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "platform", source / "platform", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        packed = {Path(name).name for name in files.namelist() if name.startswith("evenkeel/devices/")}
    assert packed == {path.name for path in (ROOT / "platform/evenkeel/devices").glob("*.yaml")}


# ---------------------------------------------------------------- the user's own


def test_some_keys_of_a_known_device_are_replaced(tmp_path: Path) -> None:
    path = written(tmp_path, "devices:\n  H100: {memory_gib: 60, teraflops: {bf16: 500}, inside: {gb_per_s: 20}}\n")
    table = catalogue(path).find("NVIDIA H100 80GB HBM3", "", "")
    before = published().find("H100", "", "")
    assert (table.memory_gib, table.teraflops["bf16"], table.inside.gb_per_s) == (60, 500, 20)
    assert (table.teraflops["fp32"], table.inside.latency_us, table.between) == (66.9, 4, before.between)


def test_a_device_like_another(tmp_path: Path) -> None:
    path = written(tmp_path, "devices:\n  Mine: {like: L40S, memory_gib: 96}\n")
    found = catalogue(path)
    table = found.find("mine", "", "")
    assert (table.name, table.memory_gib, table.memory_gb_per_s) == ("Mine", 96, 864)
    assert found.find("L40S", "", "").memory_gib == 48
    assert table.source == path


NEW = """
devices:
  Mine:
    memory_gib: 8
    memory_gb_per_s: 100
    teraflops: {fp32: 5}
    inside: {gb_per_s: 10}
    between: {gb_per_s: 1}
"""


def test_a_device_of_ones_own(tmp_path: Path) -> None:
    table = catalogue(written(tmp_path, NEW)).find("Mine", "", "")
    assert (table.devices_per_node, table.reached) == (8, 0.4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NEW.replace("memory_gib: 8", "memory_gib: -8"), "devices.Mine.memory_gib: is -8; must be above 0"),
        (NEW.replace("{fp32: 5}", "{fp32: -5}"), "devices.Mine.teraflops.fp32: is -5; must be above 0"),
        (
            NEW.replace("fp32: 5", "fp16: 5"),
            "devices.Mine.teraflops.fp16: unknown precision; expected one of fp32, bf16, fp64",
        ),
        (NEW.replace("memory_gib: 8", "memory_gib: 1.e+300"), "devices.Mine.memory_gib: is 1e+300; expected 1e-09 to"),
        (NEW.replace("gb_per_s: 10}", "gb_per_s: 0}"), "devices.Mine.inside.gb_per_s: is 0; must be above 0"),
        (
            NEW.replace("gb_per_s: 1}", "gb_per_s: 1, latency_us: -1}"),
            "devices.Mine.between.latency_us: is -1; must not be",
        ),
        (
            NEW.replace("memory_gib: 8", "memory: 8"),
            "devices.Mine.memory: unknown key; nearest valid key: devices.Mine.memory_g",
        ),
        (NEW.replace("memory_gib: 8", "memory_gib: much"), "devices.Mine.memory_gib: expected a number, got 'much'"),
        (NEW.replace("    memory_gib: 8\n", ""), "devices.Mine.memory_gib: is missing"),
        (NEW + "    reached: 2\n", "devices.Mine.reached: is 2; expected a share of the peak above 0, at most 1"),
        ("devices: {Mine: {like: H10O}}", "devices.Mine.like: unknown device 'H10O'; the nearest that is known: H100;"),
        ("devices: {Mine: 3}", "devices.Mine: expected a mapping"),
        ("devices: 3", "devices: expected a mapping of names to tables"),
        ("device: {}", "device: unknown key; expected one section 'devices'"),
        ("devices: {A: [", "not valid YAML"),
    ],
)
def test_mistakes_in_a_table_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        catalogue(path)
    assert str(raised.value).startswith(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- clusters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8xH100", [(1, 8, "NVIDIA H100 80GB HBM3")]),
        ("20xH100", [(2, 8, "NVIDIA H100 80GB HBM3"), (1, 4, "NVIDIA H100 80GB HBM3")]),
        ("2x4xT4", [(2, 4, "Tesla T4")]),
        ("8xH100+16xA100", [(1, 8, "NVIDIA H100 80GB HBM3"), (2, 8, "NVIDIA A100-SXM4-80GB")]),
        ("8xH100 + 8 x H100".replace(" x ", "x"), [(2, 8, "NVIDIA H100 80GB HBM3")]),
        ("4x4090+1x2xRTX-4090", [(1, 4, "NVIDIA GeForce RTX 4090"), (1, 2, "NVIDIA GeForce RTX 4090")]),
        ("8xNVIDIA H100 80GB HBM3", [(1, 8, "NVIDIA H100 80GB HBM3")]),
    ],
)
def test_a_cluster_in_short(text: str, expected: list[tuple[int, int, str]]) -> None:
    assert kinds(read_cluster(text, published())) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0xH100", "cluster: '0xH100': expected 1 to 10,000,000 devices"),
        ("8xH100+0x8xA100", "cluster: '0x8xA100': expected 1 to 10,000,000 devices"),
        ("99999999xH100", "expected 1 to 10,000,000 devices"),
        ("-8xH100", "cluster: '-8xH100' is not understood; expected \"8xH100\""),
        ("H100", "cluster: 'H100' is not understood"),
        ("1" * 5000 + "xH100", "...': expected 1 to 10,000,000 devices"),
        ("8xH100+", "cluster: '' is not understood"),
        ("", "cluster: '' is not understood"),
        ("8xH10", "cluster: unknown device 'H10'; the nearest that is known: H100;"),
    ],
)
def test_mistakes_in_short_clusters(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_cluster(text, published())
    assert message in str(raised.value)


def test_a_cluster_from_a_file(tmp_path: Path) -> None:
    text = """
nodes:
  - {kind: Mine, count: 3, devices: 2}
  - {kind: H100, between: {gb_per_s: 5, latency_us: 50}}
"""
    cluster = read_cluster(written(tmp_path, NEW + text), published())
    assert kinds(cluster) == [(3, 2, "Mine"), (1, 8, "NVIDIA H100 80GB HBM3")]
    assert cluster.nodes[1][0].between.bytes_per_s == 5e9
    assert cluster.devices == 14


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: []", "nodes: has no nodes"),
        ("nodes: [{kind: H100, count: 0}]", "nodes.0.count: is 0; expected 1 to"),
        ("nodes: [{kind: H100, devices: -1}]", "nodes.0.devices: is -1; expected 1 to"),
        ("nodes: [{kind: H100, count: 10000000, devices: 8}]", "nodes.0: has 80,000,000 devices; expected 1 to"),
        ("nodes: [{kind: H100, count: 2.5}]", "nodes.0.count: expected a whole number, got 2.5"),
        ("nodes: [{kind: H101}]", "nodes.0.kind: unknown device 'H101'; the nearest that is known: H100"),
        ("nodes: [{king: H100}]", "nodes.0.king: unknown key; nearest valid key: nodes.0.kind"),
        ("nodes: [{kind: H100, inside: {gb_per_s: -1}}]", "nodes.0.inside.gb_per_s: is -1; must be above 0"),
        ("node: []", "node: unknown key; nearest valid key: nodes"),
        ("devices: {}", "nodes: is missing"),
    ],
)
def test_mistakes_in_a_clusters_file(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        read_cluster(path, published())
    assert str(raised.value).startswith(f"{path}: {message}")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read: No such file"):
        read_cluster("nowhere.yaml", published())
