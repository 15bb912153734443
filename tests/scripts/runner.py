"""Plays a text scenario to a real controller and writes down what it says; see README.md for the words."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.control.entries import Shown
from evenkeel.control.modes import world_of
from evenkeel.control.policy import Policy
from evenkeel.core.ids import INITIAL, NodeId, Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.core.vote import SLOTS, Difference, Slot, Timing, Vote
from evenkeel.core.world import World
from evenkeel.plan.layout import Wish
from evenkeel.plan.mirrors import mirrors_of
from evenkeel.plan.speeds import Speeds

FLAGS = {name: Slot[name.upper()] for name in ("pause", "stop", "checkpoint", "busy", "mirror")}


@dataclass
class Block:
    """Lines of input, and the lines that must follow."""

    given: list[str]
    expected: list[str] = field(default_factory=list)


def parse(text: str) -> list[Block]:
    """Blocks are separated by empty lines; in each, "----" stands between what is given and what must follow."""
    blocks: list[Block] = []
    for part in text.strip().split("\n\n"):
        given, _, expected = part.partition("\n----")
        blocks.append(Block(given.splitlines(), expected.strip("\n").splitlines()))
    return blocks


def render(blocks: list[Block]) -> str:
    parts = []
    for block in blocks:
        lines = [*block.given, *(["----", *block.expected] if is_played(block) else [])]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def is_played(block: Block) -> bool:
    """Whether there is anything but comments and settings, which say nothing."""
    return any(not line.startswith(("#", "policy ", "at ")) for line in block.given)


def replay(text: str) -> str:
    """The scenario with what the controller says now."""
    script, blocks = Script(), parse(text)
    for block in blocks:
        said = script.play(block)
        block.expected = said if is_played(block) else []
    return render(blocks)


@dataclass(frozen=True)
class Line:
    """One line of input: a word, names, and settings such as step=3."""

    word: str
    names: tuple[str, ...]
    settings: dict[str, str]

    @classmethod
    def of(cls, text: str) -> "Line":
        word, *rest = text.split()
        pairs = [part.split("=", 1) for part in rest if "=" in part]
        return cls(word, tuple(p for p in rest if "=" not in p), dict(pairs))

    @property
    def who(self) -> WorkerId:
        return WorkerId(self.names[0])

    def number(self, key: str, default: int) -> int:
        return int(self.settings.get(key, default))

    def __contains__(self, name: str) -> bool:
        return name in self.names


class Script:
    """One run of one scenario. Generations, asks and probes are the present ones unless a line says otherwise."""

    def __init__(self) -> None:
        self.policy = policy_of(Line.of("policy workers=2"))
        self.controller: Controller | None = None
        self.now = 0.0
        self.life = 0
        self.journal: list[m.Entry] = []
        self.metrics: list[Vote] = []
        self.known: dict[WorkerId, WorkerInfo] = {}
        self.ask = 0
        self.probe = 0
        self.world: World | None = None
        self.said: list[str] = []

    def play(self, block: Block) -> list[str]:
        """What the controller says to a block: journal entries, commands, and changes of its mode."""
        self.said = []
        for text in block.given:
            if not text.startswith("#"):
                self._line(Line.of(text))
        return self.said or ["nothing"]

    def _line(self, line: Line) -> None:
        match line.word:
            case "policy":
                self.policy = policy_of(line)
            case "at":
                self.now = float(line.names[0])
            case "start" | "restart":
                self._begin(line)
            case _:
                for event in self._events(line):
                    self._hear(event)

    def _begin(self, line: Line) -> None:
        """A new life of the controller, with all workers that it knew but those that are named `without`."""
        self.life += 1
        without = line.settings.get("without", "").split(",")
        shown = Shown.of(reversed(self.metrics), float(line.settings.get("worked", "0")))
        self.controller = Controller(self.policy, self.life, tuple(self.journal), shown, "again" in line)
        self.known = {w: i for w, i in sorted(self.known.items()) if w not in without}
        saved = tuple(version(text, 0) for text in line.settings.get("saved", "").split(",") if text)
        damaged = tuple(f"{name}: missing" for name in line.settings.get("damaged", "").split(",") if name)
        resume = line.settings.get("resume")
        alive = tuple(self.known.values())
        self._hear(m.Started(alive, saved, damaged, version(resume, 0) if resume else None))

    def _hear(self, event: m.Event) -> None:
        assert self.controller is not None, "no controller: the scenario must begin with start"
        before = type(self.controller.mode).__name__
        output = self.controller.step(self.now, event)
        self.journal.extend(output.journal)
        self.metrics.extend(c.vote for c in output.commands if isinstance(c, m.Metrics))
        for command in output.commands:
            if isinstance(command, m.Abort):
                self.ask = command.ask
            elif isinstance(command, m.Probe):
                self.probe = command.probe
        world = world_of(self.controller.mode)
        self.world = world if world is not None else self.world
        self.said += [f"! {entry_line(e)}" for e in output.journal]
        self.said += [f"-> {text}" for text in command_lines(output.commands)]
        after = type(self.controller.mode).__name__
        if after != before:
            self.said.append(f"{before} => {after}")

    # ------------------------------------------------------------ events

    def _events(self, line: Line) -> Iterator[m.Event]:
        generation = line.number("gen", self.world.generation if self.world is not None else 0)
        match line.word:
            case "tick":
                yield m.Tick()
            case "ready":
                for name in line.names:
                    number = len(self.known) + 1
                    node, memory = NodeId(line.settings.get("node", "a")), line.number("memory", 0)
                    kind = line.settings.get("kind", "cpu")
                    info = WorkerInfo(WorkerId(name), node, 100 + number, kind=kind, memory=memory)
                    self.known[info.worker_id] = info
                    yield m.WorkerReady(info)
            case "lost":
                self.known.pop(line.who, None)
                yield m.WorkerLost(line.who, " ".join(line.names[1:]) or "killed")
            case "lost-node":
                for worker in [w for w, info in self.known.items() if info.node_id == line.names[0]]:
                    del self.known[worker]
                    yield m.WorkerLost(worker, "its node died", with_node=True)
            case "start-failed":
                yield m.StartFailed(int(line.names[0]), " ".join(line.names[1:]))
            case "joined":
                members = [i.worker_id for i in self._world.members] if line.who == "all" else line.names
                for name in members:
                    yield m.Joined(WorkerId(name), generation, 0.05, 0.02)
            case "report":
                votes = self._votes(line, generation)
                yield m.Reported(line.who, tuple(m.Report(v, self.now) for v in votes), tuple(self._timings(line)))
            case "finished":
                votes = self._votes(line, generation)
                yield m.Finished(line.who, generation, tuple(m.Report(v, self.now) for v in votes))
            case "answered":
                for name in line.names:
                    yield m.Answered(
                        WorkerId(name), generation, line.number("ask", self.ask), self._answer(line, name, generation)
                    )
            case "settled":
                for name in line.names:
                    held = self._held(name, line, generation)
                    yield m.Settled(WorkerId(name), generation, line.number("ask", self.ask), held)
            case "located":
                for name in line.names:
                    if name != "waiting":
                        yield m.Located(
                            WorkerId(name), line.number("probe", self.probe), self._position(line, generation)
                        )
            case "failed":
                yield m.Failed(line.who, generation, self._fault(line))
            case "part":
                for name in line.names:
                    of, stall_s = self._checkpoint(line, generation), float(line.settings.get("stall", "0"))
                    yield m.PartWritten(WorkerId(name), of, f"part of {name}", stall_s)
            case "writing":
                for name in line.names:
                    yield m.StillWriting(WorkerId(name), self._checkpoint(line, generation))
            case "part-failed":
                error = " ".join(line.names[1:])
                yield m.PartFailed(line.who, self._checkpoint(line, generation), error)
            case "saved":
                removed = tuple(int(step) for step in line.settings.get("removed", "").split(",") if step)
                yield m.CheckpointCommitted(self._checkpoint(line, generation), 1000, removed)
            case "not-saved":
                yield m.CheckpointFailed(self._checkpoint(line, generation), " ".join(line.names))
            case "damaged":
                of, file = self._checkpoint(line, generation), line.settings.get("file", "")
                yield m.CheckpointUnreadable(line.who, generation, of, " ".join(line.names[1:]), file)
            case "looked":
                of, file = self._checkpoint(line, generation), line.settings.get("file", "")
                yield m.Looked(of, file, " ".join(line.names))
            case "stop":
                yield m.StopRequested(" ".join(line.names) or "asked")
            case _:
                raise ValueError(f"unknown word {line.word!r}")

    @property
    def _world(self) -> World:
        assert self.world is not None, "there is no world yet"
        return self.world

    def _votes(self, line: Line, generation: int) -> list[Vote]:
        steps = line.settings.get("step", "")
        return [self._vote(int(step), generation, line) for step in steps.split(",") if step]

    def _vote(self, step: int, generation: int, line: Line) -> Vote:
        size = self._world.size
        values = [0.0] * SLOTS
        values[Slot.ONES], values[Slot.STEP] = size, step * size
        values[Slot.TOKENS], values[Slot.LOSS] = 100.0, 250.0
        values[Slot.NONFINITE] = float("nonfinite" in line)
        for name, slot in FLAGS.items():
            values[slot] = float(name in line.settings.get("flags", "").split(","))
        return Vote(generation, step, tuple(values))

    def _timings(self, line: Line) -> Iterator[Timing]:
        """times=w1:0.1,w2:0.4 are seconds of a pass, the same for each layer; receives=w2:0.3 of its messages, and
        links=w1>w2:1e8 the bytes per second that come from w1 to w2."""
        times, receives, links = (numbers(line, key) for key in ("times", "receives", "links"))
        for worker in self._world.layout.members if times else ():
            shard, pass_s = self._world.layout.shard(worker), times.get(worker, 0.0)
            depth = shard.stop - shard.start
            layers = (pass_s / depth,) * depth if shard.part == 0 and pass_s else ()
            [(source, rate)] = [(link, links[link]) for link in links if link.endswith(f">{worker}")] or [("", 0.0)]
            sender = WorkerId(source.partition(">")[0]) if source else None
            yield Timing(worker, pass_s, receives.get(worker, 0.0), layers, sender, rate)

    def _checkpoint(self, line: Line, generation: int) -> Version:
        return version(line.settings["of"], generation)

    def _answer(self, line: Line, name: str, generation: int) -> m.Answer:
        prepared = line.settings.get("prepared")
        saw = line.settings.get("saw")
        unreported = [int(s) for s in line.settings.get("unreported", "").split(",") if s]
        return m.Answer(
            self._position(line, generation),
            self._held(name, line, generation),
            self._vote(int(saw), generation, line) if saw else None,
            version(prepared, generation) if prepared else None,
            tuple(m.Report(self._vote(step, generation, line), self.now) for step in unreported),
            self._diverged(line, generation),
        )

    def _diverged(self, line: Line, generation: int) -> Vote | None:
        """differ=PART:w1=7,w2=8 is the vote that it refused, as copies of this part differ; more after ";"."""
        if "differ" not in line.settings:
            return None
        found: list[Difference] = []
        for text in line.settings["differ"].split(";"):
            part, _, sums = text.partition(":")
            pairs = (pair.split("=") for pair in sums.split(","))
            found.append(Difference(part, tuple((WorkerId(owner), int(checksum)) for owner, checksum in pairs)))
        return replace(self._vote(line.number("step", 0), generation, line), differences=tuple(found))

    def _position(self, line: Line, generation: int) -> m.Position:
        phase = m.PHASES.index(line.settings.get("phase", "forward"))
        return m.Position(generation, line.number("step", 0), phase, line.number("micro", 0), 0, "waiting" in line)

    def _held(self, name: str, line: Line, generation: int) -> tuple[m.Held, ...]:
        """held=3@1: its place's shard at that version; held=torn: while it is written; left out: nothing. mirrors=2@1:
        its own snapshot of that version, and those that it keeps for others; own=2@1: only its own."""
        text, held = line.settings.get("held", ""), []
        if name not in self._world.layout.places:
            return ()
        if text:
            shard = self._world.layout.shard(WorkerId(name))
            held.append(m.Held(shard, None if text == "torn" else version(text, generation)))
        for key in ("mirrors", "own"):
            for text in line.settings.get(key, "").split(",") if key in line.settings else ():
                for owner, mirroring in mirrors_of(self._world, self.policy.model).items():
                    if owner == name or (mirroring.keeper == name and key == "mirrors"):
                        held.append(m.Held(mirroring.shard, version(text, generation), mirror=True))
        return tuple(held)

    def _fault(self, line: Line) -> m.Fault:
        words = [w for w in line.names[1:] if w != "collective"]
        phase, layer = line.settings.get("phase", "forward"), line.settings.get("layer", "")
        text = " ".join(words) or "RuntimeError"
        return m.Fault(line.number("step", 1), phase, line.number("micro", 0), layer, text, "collective" in line)


def policy_of(line: Line) -> Policy:
    """policy workers=4 least=1 data=2 pipeline=2 tensor=1 spares=1 steps=9 micro=4 gather=0 bad=3 every=5 failures=2
    rebalance=1 copies=1 profile=H100:0.1,A100:0.3 slowed=1:4; a profile is of seconds of a pass, the same for each
    layer"""
    workers = line.number("workers", 2)
    pipeline, tensor = line.number("pipeline", 1), line.number("tensor", 1)
    data = line.number("data", max(1, workers // (pipeline * tensor)))
    layers = tuple(LayerShape(f"block{i}", (ParamShape(f"block{i}", (4, 4), 0),)) for i in range(4))
    return Policy(
        model=ModelShape(layers, tensor_divides=4),
        wish=Wish(data, pipeline, tensor, line.number("least", 1), workers),
        micro_batches=line.number("micro", 4),
        last_step=line.number("steps", 10),
        spares=line.number("spares", 0),
        max_bad_steps=line.number("bad", 3),
        mirror_every=line.number("mirror", 0),
        copies=int(line.settings["copies"]) if "copies" in line.settings else None,
        rebalance=line.number("rebalance", 0) > 0,
        gather_s=float(line.settings.get("gather", "10")),
        checkpoint_every=int(line.settings["every"]) if "every" in line.settings else None,
        max_checkpoint_failures=int(line.settings["failures"]) if "failures" in line.settings else None,
        profiled=Speeds((1 / len(layers),) * len(layers), kinds=kinds) if (kinds := numbers(line, "profile")) else None,
        slowed=tuple((int(rank), factor) for rank, factor in numbers(line, "slowed").items()),
    )


def numbers(line: Line, key: str) -> dict[str, float]:
    """Of a setting such as w1:0.1,w2:0.3."""
    texts = (text.rpartition(":") for text in line.settings.get(key, "").split(",") if text)
    return {name: float(value) for name, _, value in texts}


def version(text: str, generation: int) -> Version:
    """3@1 is step 3 of generation 1; without @ the present generation."""
    step, _, of = text.partition("@")
    return INITIAL if step == "0" else Version(int(step), int(of) if of else generation)


# ---------------------------------------------------------------- what is written down


def show_version(v: Version) -> str:
    return f"{v.step}@{v.generation}" if v != INITIAL else "0"


def show_world(world: World) -> str:
    pipelines = []
    for pipeline in world.layout.pipelines:
        stages = [f"{'+'.join(s.members)}[{s.start}:{s.stop}]" for s in pipeline.stages]
        pipelines.append(f"{' '.join(stages)} x{pipeline.share}")
    sources = ",".join(dict.fromkeys(s.worker_id for s in world.sources))
    held = f" held by {sources}" if sources else ""
    if world.saved:
        held = f" read from its checkpoint{f', but for what is{held}' if held else ''}"
    kept = f", mirrors of {show_version(world.mirrored)} are kept" if world.mirrored is not None else ""
    return f"{' | '.join(pipelines)} from {show_version(world.base)}{held}{kept}"


def entry_line(entry: m.Entry) -> str:
    match entry:
        case m.EpochBegun(epoch):
            return f"epoch {epoch}"
        case m.WorldOpened(world, spares):
            beside = f", spares {','.join(i.worker_id for i in spares)}" if spares else ""
            return f"world {world.generation} ({world.cause}): {show_world(world)}{beside}"
        case m.StepSettled(decision, evidence, witness, lost):
            rests = f"answers of {','.join(evidence) or 'nobody'}" + (f", report of {witness.step}" if witness else "")
            gone = f", lost {','.join(lost)}" if lost else ""
            forward = f" (commit {decision.vote.step})" if decision.vote else ""
            base = show_version(decision.base)
            return f"settled {decision.generation} at {base}{forward}: {decision.reason}; {rests}{gone}"
        case m.Restored(base, at, reason):
            return f"restored {show_version(base)}, all since up to world {at} is gone: {reason}"
        case m.RunEnded(status, error):
            return f"ended {status}" + (f": {error}" if error else "")


def command_lines(commands: tuple[m.Command, ...]) -> list[str]:
    """One line each; the same words to several workers share a line. Timers are left out."""
    lines: dict[str, list[str]] = {}
    for command in commands:
        match command:
            case m.Abort(worker, _, generation, _, acknowledged):
                lines.setdefault(f"abort {generation} (step {acknowledged} is durable):", []).append(worker)
            case m.Settle(worker, _, _, decision):
                lines.setdefault(f"settle {decision.generation} at {show_version(decision.base)}:", []).append(worker)
            case m.Form(worker, _, world):
                lines.setdefault(f"form {world.generation}:", []).append(worker)
            case m.Request(worker, _, _, flags):
                lines.setdefault(f"request {str(flags.name).lower()}:", []).append(worker)
            case m.Probe(worker):
                lines.setdefault("probe:", []).append(worker)
            case m.SetTimer():
                pass
            case _:
                lines[other_line(command)] = []
    return [" ".join([text, *workers]) for text, workers in lines.items()]


def other_line(
    command: m.Kill | m.Start | m.CommitCheckpoint | m.LookAt | m.Metrics | m.Log | m.Status | m.End,
) -> str:
    match command:
        case m.Kill(worker, reason):
            return f"kill {worker}: {reason}"
        case m.Start(count):
            return f"start {count}"
        case m.CommitCheckpoint(of, _, _, parts, _, agreed):
            kept = "" if agreed in (None, of) else f", {show_version(agreed)} stays"
            return f"commit checkpoint {show_version(of)}: {', '.join(parts)}{kept}"
        case m.LookAt(of, file):
            return f"look at checkpoint {show_version(of)}" + (f": {file}" if file else "")
        case m.Metrics(vote):
            return f"metrics step {vote.step} of world {vote.generation}" + (" skipped" if vote.skip else "")
        case m.Log(event, fields=fields):
            return f"log {event}{log_fields(event, fields)}"
        case m.Status(status, waiting_for):
            return f"status {status}" + (f": {waiting_for}" if waiting_for else "")
        case m.End(status, error):
            return f"end {status}" + (f": {error}" if error else "")


def log_fields(event: str, fields: dict[str, object]) -> str:
    """What tells the story; the rest (pids, phases) has tests of its own."""
    common = ("what", "worker_id", "checkpoint", "cause", "lost", "parts", "workers", "reason", "error", "text")
    told = (*common, "predicted_gain_s", "gain_s", "pause_s", "attempts", "rolled_forward", "total")
    return "".join(f" {key}={fields[key]}" for key in told if key in fields and event != "world_formed")


if __name__ == "__main__":
    told = Path(sys.argv[1]).read_text()
    sys.exit(replay(told) != told)
