"""Every interleaving of a small run: the real Member and the real controller, breadth first, so that what goes wrong
is told by a shortest story.

Where the swarm samples large runs, this exhausts small ones. Nothing takes time here, so limits never pass: crashes
are pushed, messages are never lost but come in any order and as late as they like, and whoever may go on, may.
"""

import sys
from argparse import ArgumentParser
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from evenkeel.sim.situation import Bounds, Situation, StoryError


@dataclass(frozen=True, slots=True)
class Explored:
    """Attributes:
    states, moves: how many different situations, and ways from one to the next, there were.
    ends: in how many the run had ended, by how.
    whole: False if the limit of states was reached first.
    wrong: what went wrong, "" if nothing did; and the story that leads there.
    """

    states: int
    moves: int
    ends: dict[str, int]
    whole: bool
    wrong: str
    story: tuple[str, ...]


def explore(bounds: Bounds, max_states: int = 2_000_000) -> Explored:
    """Looks at every situation that can be reached within the bounds, nearest first, until one is wrong."""
    first = Situation.first(bounds)
    came: dict[object, tuple[object, str]] = {first.key(): (None, "")}
    queue: deque[tuple[object, Situation]] = deque([(first.key(), first)])
    ends: dict[str, int] = {}
    moves = 0
    while queue:
        key, situation = queue.popleft()
        if situation.ended:
            ends[situation.ended] = ends.get(situation.ended, 0) + 1
            continue
        moved = False
        try:
            for what, after in situation.moves():
                moved = True
                moves += 1
                reached = after.key()
                if reached not in came:
                    came[reached] = (key, what)
                    queue.append((reached, after))
            if not moved and situation.anybody_left:
                raise StoryError("nothing can happen any more, and the run has not ended")
        except StoryError as error:
            story = [*_story(came, key), *([error.what] if error.what else [])]
            return Explored(len(came), moves, ends, False, str(error), tuple(story))
        if len(came) >= max_states:
            return Explored(len(came), moves, ends, False, "", ())
    return Explored(len(came), moves, ends, True, "", ())


def _story(came: dict[object, tuple[object, str]], key: object) -> Iterator[str]:
    steps: list[str] = []
    while key is not None:
        key, what = came[key]
        steps.append(what)
    return reversed([step for step in steps if step])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if nothing is wrong, 5 if something is, 1 if the limit was reached before all was seen."""
    parser = ArgumentParser(prog="python -m evenkeel.sim.explore", description=__doc__)
    for bound in fields(Bounds):
        parser.add_argument(f"--{bound.name.replace('_', '-')}", type=int, default=bound.default)
    parser.add_argument("--max-states", type=int, default=2_000_000)
    options = vars(parser.parse_args(arguments))
    max_states = options.pop("max_states")
    explored = explore(Bounds(**options), max_states)
    print(f"{explored.states} states, {explored.moves} moves, ends: {explored.ends}")
    if explored.wrong:
        print("\n".join([*explored.story, f"=> {explored.wrong}"]))
        return 5
    print("all seen, nothing wrong" if explored.whole else "not all seen, nothing wrong so far")
    return 0 if explored.whole else 1


if __name__ == "__main__":
    sys.exit(main())
