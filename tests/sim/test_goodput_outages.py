"""Failure models: drawn failures have the rates that they are asked for; a trace is read, or refused by line."""

from collections import Counter
from itertools import groupby, pairwise
from math import inf, sqrt
from pathlib import Path

import pytest

from evenkeel.sim.goodput.outages import DAY_S, Drawn, Repair, Trace, TraceError, read_trace
from evenkeel.sim.goodput.setting import Change

NODES = tuple(f"n{i:03d}" for i in range(96))
BAMBOO = Path(__file__).parents[2] / "jobs" / "bench" / "traces" / "bamboo-p3.csv"


def replay(nodes: tuple[str, ...], changes: list[Change]) -> tuple[float, Counter[str]]:
    """Goes through the changes as a cluster would: (seconds of all nodes that were there, how often each was lost).

    Fails if time goes back, or what comes is there already, or what goes is not.
    """
    since, there_s, lost = dict.fromkeys(nodes, 0.0), 0.0, Counter[str]()
    assert all(a.at_s <= b.at_s for a, b in pairwise(changes))
    for change in changes:
        assert change.there == (change.node not in since), change
        if change.there:
            since[change.node] = change.at_s
        else:
            there_s += change.at_s - since.pop(change.node)
            lost[change.node] += 1
    end = changes[-1].at_s if changes else 0.0
    return there_s + sum(end - at for at in since.values()), lost


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("fixed", [False, True])
def test_rates(share: float, fixed: bool) -> None:
    """A node-day meets as many failures as asked for, and lasts as long; within 4 standard deviations."""
    model = Drawn(0.05, Repair(DAY_S / 4, fixed), rack=8, rack_share=share)
    changes = list(model.changes(NODES, 7, 2000 * DAY_S))
    there_s, lost = replay(NODES, changes)
    expected = 0.05 * there_s / DAY_S
    together = 8 * share + 1 - share  # failures that come eight at once make the count vary more
    # A rack that is down already takes nobody again, nor does a node's own failure while its rack is.
    assert lost.total() == pytest.approx(expected, rel=0.015, abs=4 * sqrt(expected * together))
    away = 1 - there_s / (len(NODES) * changes[-1].at_s)
    assert away == pytest.approx(0.05 / 4 / (1 + 0.05 / 4), rel=0.06)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_the_share_that_takes_racks(share: float, expected: float) -> None:
    """Of all nodes that were lost, how many went in the same instant as seven others of their rack."""
    model = Drawn(0.05, Repair(600.0), rack=8, rack_share=share)
    gone = [c for c in model.changes(NODES, 3, 2000 * DAY_S) if not c.there]
    instants = [[NODES.index(c.node) // 8 for c in group] for _, group in groupby(gone, lambda c: c.at_s)]
    whole = sum(len(racks) for racks in instants if len(racks) == 8 and len(set(racks)) == 1)
    assert whole / len(gone) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("rate", "repair"), [(0.05, 600.0), (5.0, 7200.0), (100.0, 60.0)])
def test_about_how_many_changes_there_are(rate: float, repair: float) -> None:
    model = Drawn(rate, Repair(repair))
    until_s = 20_000 * DAY_S / rate / len(NODES)
    changes = sum(1 for _ in model.changes(NODES, 1, until_s))
    assert model.expected_changes(len(NODES), until_s) == pytest.approx(changes, rel=0.04)
    assert Drawn(0.0).expected_changes(5, 1e9) == 0
    assert Drawn(1.0, Repair(inf)).expected_changes(5, 1e9) == 5


def test_failures_come_without_memory() -> None:
    """The time between two failures of the whole cluster has the mean and the spread of an exponential."""
    model = Drawn(0.02, Repair(1.0, fixed=True))
    at = [c.at_s for c in model.changes(NODES, 1, 5000 * DAY_S) if not c.there]
    gaps = [b - a for a, b in pairwise(at)]
    mean = sum(gaps) / len(gaps)
    spread = sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(DAY_S / (0.02 * len(NODES)), rel=0.05)
    assert spread == pytest.approx(mean, rel=0.05)


def test_a_seed_is_all_there_is_to_it() -> None:
    model = Drawn(0.1, Repair(DAY_S), rack=4, rack_share=0.2)
    first, again, other = (list(model.changes(NODES, seed, 100 * DAY_S)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert list(model.changes(NODES, 1, 50 * DAY_S)) == [c for c in first if c.at_s <= 50 * DAY_S]


def test_a_larger_cluster_has_the_same_failures() -> None:
    """So that a spare more is compared under the same failures as before."""
    model = Drawn(0.1, Repair(DAY_S), rack=8, rack_share=0.2)
    smaller = list(model.changes(NODES[:64], 1, 100 * DAY_S))
    larger = list(model.changes(NODES, 1, 100 * DAY_S))
    assert smaller == [c for c in larger if c.node in NODES[:64]]


def test_nodes_that_do_not_come_back_and_nodes_that_do_not_fail() -> None:
    gone = list(Drawn(1.0, Repair(inf)).changes(NODES, 1, 1000 * DAY_S))
    assert sorted(c.node for c in gone) == list(NODES)
    assert not any(c.there for c in gone)
    assert list(Drawn(0.0).changes(NODES, 1, DAY_S)) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((-0.1,), "-0.1 failures per node-day"),
        ((inf,), "inf failures per node-day"),
        ((0.1, Repair(), 0), "a rack of 0 nodes"),
        ((0.1, Repair(), 8, 1.5), "a share of 1.5"),
    ],
)
def test_models_that_make_no_sense(given: tuple[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Drawn(*given)
    with pytest.raises(ValueError, match="a repair takes 0 s"):
        Repair(0)


def test_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "small.csv"
    path.write_text("0,add,a\n0,add,b\n1500,remove,a\n1500,add,c\n\n60000, add, a\n")
    trace = read_trace(path)
    later = (Change(1.5, "a", False), Change(1.5, "c", True), Change(60.0, "a", True))
    assert trace == Trace(str(path), ("a", "b"), later)
    assert (trace.duration_s, trace.most) == (60.0, 3)
    assert tuple(trace.changes(("b", "a"), 9, 59.0)) == later[:2]
    with pytest.raises(ValueError, match="begins with 2 nodes of its own, not 1"):
        trace.changes(("a",), 9, 59.0)


def test_the_trace_of_spot_instances() -> None:
    """Counted on the file itself, apart from the reader."""
    lines = [line.split(",") for line in BAMBOO.read_text().splitlines()]
    trace = read_trace(BAMBOO)
    assert (len(lines), len(trace.beginning) + len(trace.later)) == (344, 344)
    assert len(trace.beginning) == sum(at == "0" for at, _, _ in lines) == 18
    assert trace.duration_s == int(lines[-1][0]) / 1000 == 40920.0
    _, lost = replay(trace.beginning, list(trace.later))
    assert lost.total() == sum(what == "remove" for _, what, _ in lines) == 167
    assert trace.most == 32


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("0,add,a\n5,remove,b\n", 2, "removes b, which is not there"),
        ("0,add,a\n5,remove,a\n6,remove,a\n", 3, "removes a, which is not there"),
        ("0,add,a\n5,add,a\n", 2, "adds a, which is there already"),
        ("5,add,a\n4,add,b\n", 2, "goes back in time, from 5 ms to 4 ms"),
        ("0,add,a\n-5,add,b\n", 2, "'-5' is not a number of milliseconds"),
        ("1.5,add,a\n", 1, "'1.5' is not a number of milliseconds"),
        ("soon,add,a\n", 1, "'soon' is not a number of milliseconds"),
        ("time,event,node\n0,add,a\n", 1, "'time' is not a number of milliseconds"),
        ("9" * 400 + ",add,a\n", 1, "999999999999999... ms is longer than 30,000 years"),
        ("0,reboot,a\n", 1, "'reboot' is neither add nor remove"),
        ("0,add,a,eu-west\n", 1, "'0,add,a,eu-west' is not a change"),
        ("0,add\n", 1, "'0,add' is not a change"),
        ("0,add,\n", 1, "'0,add,' is not a change"),
    ],
)
def test_traces_that_are_refused(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:{line}: {message}")


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    for content, message in ((b"", "is empty"), (b"\n \n", "is empty"), (b"\xff\xfe\x00", "cannot be read")):
        path.write_bytes(content)
        with pytest.raises(TraceError, match=message):
            read_trace(path)
    with pytest.raises(TraceError, match=r"none\.csv: cannot be read: No such file or directory"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path)
