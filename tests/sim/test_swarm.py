"""Two thousand random runs: none goes wrong, and between them everything happens that should be able to."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from evenkeel.sim.swarm import EXITS, Outcome, main, run_seed, run_seeds

SEEDS = 2000
PLATFORM = Path(__file__).parents[2] / "platform"
FAILED_ONCE = [
    int(line.split()[0])
    for line in (Path(__file__).parent / "failing_seeds.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
MUST_HAPPEN = {
    "finished": 1000,
    "stopped": 100,
    "failed": 50,
    "step_rolled_back": 300,
    "step_rolled_forward": 100,
    "grow": 100,
    "shrink": 100,
    "incident of several worlds": 50,
    "exception": 20,
    "start_failed": 100,
    "lines lost with the controller": 80,
    "member dies in Forming": 100,
    "member dies in Running": 300,
    "member dies in Aborting": 50,
    "member dies in Settling": 30,
    "member dies in no controller": 20,
    "controller dies in Gathering": 50,
    "controller dies in Forming": 50,
    "controller dies in Running": 50,
    "controller dies in Aborting": 50,
    "controller dies in Settling": 30,
    "controller begins in Running": 50,
    "controller begins in Aborting": 100,
    "stop asked in Gathering": 20,
    "stop asked in Forming": 5,
    "stop asked in Running": 20,
    "stop asked in Aborting": 2,
    "stop asked in Settling": 2,
    "crash strikes": 300,
    "node strikes": 50,
    "hang strikes": 100,
    "cut strikes": 60,
    "slow strikes": 50,
    "suspect strikes": 50,
    "exception strikes": 50,
    "checkpoint_started": 500,
    "checkpoint_committed": 400,
    "checkpoint_failed": 200,
    "checkpoint_damaged": 50,
    "checkpoint_unreadable": 100,
    "misread": 30,
    "found after all": 5,
    "controller dies at looking": 5,
    "controller dies at looked": 3,
    "restored": 150,
    "back to the beginning": 50,
    "asked back": 30,
    "mirror begun": 200,
    "back to mirrors": 50,
    "one checkpoint kept": 100,
    "back as nobody came": 1,
    "world from a checkpoint": 150,
    "everybody dies": 100,
    "everybody dies but the controller": 100,
    "crash at saving": 30,
    "crash at part written": 10,
    "crash at manifest written": 10,
    "controller dies at loading": 50,
    "all at part written": 20,
    "all at manifest written": 50,
    "all at loading": 5,
    "controller dies at saving": 5,
    "controller dies at part written": 10,
    "controller dies at manifest written": 5,
    "flip strikes": 150,
    "odd copy out": 30,
    "copies without a majority": 30,
    "checkpoint_distrusted": 10,
    "rebalanced": 50,
    "rebalance_measured": 40,
    "evicted": 10,
    "slow_link": 5,
}
"""In how many runs of the two thousand at least."""


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return list(run_seeds(range(SEEDS)))


def again(outcome: Outcome) -> str:
    return f"{outcome}\n    again: python jobs/simulate.py --seeds {outcome.seed}"


def test_no_run_goes_wrong(outcomes: list[Outcome]) -> None:
    wrong = [again(outcome) for outcome in outcomes if outcome.verdict != "ok"]
    assert not wrong, f"{len(wrong)} of {len(outcomes)}:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_what_went_wrong_once(seed: int) -> None:
    outcome = run_seed(seed)
    assert outcome.verdict == "ok", again(outcome)


def test_the_swarm_is_telling(outcomes: list[Outcome]) -> None:
    happened = Counter(outcome.status for outcome in outcomes)
    for outcome in outcomes:
        happened.update(outcome.seen.keys())
    rare = {name: happened[name] for name, least in MUST_HAPPEN.items() if happened[name] < least}
    assert not rare, f"too rare: {rare}"


@pytest.mark.parametrize(("hash_seed", "seeds"), [("1", range(0, 300, 6)), ("4242", range(3, 300, 6))], ids=str)
def test_a_seed_does_not_depend_on_the_hash_seed(outcomes: list[Outcome], hash_seed: str, seeds: range) -> None:
    """Iterating over a set where order matters would show in the journal. The outcomes have random hash seeds."""
    code = f"from evenkeel.sim.swarm import run_seed\nfor s in {seeds}: print(run_seed(s).journal)"
    env = {**os.environ, "PYTHONPATH": str(PLATFORM), "PYTHONHASHSEED": hash_seed}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [outcomes[seed].journal for seed in seeds]


def test_exits_tell_crash_wrong_and_stuck_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = run_seed(0)
    assert main(["--seeds", "0:2", "--jobs", "1"]) == 0
    for verdict in ("wrong", "stuck", "crash"):
        bad = Outcome(7, verdict, "as planned", "", 0, 0, 0, "", {})
        monkeypatch.setattr("evenkeel.sim.swarm.run_seed", lambda seed, bad=bad: bad if seed == 7 else good)
        assert main(["--seeds", "6:9", "--jobs", "1"]) == EXITS[verdict]
        assert "python jobs/simulate.py --seeds 7" in capsys.readouterr().out
    assert len(set(EXITS.values())) == len(EXITS)
    with pytest.raises(SystemExit) as refused:
        main(["--seeds", "nine"])
    assert refused.value.code == 2
