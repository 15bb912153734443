from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenkeel.plan.schedule import Action, Kind, gpipe, one_f_one_b

Schedule = Callable[[int, int, int], tuple[Action, ...]]
F, B = Kind.FORWARD, Kind.BACKWARD


def execute(schedule: Schedule, stages: int, micros: int) -> tuple[list[int], int]:
    """Runs all stages in lockstep ticks with receives that block and sends that do not.

    Returns each stage's peak of micro-batches in flight, and the ticks that the pipeline took.
    """
    programs = [list(schedule(s, stages, micros)) for s in range(stages)]
    done: set[tuple[Kind, int, int]] = set()
    flying, peak, ticks = [0] * stages, [0] * stages, 0
    while any(programs):
        ran: list[tuple[Kind, int, int]] = []
        for s, program in enumerate(programs):
            if not program:
                continue
            kind, m = program[0].kind, program[0].micro
            before = s == 0 or (F, s - 1, m) in done
            after = (F, s, m) in done and (s == stages - 1 or (B, s + 1, m) in done)
            if before if kind is F else after:
                ran.append((kind, s, m))
                program.pop(0)
                flying[s] += 1 if kind is F else -1
                peak[s] = max(peak[s], flying[s])
        assert ran, f"deadlock with {programs} left"
        assert not done & set(ran), "an action was done twice"
        done |= set(ran)
        ticks += 1
    assert flying == [0] * stages
    assert done == {(kind, s, m) for kind in Kind for s in range(stages) for m in range(micros)}
    return peak, ticks


@given(stages=st.integers(1, 9), micros=st.integers(0, 20))
def test_one_f_one_b_ends_in_time_and_memory(stages: int, micros: int) -> None:
    peak, ticks = execute(one_f_one_b, stages, micros)
    assert peak == [min(micros, stages - s) for s in range(stages)]
    assert ticks == (2 * (micros + stages - 1) if micros else 0)


@given(stages=st.integers(1, 9), micros=st.integers(0, 20))
def test_gpipe_ends_in_time(stages: int, micros: int) -> None:
    peak, ticks = execute(gpipe, stages, micros)
    assert peak == [micros] * stages
    assert ticks == (2 * (micros + stages - 1) if micros else 0)


@given(stages=st.integers(1, 9), micros=st.integers(0, 20), schedule=st.sampled_from([gpipe, one_f_one_b]))
def test_backward_goes_in_order_of_the_micro_batches(stages: int, micros: int, schedule: Schedule) -> None:
    """The order of the gradient sums is the same in every stage, schedule and depth of a pipeline."""
    for s in range(stages):
        assert [a.micro for a in schedule(s, stages, micros) if a.kind is B] == list(range(micros))


def test_one_f_one_b_reads_as_its_name() -> None:
    text = " ".join(f"{a.kind.name[0]}{a.micro}" for a in one_f_one_b(1, 3, 4))
    assert text == "F0 F1 B0 F2 B1 F3 B2 B3"


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
@pytest.mark.parametrize(("stage", "stages", "micros"), [(2, 2, 1), (-1, 2, 1), (0, 0, 1), (0, 1, -1)])
def test_out_of_range(schedule: Schedule, stage: int, stages: int, micros: int) -> None:
    with pytest.raises(ValueError, match=r"pipeline|share"):
        schedule(stage, stages, micros)
