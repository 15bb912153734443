"""How an open step is settled: a pure function of the survivors' answers (design, section 4)."""

from collections.abc import Mapping

from evenkeel.control.messages import Answer, Decision
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.vote import Vote
from evenkeel.core.world import World


def decide(world: World, answers: Mapping[WorkerId, Answer], witness: Vote | None) -> Decision:
    """Rolls the open step forward if its vote is known to have completed anywhere, else drops it.

    Args:
        answers: of every survivor of the world's generation.
        witness: the newest vote of this generation in a report that was accepted (rule 4).

    The base is at least the world's own: everybody began from it.
    """
    seen: dict[Version, tuple[Vote, str]] = {}
    if witness is not None and witness.generation == world.generation:
        seen[Version(witness.step, witness.generation)] = (witness, "the leader reported it")
    for worker, answer in sorted(answers.items()):
        votes = [r.vote for r in answer.unreported] + ([answer.saw] if answer.saw is not None else [])
        for vote in votes:
            if vote.generation == world.generation:
                seen.setdefault(Version(vote.step, vote.generation), (vote, f"{worker} read it"))
    base = max((world.base, *seen))
    if base not in seen:
        return Decision(
            world.generation, base, None, f"no survivor saw a vote of step {base.step + 1}: it is run again"
        )
    vote, who = seen[base]
    return Decision(world.generation, base, vote, f"the vote of step {base.step} is complete: {who}")
