"""Bugs to plant: each takes one rule of the protocol away, or breaks one thing that a rule rests on.

A bug is an exact text in one file and what to put in its place. The texts must be found, each exactly once, or the
test fails: a bug that is no longer planted proves nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """`rule` is the number in section 4 of the design, 0 for what is not a rule but must hold all the same."""

    name: str
    rule: int
    edits: tuple[tuple[str, str, str], ...]
    """(path in the package, text, replacement)"""


def bug(name: str, rule: int, *edits: tuple[str, str, str]) -> Bug:
    return Bug(name, rule, edits)


MEMBER = "control/member.py"
STATE = "control/state.py"
REPAIR = "control/repair.py"
FORMING = "control/forming.py"
CONTROLLER = "control/controller.py"
WORKER = "sim/worker.py"

BUGS = (
    bug(
        "answer-before-parked",
        1,
        (MEMBER, "if not self.parked or self.floor != generation + 1:", "if self.floor != generation + 1:"),
    ),
    bug(
        "decide-before-all-have-answered",
        1,
        (
            CONTROLLER,
            "if set(s.survivors(world)) <= answers.keys():\n                    repair.settle",
            "if 2 * len(answers) >= len(s.survivors(world)):\n                    repair.settle",
        ),
    ),
    bug(
        "guards-not-checked",
        2,
        (MEMBER, "if not vote.complete(self.world.size) or not self.running(", "if not self.running("),
    ),
    bug(
        "abort-flag-not-checked",
        2,
        (MEMBER, " or not self.running(vote.generation):", ":"),
    ),
    bug(
        "vote-before-the-sums",
        3,
        (MEMBER, "return self.sums == 0", "return True"),
    ),
    bug(
        "vote-before-the-last-sum",
        3,
        (MEMBER, "return self.sums == 0", "return self.sums <= 1"),
    ),
    bug(
        "report-is-no-witness",
        4,
        ("control/settle.py", "if witness is not None and witness.generation", "if False and witness.generation"),
    ),
    bug(
        "witness-forgotten-at-restart",
        4,
        (CONTROLLER, "        s.witness = witness\n", ""),
    ),
    bug(
        "reports-after-the-decision",
        5,
        (STATE, "            and not self.decided(world)\n", ""),
    ),
    bug(
        "reports-of-other-generations",
        5,
        (STATE, "            and vote.generation == world.generation\n", ""),
    ),
    bug(
        "decided-again",
        6,
        (REPAIR, "    if not s.decided(world):\n        _decide(s, now, mode)", "    _decide(s, now, mode)"),
    ),
    bug(
        "decision-not-journalled",
        6,
        (REPAIR, "    s.journal.append(m.StepSettled(s.decision, s.evidence, s.witness, lost))\n", ""),
    ),
    bug(
        "base-of-the-world-not-of-the-decision",
        6,
        (REPAIR, "    s.committed = s.decision.base\n", "    s.committed = world.base\n"),
    ),
    bug(
        "step-only-prepared",
        7,
        (MEMBER, "self.prepared == decision.base:", "self.prepared and self.prepared.step >= decision.base.step:"),
    ),
    bug(
        "worker-lives-on-after-a-failed-commit",
        8,
        (WORKER, 'self.fleet.kill(self.info.worker_id, "its commit raised")', 'self._raise("its commit raised")'),
    ),
    bug(
        "kept-slices-freed-at-reshard",
        13,
        (
            MEMBER,
            "        self.kept = tuple(h for h in self.holdings if h.version == version and h.shard != shard)\n",
            "        self.kept = ()\n",
        ),
    ),
    bug(
        "abort-does-not-reach-ahead",
        14,
        (
            MEMBER,
            "        self.floor = max(self.floor, generation + 1)\n",
            "        if self.generation == generation:\n            self.floor = generation + 1\n",
        ),
        (
            MEMBER,
            "if not self.parked or self.floor != generation + 1:",
            "if not self.parked or self.floor > generation + 1:",
        ),
        (
            MEMBER,
            "or not self.parked or self.floor != decision.generation + 1:",
            "or not self.parked or self.floor > decision.generation + 1:",
        ),
    ),
    bug(
        "abort-of-an-unknown-generation-refused",
        14,
        (
            MEMBER,
            "if epoch < self.epoch or self.generation > generation or",
            "if epoch < self.epoch or self.generation != generation or",
        ),
    ),
    bug(
        "generation-not-journalled",
        15,
        (FORMING, "    s.journal.append(m.WorldOpened(world, spares))\n", ""),
    ),
    bug(
        "generation-used-again-after-restart",
        15,
        (
            CONTROLLER,
            "opened.layout, opened.generation, opened.base",
            "opened.layout, opened.base.generation, opened.base",
        ),
    ),
    bug(
        "request-forgotten-when-not-carried",
        16,
        (MEMBER, "        self.pending &= ~vote.flags\n", "        self.pending = Flags.NONE\n"),
        (
            "control/progress.py",
            "    elif s.pending and vote.step < s.policy.last_step:\n        forming.send_flags(s, world)\n",
            "",
        ),
        (WORKER, "float(bool(self.member.pending & Flags.STOP))", "0.0"),
    ),
    bug(
        "unreported-votes-dropped",
        16,
        (
            MEMBER,
            "self.unreported = (*self.unreported, Report(self.saw, committed_at))[-RING:]",
            "self.unreported = (Report(self.saw, committed_at),)",
        ),
        (
            MEMBER,
            "return Answer(position, self.holdings, self.saw, self.prepared, self.unreported)",
            "return Answer(position, self.holdings, self.saw, self.prepared)",
        ),
    ),
    bug(
        "answer-of-a-lost-worker-counts",
        17,
        (
            REPAIR,
            "    answers = {w: a for w, a in sorted(mode.answers.items()) if w in s.roster.alive}\n",
            "    answers = dict(sorted(mode.answers.items()))\n",
        ),
    ),
    bug(
        "lost-worker-used-again",
        17,
        ("control/roster.py", "        self.gone.add(worker_id)\n", ""),
    ),
    bug(
        "lost-worker-is-a-source",
        17,
        (REPAIR, "{**s.holdings, **done}.items() if w in s.roster.alive}", "{**s.holdings, **done}.items()}"),
        (REPAIR, "    s.holdings.pop(worker_id, None)\n", ""),
    ),
    bug(
        "vote-lost",
        0,
        (
            "control/settle.py",
            "votes = [r.vote for r in answer.unreported] + ([answer.saw] if answer.saw is not None else [])",
            "votes = []",
        ),
        (
            REPAIR,
            "            if s.accepts(report.vote) and report.vote.step == s.visible + 1:\n",
            "            if False:\n",
        ),
    ),
    bug(
        "copy-forgotten",
        0,
        (
            FORMING,
            "        for w, holdings in sorted(s.holdings.items())\n",
            "        for w, holdings in sorted(s.holdings.items())[:-1]\n",
        ),
    ),
    bug(
        "spare-that-holds-forgotten",
        0,
        (REPAIR, "{**s.holdings, **done}", "done"),
    ),
    bug(
        "transfer-dropped",
        0,
        (
            WORKER,
            "pieces = [(t.source, t.tensor, t.box) for t in plan.transfers if t.target == me]",
            "pieces = [(t.source, t.tensor, t.box) for t in plan.transfers[1:] if t.target == me]",
        ),
    ),
    bug(
        "step-shown-twice",
        0,
        (STATE, "            and vote.step > self.visible\n", "            and vote.step >= self.visible\n"),
    ),
    bug(
        "step-skipped-when-a-report-is-lost",
        0,
        (
            "control/progress.py",
            "        if report.vote.step > s.visible + 1:",
            "        if False:",
        ),
        (
            MEMBER,
            "return Reported(self.worker_id, self.unreported)",
            "return Reported(self.worker_id, self.unreported[-1:])",
        ),
    ),
    bug(
        "micro-batches-lost",
        0,
        (
            "plan/batch.py",
            "for _ in range(micro_batches - minimum * len(times)):",
            "for _ in range(micro_batches - 1 - minimum * len(times)):",
        ),
    ),
    bug(
        "lost-form-not-sent-again",
        0,
        ("control/watch.py", "        s.say(m.Form(event.worker_id, s.epoch, world))\n", ""),
    ),
    bug(
        "dead-are-not-replaced",
        0,
        (
            "control/roster.py",
            "        self.starting += missing\n",
            "        missing = 0 if self.gone else missing\n        self.starting += missing\n",
        ),
    ),
    bug(
        "device-of-a-dying-worker-used",
        17,
        ("control/roster.py", " - self.starting - len(self.dying))", " - self.starting)"),
    ),
    bug(
        "failed-start-not-tried-again",
        0,
        (
            "control/watch.py",
            "    times = [] if s.roster.retry_at is None else [s.roster.retry_at]\n",
            "    times: list[float] = []\n",
        ),
    ),
    bug(
        "restarted-controller-does-not-abort",
        15,
        (CONTROLLER, "            repair.ask_for_promises(s, now, world, ran=False)\n", "            pass\n"),
    ),
    bug(
        "parked-member-not-noticed",
        0,
        ("control/watch.py", "    if parked and (", "    if False and ("),
    ),
    bug(
        "hung-worker-not-killed",
        0,
        (
            "control/watch.py",
            '        for worker in silent:\n            kill(s, now, worker, "no answer to a probe", quiet_s)\n',
            "        pass\n",
        ),
    ),
    bug(
        "end-before-the-last-step-is-shown",
        4,
        ("control/progress.py", "        s.over = True\n", '        s.end("finished")\n'),
    ),
    bug(
        "steps-shown-after-other-commands",
        4,
        (
            CONTROLLER,
            "m.Output(tuple(s.journal), tuple(s.commands))",
            "m.Output(tuple(s.journal), tuple(sorted(s.commands, key=lambda c: isinstance(c, m.Metrics))))",
        ),
    ),
)
