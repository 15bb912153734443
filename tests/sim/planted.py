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
    script: int = 0
    """The number of the scenario that finds it, if the swarm does not on so few seeds."""


def bug(name: str, rule: int, *edits: tuple[str, str, str], script: int = 0) -> Bug:
    return Bug(name, rule, edits, script)


MEMBER = "control/member.py"
STATE = "control/state.py"
REPAIR = "control/repair.py"
FORMING = "control/forming.py"
CONTROLLER = "control/controller.py"
PROGRESS = "control/progress.py"
SAVING = "control/saving.py"
WORKER = "sim/worker.py"
HOLDERS = "control/holders.py"
MIRROR = "sim/mirror.py"
SPEEDS = "control/speeds.py"
BALANCING = "control/balancing.py"

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
            "if not awaited:\n                    repair.settle",
            "if 2 * len(s.mode.answers) >= len(s.survivors(s.mode.world)):\n                    repair.settle",
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
            "        self.kept = tuple(h for h in self.trained if h.version == version and h.shard != shard)\n",
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
        (MEMBER, "(self.pending | self.flags(vote.step)) & ~(vote.flags | Flags.MIRROR)", "Flags.NONE"),
        (PROGRESS, "        if s.pending:\n            forming.send_flags(s, world)\n", ""),
        ("core/vote.py", "float(flag in flags)", "float(flag in flags and flag is not Flags.STOP)"),
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
            "return Answer(position, self.holdings, self.saw, self.prepared, self.unreported, self.diverged)",
            "return Answer(position, self.holdings, self.saw, self.prepared, (), self.diverged)",
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
            "    for w, holdings in sorted(s.holdings.items()):\n",
            "    for w, holdings in sorted(s.holdings.items())[:-1]:\n",
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
            PROGRESS,
            "        if report.vote.step > s.visible + 1:",
            "        if False:",
        ),
        (
            MEMBER,
            "return Reported(self.worker_id, self.unreported, timings)",
            "return Reported(self.worker_id, self.unreported[-1:], timings)",
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
            "for at in (s.roster.retry_at, saved_at) if at",
            "for at in (saved_at,) if at",
        ),
    ),
    bug(
        "restarted-controller-does-not-abort",
        15,
        (CONTROLLER, "            repair.ask_for_promises(s, now, world, ran=False)\n", "            pass\n"),
        # Else the probe of who is silent makes up for it.
        (
            "control/watch.py",
            "            s.say(m.Abort(event.worker_id, s.epoch, world.generation, ask, s.visible))\n",
            "            pass\n",
        ),
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
            "        for worker in silent:\n",
            "        for worker in ():\n",
        ),
    ),
    bug(
        "end-before-the-last-step-is-shown",
        4,
        (PROGRESS, "not s.over or shown or ", "not s.over or "),
    ),
    bug(
        "steps-shown-after-other-commands",
        4,
        (
            STATE,
            "tuple(self.commands[:commands]))",
            "tuple(sorted(self.commands[:commands], key=lambda c: isinstance(c, m.Metrics))))",
        ),
    ),
    bug(
        "manifest-with-a-part-missing",
        11,
        (SAVING, "if not u.missing and", "if len(u.missing) < 2 and"),
    ),
    bug(
        "part-of-another-version-accepted",
        11,
        (
            SAVING,
            "    upload = s.uploads.get(event.version)\n    if upload is None and _is_known(s, event.version):\n"
            "        upload = _upload(s, now, event.version)\n",
            "    upload = s.uploads[newest_first(list(s.uploads))[0]] if s.uploads else None\n",
        ),
    ),
    bug(
        "copied-while-the-last-is-written",
        11,
        ("core/vote.py", "return self.values[Slot.BUSY] > 0", "return False"),
    ),
    bug(
        "dead-writer-waited-for",
        0,
        (REPAIR, "    saving.lost(s, worker_id)\n", ""),
    ),
    bug(
        "lost-word-waited-for",
        0,
        ("control/watch.py", "    saving.tick(s, now)\n", ""),
    ),
    bug(
        "stop-before-its-checkpoint-is-complete",
        0,
        (FORMING, "is None or saving.is_saved(s):", "is None or saving.is_saved(s) or s.uploads:"),
    ),
    bug(
        "end-before-its-checkpoint-is-complete",
        0,
        (PROGRESS, "shown or s.uploads or", "shown or"),
        (PROGRESS, "is None or saving.is_saved(s):", "is None or saving.is_saved(s) or s.uploads:"),
    ),
    bug(
        "last-step-not-saved-while-busy",
        0,
        (MEMBER, "return writing and step < self.world.last_step", "return writing"),
        (PROGRESS, "is None or saving.is_saved(s):", "is None or True:"),
    ),
    bug(
        "going-back-not-journalled",
        6,
        (SAVING, "    s.journal.append(entry)\n", ""),
    ),
    bug(
        "visible-step-not-taken-back",
        6,
        (SAVING, "    s.visible = s.saved_at_step = base.step\n", "    s.saved_at_step = base.step\n"),
    ),
    bug(
        "committed-version-not-taken-back",
        6,
        (SAVING, "    s.committed = base\n", ""),
    ),
    bug(
        "witness-of-before-going-back-counts",
        6,
        (
            CONTROLLER,
            "if witness is not None and not any(witness.generation <= at for _, at in s.restores):",
            "if witness is not None:",
        ),
    ),
    bug(
        "steps-of-before-going-back-shown-again",
        6,
        (CONTROLLER, " and saving.in_line(s, Version(vote.step, vote.generation)):", ":"),
    ),
    bug(
        "checkpoint-of-a-line-given-up",
        7,
        (SAVING, "        if _age(version) > _age(base):\n            return False\n", ""),
    ),
    bug(
        "checkpoint-of-a-step-that-was-dropped",
        7,
        (REPAIR, "    saving.settled(s, s.decision)\n", ""),
    ),
    bug(
        "damaged-checkpoint-taken-again",
        0,
        (SAVING, "        s.saved.remove(version)\n", ""),
    ),
    bug(
        "one-worker-believed-that-a-checkpoint-is-damaged",
        0,
        (REPAIR, "    looking.unreadable(s, event)\n", "    saving.damaged(s, event.version, event.error)\n"),
    ),
    bug(
        "manifest-that-arrived-not-looked-for",
        0,
        (SAVING, "    s.unsure.add(version)\n", ""),
    ),
    bug(
        "world-formed-before-the-look-is-answered",
        0,
        (FORMING, "    if s.looks:\n", "    if False:\n"),
    ),
    bug(
        "worker-that-cannot-read-stays",
        0,
        (REPAIR, "        kill(s, now, worker, what)\n", ""),
    ),
    bug(
        "removed-checkpoint-taken",
        0,
        (SAVING, "    s.saved = [v for v in s.saved if v.step not in event.removed]\n", ""),
    ),
    bug(
        "copies-not-compared",
        0,
        (MEMBER, "        return due(self.world, step, self.saw)\n", "        return False\n"),
    ),
    bug(
        "copies-compared-only-in-the-first-step",
        0,
        ("plan/comparison.py", "return first or saved or step == world.last_step or ", "return first and "),
        ("plan/comparison.py", "step % world.compare_every == 0", "True"),
    ),
    bug(
        "vote-of-copies-that-differ-believed",
        0,
        (MEMBER, "        if vote.differences:\n", "        if False:\n"),
    ),
    bug(
        "vote-of-copies-that-differ-rolled-forward",
        0,
        (
            "control/settle.py",
            "for r in answer.unreported] + (",
            "for r in answer.unreported] + ([answer.diverged] if answer.diverged is not None else []) + (",
        ),
        ("control/settle.py", "vote.generation == world.generation and not vote.differences:", "True:"),
    ),
    bug(
        "odd-copy-stays",
        0,
        (REPAIR, "    for worker, cause in odd.items():\n        kill(s, now, worker, cause)\n", ""),
    ),
    bug(
        "odd-copy-alive-after-a-restart-of-the-controller",
        17,
        (REPAIR, "not in s.roster.alive or i.worker_id in odd)", "not in s.roster.alive)"),
    ),
    bug(
        "one-of-two-copies-taken-for-right",
        0,
        (MEMBER, "        if decision.void:\n            self.held, self.kept, self.mirrors = None, (), ()\n", ""),
        ("control/divergence.py", "        s.holdings = {}\n", ""),
        (CONTROLLER, "if s.decision is None or s.decision.void:", "if s.decision is None:"),
    ),
    bug(
        "checkpoint-of-copies-that-differ-taken",
        0,
        ("control/divergence.py", "        s.distrusted.add(decision.base)\n", "        pass\n"),
    ),
    bug(
        "checkpoint-whose-writer-died-before-copies-were-compared-taken",
        0,
        ("control/divergence.py", "        s.distrusted |= s.unproven\n", "        pass\n"),
    ),
    bug(
        "checkpoint-that-some-have-not-read-taken",
        0,
        ("control/divergence.py", "if world.saved and not world.sources:", "if world.saved:"),
    ),
    bug(
        "last-checkpoint-whose-copies-agreed-removed",
        0,
        (SAVING, "tuple(s.saved), next(agreed, None)", "tuple(s.saved), None"),
    ),
    bug(
        "back-although-peers-hold-everything",
        0,
        (FORMING, "if lost and s.committed not in s.saved:", "if (lost or s.saved) and s.committed not in s.saved:"),
    ),
    bug(
        "no-snapshot-of-its-own",
        9,
        (MIRROR, "self.take((version, mine.shard), contents)\n", "self.worker.member.mirrors = ()\n"),
    ),
    bug(
        "mirrors-overwritten-before-the-next-is-whole",
        9,
        (MEMBER, "x.generation == self.generation and not x.is_whole for x", "False for _"),
    ),
    bug(
        "one-slot-for-mirrors",
        9,
        (MEMBER, "kept = others if version == self.world.base else others[-1:]", "kept = ()"),
    ),
    bug(
        "base-of-a-world-not-mirrored",
        9,
        (WORKER, "if world.mirror_every is not None and world.base != INITIAL:", "if False:"),
    ),
    bug(
        "mirrors-not-kept-by-the-next-world",
        9,
        (FORMING, "mirrored=holders.newest_mirrored(s) if mirrors else None", "mirrored=None"),
    ),
    bug(
        "mirror-labelled-before-its-last-byte",
        8,
        (MEMBER, "version, shards, earlier=earlier)", "version, shards, shards, earlier)"),
    ),
    bug(
        "mirrors-that-lack-something-gone-back-to",
        0,
        (HOLDERS, "if not lost_slices(s.policy.model, mirrored[version]):", "if True:"),
    ),
    bug(
        "older-mirrors-gone-back-to",
        0,
        (HOLDERS, "for version in newest_first(tuple(mirrored)):", "for version in sorted(mirrored):"),
    ),
    bug(
        "back-to-mirrors-while-a-newer-manifest-is-written",
        0,
        (SAVING, "[version, *s.saved, *(s.manifests - s.distrusted)]", "[version, *s.saved]"),
    ),
    bug(
        "part-not-told-to-the-next-life",
        0,
        (MEMBER, "anew = epoch > self.epoch", "anew = False"),
    ),
    bug(
        "places-for-any-holders",
        0,
        (FORMING, "few.get(info.worker_id, len(few))", "info.worker_id not in {x.worker_id for x in sources}"),
    ),
    bug(
        "one-sample-is-another-speed",
        0,
        (SPEEDS, "if len(self.aside) == SAMPLES:", "if self.aside:"),
    ),
    bug(
        "times-read-as-those-of-another-worker",
        0,
        (
            "plan/timing.py",
            "    for worker, layers in _layers(world):\n        pass_s",
            "    for worker, layers in reversed([*_layers(world)]):\n        pass_s",
        ),
    ),
    bug(
        "nothing-is-ever-worth-it",
        0,
        (BALANCING, "    if b.lost_s < b.pause_s:\n", "    if True:\n"),
    ),
    bug(
        "any-gain-is-worth-a-change",
        0,
        ("plan/balance.py", "    if gain < at.min_gain:\n", "    if gain <= 0:\n"),
        script=113,
    ),
    bug(
        "gain-that-was-measured-ignored",
        0,
        (BALANCING, "(b.failed + 1 if 2 * gain_s < predicted_s else 0)", "0"),
        script=113,
    ),
    bug(
        "change-that-failed-never-forgotten",
        0,
        (BALANCING, "b.failed, b.quiet_s = b.failed - 1, 0.0", "pass"),
        script=119,
    ),
    bug(
        "pause-paid-with-the-step-before-it",
        0,
        (BALANCING, "    b.steps_s.clear()\n", ""),
        script=124,
    ),
    bug(
        "last-other-copy-evicted",
        0,
        (BALANCING, " and _has_copies(s, world, after)", ""),
        script=123,
    ),
    bug(
        "state-that-nobody-else-has-evicted",
        0,
        (BALANCING, " and _has_state(s, world, after)", ""),
        script=115,
    ),
    bug(
        "evicted-worker-forgotten-by-the-next-life",
        0,
        (CONTROLLER, "                balancing.replayed(s, s.layout, opened)\n", ""),
        script=126,
    ),
    bug(
        "change-that-is-void-made-in-part",
        0,
        (
            BALANCING,
            "    out = b.benched if wanted is None else b.benched | set(wanted.out)\n",
            "    out = b.benched if b.wanted is None else b.benched | set(b.wanted.out)\n",
        ),
        script=125,
    ),
    bug(
        "memory-ignored",
        0,
        ("plan/speeds.py", "        fits(i, j, stage.start, stage.stop)\n", "        True\n"),
        script=121,
    ),
    bug(
        "memory-ignored-where-work-moves",
        0,
        (BALANCING, "stage_fits=placing.room(s, layout)", "stage_fits=lambda *_: True"),
        (BALANCING, "_has_room(s, after) and ", ""),
        script=110,
    ),
    bug(
        "too-small-a-worker-used",
        0,
        ("control/placing.py", "    if isinstance(planned, Infeasible) or planned.fits:\n", "    if True:\n"),
        script=122,
    ),
    bug(
        "times-of-another-place-kept",
        0,
        (SPEEDS, "if known is not None and known.place == place:", "if known is not None:"),
        script=127,
    ),
    bug(
        "worker-that-comes-beside-a-request-forgotten",
        0,
        (FORMING, "    ends = s.pending & (Flags.PAUSE | Flags.STOP)\n", "    ends = s.pending\n"),
        script=116,
    ),
    bug(
        "worker-that-came-before-a-restart-forgotten",
        0,
        (CONTROLLER, "    s.arrived = True  # the life", "    # the life"),
        script=117,
    ),
    bug(
        "nodes-that-go-held-against-the-step",
        0,
        (REPAIR, "        suspect = not s.incident.blameless.issuperset(died)\n", "        suspect = True\n"),
        script=118,
    ),
)
