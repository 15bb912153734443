"""From workers that are here to a world that runs; and the requests that ride on its votes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from evenkeel.control import balancing, beginning, divergence, holders, looking, saving
from evenkeel.control import messages as m
from evenkeel.control.modes import Ended, Forming, Gathering, Running
from evenkeel.control.state import State, names
from evenkeel.core.ids import INITIAL, NodeId, Version
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.model import Shard
from evenkeel.core.vote import Flags
from evenkeel.core.world import Source, World
from evenkeel.plan.coverage import few_that_have_all, lost_slices
from evenkeel.plan.layout import Infeasible, Planned
from evenkeel.plan.mirrors import are_needed
from evenkeel.plan.timing import MEASURE_EVERY


def try_form(s: State, now: float) -> None:
    """Forms a world of those who are here, waits for more, or ends the run if its state is lost."""
    beginning.choose(s)
    if isinstance(s.mode, Ended):
        return
    sources = _sources(s)
    lost = _lost_slices(s, sources)
    if s.pending & Flags.STOP and _stopped(s):
        return
    if s.looks:
        _wait_for(s, looking.waits_for(s))
        return
    if beginning.is_lost(s):
        saving.restore(s, "the weights that the run begins from are lost")
        return
    if lost and s.committed not in s.saved:
        deaths = s.trouble.deaths(s.committed.step + 1)
        what = s.doubt or f"step {s.committed.step} is lost: nobody alive holds {names(lost)}"
        what = f"{deaths}; {what}" if deaths else what
        mirrored = holders.newest_mirrored(s)
        if mirrored is not None and not saving.is_newest(s, mirrored):
            mirrored = None
        if _waits_for_newer(s, mirrored, what):
            return
        if mirrored is not None:
            saving.go_back(s, mirrored, f"{what}; back to the mirrors of step {mirrored.step}")
            sources = _sources(s)
            lost = ()
        else:
            saving.restore(s, what)
            if isinstance(s.mode, Ended):
                return
            sources = ()
    until = gathers_until(s)
    if until is None or now >= until:
        planned = _plan(s, _candidates(s))
        if isinstance(planned, Infeasible):
            if s.pending & Flags.STOP:
                s.end("stopped", f"{s.stop_reason}; step {s.committed.step} is not saved: {planned.reason}")
            else:
                _wait_for(s, planned.reason)
            return
        usable = _with_a_place(planned, sources)
        if usable != sources:
            lost = _lost_slices(s, usable)
        if lost and s.committed not in (INITIAL, *s.saved):
            planned = _plan_for_holders(s, sources) or planned
            usable = _with_a_place(planned, sources)
            lost = _lost_slices(s, usable)
        if lost and s.committed not in (INITIAL, *s.saved):
            _wait_for_places(s, now)
            return
        from_store = s.committed in s.saved and (bool(lost) or s.committed == INITIAL)
        _form(s, now, planned, _sources(s) if from_store else usable, from_store)


def _waits_for_newer(s: State, mirrored: Version | None, what: str) -> bool:
    """Whether there may be a newer checkpoint than what the run would go back to: these mirrors, else the store."""
    if mirrored is None and saving.newer_is_coming(s):
        _wait_for(s, f"a checkpoint to be written, as {what}")
    elif looking.newer_than(s, mirrored or saving.newest(s)):
        _wait_for(s, looking.waits_for(s))
    else:
        return False
    return True


def _stopped(s: State) -> bool:
    """Ends the run if its state is saved or cannot be, or waits for that; else another step is to carry the request."""
    if s.policy.checkpoint_every is None or saving.is_saved(s):
        s.end("stopped", s.stop_reason)
    elif s.uploads:
        _wait_for(s, f"the checkpoint of step {max(v.step for v in s.uploads)} to be written")
    elif s.save_failures:
        s.end("stopped", f"{s.stop_reason}; step {s.committed.step} is not saved: {s.save_error}")
    else:
        return False
    return True


def _wait_for(s: State, what: str) -> None:
    assert isinstance(s.mode, Gathering)
    if what != s.mode.waiting_for:
        s.mode = replace(s.mode, waiting_for=what)
        s.say(m.Status("paused" if s.generation else "starting", what))
        s.log("waiting", reason=what)


def _wait_for_places(s: State, now: float) -> None:
    """There are enough workers for a layout, but not for one in which those have places who hold all of the state.

    More may come. As long as it would take to train again what going back costs they are waited for, then the run goes
    back: so it takes at most twice what was right. Without checkpoints there is nothing to go back to.
    """
    assert isinstance(s.mode, Gathering)
    what = "the layout for those that are here has no place for the only holders of some state"
    if s.mode.places_until is None and s.policy.checkpoint_every is not None:
        back = s.committed.step - saving.newest(s).step
        s.mode = replace(s.mode, places_until=now + max(s.policy.gather_s, back * s.liveness.step_s))
    if s.mode.places_until is None or now < s.mode.places_until or saving.newer_is_coming(s):
        _wait_for(s, f"workers: {what}")
        return
    if looking.newer_than(s, saving.newest(s)):
        _wait_for(s, looking.waits_for(s))
        return
    saving.restore(s, f"{what}, and nobody came")
    if not isinstance(s.mode, Ended):
        try_form(s, now)


def gathers_until(s: State) -> float | None:
    """Where everybody is new, at the start of a run or of its next life: how long the first wait for the others."""
    assert isinstance(s.mode, Gathering)
    missing = s.policy.wish.max_workers - len(s.roster.alive)
    return s.mode.since + s.policy.gather_s if missing > 0 and not s.holdings else None


def _plan(s: State, candidates: Sequence[WorkerInfo]) -> Planned | Infeasible:
    return balancing.plan(s, candidates)


def _plan_for_holders(s: State, sources: Sequence[Source]) -> Planned | None:
    """A layout with places for some who have all of the state between them.

    With TP groups over several nodes, however slow, if there is none within nodes: where each node has lost another TP
    rank, and there is no room for more workers, nobody who is waited for would ever come.
    """
    few = {worker: i for i, worker in enumerate(few_that_have_all(s.policy.model, sources))}
    first = sorted(_candidates(s), key=lambda info: few.get(info.worker_id, len(few)))
    for workers in (first, [replace(info, node_id=NodeId("any")) for info in first]):
        everybody = _plan(s, workers)
        if isinstance(everybody, Infeasible):
            continue
        # TP groups of before stay together, whatever the order: so nobody else is offered a place.
        places = len(everybody.layout.members)
        planned = _plan(s, workers[:places])
        if isinstance(planned, Planned) and not _lost_slices(s, _with_a_place(planned, sources)):
            more = len(workers) - places
            why = f"; {more} more have no place, as these hold all of the state" if more else ""
            return replace(planned, reason=f"{planned.reason}{why}")
    return None


def _with_a_place(planned: Planned, sources: Iterable[Source]) -> tuple[Source, ...]:
    """Only members move anything."""
    return tuple(source for source in sources if source.worker_id in planned.layout.places)


def _form(s: State, now: float, planned: Planned, sources: tuple[Source, ...], saved: bool) -> None:
    layout = planned.layout
    s.generation += 1
    infos = tuple(s.roster.alive[w] for w in layout.members)
    copies, why = s.policy.copies_in(layout, infos)
    mirrors = s.policy.mirror_every > 0 and are_needed(layout, copies)
    world = World(
        generation=s.generation,
        layout=layout,
        base=s.committed,
        members=infos,
        sources=sources,
        nodes=tuple((i.worker_id, i.node_id) for i in infos),
        last_step=s.policy.last_step,
        cause=_cause(s),
        reason=f"{planned.reason}; {why}" if why else planned.reason,
        saved=saved,
        checkpoint_every=s.policy.checkpoint_every,
        copies=copies,
        mirror_every=s.policy.mirror_every if mirrors else None,
        mirrored=holders.newest_mirrored(s) if mirrors else None,
        compare_every=s.policy.compare_every,
        measure_every=MEASURE_EVERY if s.policy.rebalance else None,
        bad_steps=s.trouble.bad_steps,
        max_bad_steps=s.policy.max_bad_steps,
    )
    spares = tuple(s.roster.alive[w] for w in sorted([w for w in s.roster.alive if w not in layout.places]))
    s.journal.append(m.WorldOpened(world, spares))
    s.layout = layout
    s.witness = None
    divergence.opened(s, world)
    beginning.opened(s, world)
    balancing.opened(s, world)
    s.pending &= ~Flags.PAUSE
    s.mode = Forming(world, set(layout.members))
    s.liveness.begin(now)
    if s.incident is not None:
        s.incident.formed(now)
    epoch = s.epoch
    s.say(*[m.Form(w, epoch, world) for w in layout.members])


def _cause(s: State) -> str:
    if s.incident is not None:
        return s.incident.cause
    return "start" if s.generation == 1 else "controller restarted"


def run(s: State, now: float, world: World) -> None:
    """Every member has joined: the generation trains."""
    s.mode = Running(world)
    balancing.joined(s, now - s.liveness.progress_at)
    s.liveness.begin(now)
    if s.incident is not None:
        s.incident.joined_at = now
    s.log("world_formed", world_size=world.size, cause=world.cause, reason=world.reason)
    s.say(m.Status("running"))
    if could_grow(s, world):
        s.pending |= Flags.PAUSE
    if s.pending:
        send_flags(s, world)


def could_grow(s: State, world: World) -> bool:
    """Whether the workers that are ready would make a larger world, with steps left to use it."""
    if world.size >= s.policy.wish.max_workers or len(s.roster.alive) <= world.size:
        return False
    if s.committed.step + 1 >= s.policy.last_step:
        return False
    planned = _plan(s, _candidates(s))
    return isinstance(planned, Planned) and len(planned.layout.members) > world.size


def grow(s: State) -> None:
    """Workers have become ready: the present world pauses if they would make a larger one, or ends anyway."""
    ends = s.pending & (Flags.PAUSE | Flags.STOP)
    if s.arrived and isinstance(s.mode, Running) and not ends and could_grow(s, s.mode.world):
        ask_flags(s, Flags.PAUSE)
    s.arrived = False


def ask_flags(s: State, flags: Flags) -> None:
    """Flags only request: they stay pending until a committed vote carries them (rule 16)."""
    s.pending |= flags
    if isinstance(s.mode, Running):
        send_flags(s, s.mode.world)


def send_flags(s: State, world: World) -> None:
    s.say(m.Request(world.leader, s.epoch, world.generation, s.pending))


def _sources(s: State) -> tuple[Source, ...]:
    """Who holds the committed version, by lineage: step and generation must both agree (rule 7)."""
    found: list[Source] = []
    shards: dict[int, tuple[Shard, ...]] = {}  # many workers may share one sequence object; then it is looked at once
    for w, holdings in sorted(s.holdings.items()):
        if id(holdings) not in shards:
            held = (held.shard for held in holdings if held.version == s.committed)
            shards[id(holdings)] = tuple(dict.fromkeys(held))  # a mirror may be of the committed version too
        for shard in shards[id(holdings)]:
            found.append(Source(w, shard))
    return tuple(found)


def _lost_slices(s: State, sources: Iterable[Source]) -> tuple[str, ...]:
    """What of the committed version none of these holds; the initial one everybody can make."""
    return () if s.committed == INITIAL else lost_slices(s.policy.model, (source.shard for source in sources))


def _candidates(s: State) -> list[WorkerInfo]:
    """Alive workers in order of preference: those of the last layout in their ranks, other holders, the rest."""
    alive = s.roster.alive
    ranked = s.layout.members if s.layout is not None else ()
    places = s.layout.places if s.layout is not None else {}
    holders = sorted([w for w in s.holdings if w not in places])
    rest = sorted([w for w in alive if w not in places and w not in s.holdings])
    return [alive[w] for w in (*ranked, *holders, *rest) if w in alive]
