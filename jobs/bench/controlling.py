"""How long the controller works on what it hears in a large run: the real one, with workers that answer what is right.

For finding out what to make faster: python -m bench.controlling --help, from the folder jobs.
"""

import argparse
import cProfile
import gc
import pstats
import time
from collections.abc import Sequence
from contextlib import nullcontext

from bench.planning import large_model
from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.control.policy import Policy
from evenkeel.core.ids import NodeId, Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.model import Shard
from evenkeel.core.vote import SLOTS, Slot, Vote
from evenkeel.core.world import World
from evenkeel.plan.copies import shards_in
from evenkeel.plan.layout import Wish

TENSOR, STAGES = 8, 8
"""A TP group is a node's eight devices."""
SPARE_NODES = 4
STEP_S = 10.0
PARKED = m.PHASES.index("parked")


class Drill:
    """A run whose workers do at once what they are told, and what the controller takes for it.

    Args:
        nodes: of eight workers each, in pipelines of eight stages; a few more stand by.
        copies: how many workers keep each element of the state; None: all that compute with it.
        alone: every event is heard by itself, else those that come at once are heard at once.

    Attributes:
        spent: CPU seconds of the controller, by phase, one number for each time that it was gone through.
    """

    def __init__(self, nodes: int, copies: int | None = None, alone: bool = False, profiled: str = "") -> None:
        workers = nodes * TENSOR
        model = large_model()
        wish = Wish(nodes // STAGES, STAGES, TENSOR, TENSOR * STAGES, workers)
        spares = SPARE_NODES * TENSOR
        policy = Policy(model, wish, 2 * nodes // STAGES, 10**9, spares, copies=copies, gather_s=60.0)
        self.controller = Controller(policy)
        self.now = 0.0
        self.spent: dict[str, list[float]] = {}
        self.profile = cProfile.Profile()
        self._profiled = profiled
        self._alone = alone
        self._model = model
        self._places = workers
        self._started = 0
        self._shards: dict[WorkerId, Shard] = {}
        self._version = Version(0, 0)
        self._vote: Vote | None = None

    def begin(self) -> None:
        """From nothing to the first steps."""
        output = self._hear("start", [m.Started()])
        [start] = [command for command in output if isinstance(command, m.Start)]
        ready = [m.WorkerReady(self._new()) for _ in range(start.count)]
        last = self._places - 1  # whoever completes the world
        self._hear("ready", ready[:last])
        output = self._hear("first form", ready[last : last + 1])
        self._hear("spares", ready[last + 1 :])
        self._join(output)
        self._steps(4)

    def lose_a_node(self) -> None:
        """Its workers die, the others stop, settle and go on with spares; another node is started."""
        world = self._world()
        node = world.members[len(world.members) // 2].node_id
        dead = [info.worker_id for info in world.members if info.node_id == node]
        output = self._hear("lost", [m.WorkerLost(worker, "node lost") for worker in dead])
        start = sum(command.count for command in output if isinstance(command, m.Start))
        position = m.Position(world.generation, self._version.step + 1, PARKED)
        answers = {
            shard: m.Answer(position, (m.Held(shard, self._version),), saw=self._vote)
            for shard in set(self._shards.values())
        }
        output = self._hear(
            "answers",
            [
                m.Answered(c.worker_id, c.generation, c.ask, answers[self._shards[c.worker_id]])
                for c in output
                if isinstance(c, m.Abort)
            ],
        )
        settled = [
            m.Settled(c.worker_id, c.decision.generation, c.ask, answers[self._shards[c.worker_id]].held)
            for c in output
            if isinstance(c, m.Settle)
        ]
        self._hear("settled", settled[:-1])
        self._join(self._hear("form", settled[-1:]))
        self._hear("spares", [m.WorkerReady(self._new()) for _ in range(start)])
        self._steps(4)

    def ask_everybody(self) -> None:
        """Silence: all are asked where they are, and answer."""
        self.now += 1000.0
        output = self._hear("probe", [m.Tick()])
        position = m.Position(self._world().generation, self._version.step + 1, PARKED + 3)
        located = [m.Located(c.worker_id, c.probe, position) for c in output if isinstance(c, m.Probe)]
        self._hear("located", located)
        self._steps(1)

    # ------------------------------------------------------------ inside

    def _new(self) -> WorkerInfo:
        number, self._started = self._started, self._started + 1
        node = NodeId(f"n{number // TENSOR:04d}")
        return WorkerInfo(WorkerId(f"w{number:05d}"), node, number, "cuda", "GPU", store_host=node)

    def _world(self) -> World:
        world = getattr(self.controller.mode, "world", None)
        assert isinstance(world, World)
        return world

    def _join(self, output: Sequence[m.Command]) -> None:
        forms = [command for command in output if isinstance(command, m.Form)]
        self._hear("joined", [m.Joined(c.worker_id, c.world.generation, 0.5, 0.5) for c in forms])
        self._shards = dict(shards_in(self._world(), self._model))

    def _steps(self, count: int) -> None:
        world = self._world()
        for i in range(count):
            self.now += STEP_S
            step = self._version.step + 1
            values = [0.0] * SLOTS
            values[Slot.ONES], values[Slot.STEP] = world.size, step * world.size
            values[Slot.TOKENS] = values[Slot.LOSS] = 1.0
            report = m.Report(Vote(world.generation, step, tuple(values)), self.now)
            self._version, self._vote = Version(step, world.generation), report.vote
            self._hear("step" if i else "first step", [m.Reported(world.leader, (report,))])

    def _hear(self, phase: str, events: Sequence[m.Event]) -> list[m.Command]:
        self.now += 0.01
        hear = self._one_by_one if self._alone else self._at_once
        with self.profile if phase == self._profiled else nullcontext():
            began = time.process_time()
            commands = hear(events)
            took = time.process_time() - began
        self.spent.setdefault(phase, []).append(took)
        return commands

    def _one_by_one(self, events: Sequence[m.Event]) -> list[m.Command]:
        return [command for event in events for command in self.controller.step(self.now, event).commands]

    def _at_once(self, events: Sequence[m.Event]) -> list[m.Command]:
        return [command for output in self.controller.several(self.now, events) for command in output.commands]


INCIDENT = ("lost", "answers", "settled", "form", "joined", "spares", "first step")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.controlling", description=__doc__)
    parser.add_argument("--nodes", type=int, default=2048, metavar="N")
    parser.add_argument("--copies", type=int, metavar="R")
    parser.add_argument("--alone", action="store_true", help="every event is heard by itself")
    parser.add_argument("--incidents", type=int, default=3, metavar="N")
    parser.add_argument("--no-gc", action="store_true", help="without Python's cyclic garbage collector")
    parser.add_argument("--profile", default="", metavar="PHASE", help="what it does in this phase")
    options = parser.parse_args()
    if options.no_gc:
        gc.disable()
    drill = Drill(options.nodes, options.copies, options.alone, options.profile)
    drill.begin()
    for _ in range(options.incidents):
        drill.lose_a_node()
    drill.ask_everybody()
    for phase, seconds in drill.spent.items():
        print(f"{phase:12}", " ".join(f"{1000 * each:9.2f}" for each in seconds), "ms")
    whole = [
        sum(parts) for parts in zip(*(drill.spent[phase][-options.incidents :] for phase in INCIDENT), strict=True)
    ]
    print("incidents   ", " ".join(f"{1000 * each:9.2f}" for each in whole), "ms")
    if options.profile:
        pstats.Stats(drill.profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
