"""That what `unequal` measures is what it says: real workers, one of them slowed, the layout that was asked for."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from static_runs import train

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

from bench import lab, unequal
from bench.process import BenchError
from bench.rows import results
from bench.sides import Side, static, static_at_once
from bench.work import Steps, check_same_work

MODEL = {"d_model": 32, "layers": 1, "heads": 4, "kv_heads": 2, "seq_len": 16}
TINY = unequal.Size(MODEL, MODEL, 1, settle=20, measured=4, alone=2, tried=2, trials=1, slow_from=2)


@pytest.fixture
def a_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> lab.Lab:
    monkeypatch.setattr(lab, "wait_quiet", lambda _: 0.0)
    return lab.Lab(tmp_path)


def run(side: Side, folder: Path) -> Steps:
    (folder / side.name).mkdir()
    return side.run(folder / side.name)


def test_given_shares_and_cuts_change_who_computes_what_and_not_what_is_computed(tmp_path: Path) -> None:
    work = TINY.work(4, {1: 2.0})
    equal = train(replace(work, data=2), tmp_path / "equal")
    shared = train(replace(work, data=2), tmp_path / "shared", "--shares", "24,6")
    cut = train(replace(work, pipeline=2), tmp_path / "cut", "--cuts", "1")
    assert 0 < check_same_work(equal, shared, "shared") < 1e-5, "the order of the sums is another"
    assert check_same_work(equal, cut, "cut") < 1e-5


def test_a_layout_that_does_not_fit_gives_no_measurement(tmp_path: Path) -> None:
    side = static(replace(TINY.work(2, {}), data=2), "wrong", layout={"shares": "24,7"})
    with pytest.raises(BenchError, match="exit status 1: ValueError: shares add up to 31"):
        run(side, tmp_path)


@pytest.mark.soak
def test_each_by_itself_does_the_same_steps_at_the_same_time(tmp_path: Path) -> None:
    fast, slow = unequal.by_themselves(TINY, 2.0, tmp_path)
    assert (fast.last, slow.last) == (12, 5)
    assert check_same_work(fast, slow, "slow") == 0.0


@pytest.mark.soak
def test_one_of_two_at_once_that_fails_gives_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="exit status 1"):
        static_at_once((replace(TINY.work(2, {}), schedule="unknown"), TINY.work(2, {})), tmp_path)


@pytest.mark.soak
def test_every_cut_is_tried(a_lab: lab.Lab) -> None:
    work = replace(TINY.work(unequal.EARLY + TINY.tried, {1: 4.0}), pipeline=2)
    assert set(unequal.try_cuts(a_lab, TINY, work)) == {1, 2}


@pytest.mark.soak
@pytest.mark.parametrize("name", ["shares_2", "shares_4", "shares_6_4", "cuts", "mid_run"])
def test_a_row_has_a_value(name: str, a_lab: lab.Lab) -> None:
    size = replace(TINY, measured=12, alone=12)
    match name:
        case "cuts":
            found = unequal.cuts_row(a_lab, 1, size)
        case "mid_run":
            found = unequal.mid_run_row(a_lab, 1, size)
        case _:
            found = unequal.shares_row(a_lab, 1, size, name, dict(unequal.SHARES)[name])
    (row,) = results("unequal", [found]).rows
    assert row.name == name
    assert row.value is not None
    assert row.value > 0
    assert not row.holds, "one round is too few"
