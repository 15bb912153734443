"""How an open step is settled: a pure function of the survivors' answers (design, section 4)."""

from collections.abc import Mapping

from evenkeel.control.divergence import describe, judge
from evenkeel.control.parts import Answer, Decision, Divergence
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.vote import Vote
from evenkeel.core.world import World


def decide(world: World, answers: Mapping[WorkerId, Answer], witness: Vote | None) -> Decision:
    """Rolls the open step forward if its vote is known to have completed anywhere, else drops it.

    Args:
        answers: of every survivor of the world's generation.
        witness: the newest vote of this generation in a report that was accepted (rule 4).

    The base is at least the world's own: everybody began from it. A vote by which copies of the state differ was
    refused by everybody, so it is never rolled forward, whoever tells of it; it says which copies do not count.
    """
    seen: dict[int, tuple[Vote, str]] = {}  # by step, as all are of the world's generation
    if witness is not None and witness.generation == world.generation and not witness.differences:
        seen[witness.step] = (witness, "the leader reported it")
    for worker, answer in sorted(answers.items()):
        votes = [r.vote for r in answer.unreported] + ([answer.saw] if answer.saw is not None else [])
        for vote in votes:
            if vote.step not in seen and vote.generation == world.generation and not vote.differences:
                seen[vote.step] = (vote, f"{worker} read it")
    base = max((world.base, *(Version(step, world.generation) for step in seen)))
    diverged = _diverged(world, base, answers)
    differ = "" if diverged is None else f"; {describe(diverged)}"
    if base != world.base:
        vote, who = seen[base.step]
        reason = f"the vote of step {base.step} is complete: {who}{differ}"
        return Decision(world.generation, base, vote, reason, diverged)
    reason = differ[2:] or f"no survivor saw a vote of step {base.step + 1}: it is run again"
    return Decision(world.generation, base, None, reason, diverged)


def _diverged(world: World, base: Version, answers: Mapping[WorkerId, Answer]) -> Divergence | None:
    """What the refused vote of the open step says. It is the same whoever tells of it: an all-reduce has one result."""
    for _, answer in sorted(answers.items()):
        vote = answer.diverged
        if vote is not None and (vote.generation, vote.step) == (world.generation, base.step + 1):
            return judge(vote)
    return None
