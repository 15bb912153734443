"""A random cluster, a random network, a random store and random faults, all from one seed."""

from dataclasses import replace
from random import Random

from evenkeel.control.policy import Policy
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.plan.layout import Wish
from evenkeel.sim.draw_flips import with_flips
from evenkeel.sim.draw_lines import with_lines_lost
from evenkeel.sim.draw_paces import with_paces
from evenkeel.sim.draw_rare import with_rare
from evenkeel.sim.draw_reads import with_misreads
from evenkeel.sim.scenario import (
    MIRROR_MOMENTS,
    MODES,
    MOMENTS,
    REPAIR_MOMENTS,
    SAVING_MOMENTS,
    WORKER_FAULTS,
    Fault,
    Network,
    Scenario,
    Storage,
)


def random_scenario(seed: int) -> Scenario:
    """The scenario of a seed; the same for ever, whatever the hash seed."""
    # A source of its own for what is added, so that it leaves the seeds found earlier as they were.
    scenario = _with_store(_without_store(seed), Random(f"{seed} store"))
    scenario = _with_one_death(scenario, Random(f"{seed} one death"))
    scenario = _with_copies(scenario, Random(f"{seed} copies"))
    scenario = with_misreads(scenario, Random(f"{seed} reads"))
    scenario = _with_mirrors(scenario, Random(f"{seed} mirrors"))
    scenario = _with_one_kept(scenario, Random(f"{seed} one kept"))
    scenario = _with_few_left(scenario, Random(f"{seed} few left"))
    scenario = with_flips(scenario, Random(f"{seed} memory"))
    scenario = with_lines_lost(scenario, Random(f"{seed} lines"))
    return with_rare(with_paces(scenario, Random(f"{seed} even keel")), Random(f"{seed} rarely"))


def _without_store(seed: int) -> Scenario:
    scenario = _basic(seed)
    rng = Random(f"{seed} more")
    kind = rng.random()
    if kind < 0.4:
        return _stirred(scenario, rng)
    if kind < 0.7:
        return rng.choice(AMBUSHES)(scenario, rng)
    return scenario


def _stirred(scenario: Scenario, rng: Random) -> Scenario:
    """Workers that come late, requests to stop, faults in the middle of a repair, collectives that lie."""
    policy, run_s = scenario.policy, scenario.step_s * scenario.policy.last_step
    faults = scenario.faults
    if rng.random() < 0.3:
        at = scenario.start_s + rng.uniform(0.0, 1.5 * run_s) + rng.choice((0.0, 1.0))
        faults += (Fault("stop", at=at),)
    if rng.random() < 0.5:
        kind = rng.choice(("crash", "crash", "crash", "hang", "cut", "suspect"))
        moment = rng.choice(REPAIR_MOMENTS)
        faults += (Fault("crash", moment=rng.choice(MOMENTS), countdown=rng.randint(1, 20)),)
        faults += (Fault(kind, moment=moment, countdown=rng.randint(1, 8), seconds=rng.uniform(0.5, 20.0)),)
    if rng.random() < 0.4:
        # The controller dies at its first or second time in a mode that only a repair leads to.
        faults += (Fault("crash", moment=rng.choice(MOMENTS), countdown=rng.randint(1, 20)),)
        faults += (Fault("controller", moment=rng.choice(MODES), countdown=rng.choice((1, 6))),)
    late = rng.random() < 0.6
    return replace(
        scenario,
        policy=replace(policy, gather_s=rng.choice((0.2, 1.0))) if late else policy,
        faults=faults,
        straggle_s=rng.choice((1.0, 2.0 + run_s)) if late else 0.0,
        lying=rng.choice((0.0, 0.3)),
        skew=rng.choice((1.0, 10.0, 30.0)),
        network=replace(scenario.network, lose=rng.choice((0.0, 0.1))) if scenario.network.lose else scenario.network,
    )


# ---------------------------------------------------------------- faults that need each other, too rare by chance


def _only_the_leader_saw(scenario: Scenario, rng: Random) -> Scenario:
    """The leader commits, reports and dies, before anybody else sees the vote; its report may be late by a world."""
    step = rng.randint(1, 3)
    faults: tuple[Fault, ...] = (Fault("crash", moment="reported", countdown=step),)
    late = 0.0
    match rng.choice(("controller", "after the decision", "after the world")):
        case "controller":
            faults += (Fault("controller", moment="shown", countdown=5 * step),)
        case "after the decision":
            faults += (Fault("hang", moment="decision", seconds=rng.uniform(1.0, 20.0), at_once=True),)
            late = 1.0
        case _:
            late = 1.0
    # Late reports only: were all messages late, the decision would not overtake them. With such a skew it takes up to
    # seconds until those who do not lead have learnt of a vote.
    return replace(_pairs(scenario, rng), faults=faults, skew=rng.choice((100.0, 1000.0)), late_reports=late)


def _a_collective_lies(scenario: Scenario, rng: Random) -> Scenario:
    """A member dies on entering the reduction or the vote, which looks complete to others all the same."""
    moments = (rng.choice(("reduce", "vote")) for _ in range(rng.randint(1, 2)))
    faults = tuple(Fault("crash", moment=moment, countdown=rng.randint(1, 12), at_once=True) for moment in moments)
    if rng.random() < 0.6:
        faults += (Fault("exception", moment="commit", countdown=rng.randint(1, 12), at_once=True),)
    return replace(_pairs(scenario, rng), faults=faults, lying=1.0)


def _two_deaths_without_spares(scenario: Scenario, rng: Random) -> Scenario:
    """The second in the world that the first has led to, which leaves holders of the state without a place."""
    faults: tuple[Fault, ...] = (Fault("crash", moment="commit", countdown=rng.randint(1, 12)),)
    kind = rng.choice(("crash", "controller"))
    faults += (Fault("crash", moment=rng.choice(("joined", "regroup")), countdown=5),)
    if kind == "controller":
        faults += (Fault("controller", moment="Aborting", countdown=6),)
    wish = Wish(2, 1, 2, rng.randint(1, 2), 4)
    policy = replace(scenario.policy, wish=wish, micro_batches=max(4, scenario.policy.micro_batches), spares=0)
    workers_per_node = rng.choice((2, 4))
    return replace(
        scenario,
        policy=policy,
        faults=faults,
        nodes=4 // workers_per_node,
        workers_per_node=workers_per_node,
        start_s=3.0,
    )


def _controller_dies_at_a_pause(scenario: Scenario, rng: Random) -> Scenario:
    """A stop, or a worker that comes late, lets everybody park; the controller's next life must notice."""
    faults: tuple[Fault, ...] = (
        Fault("controller", moment=rng.choice(("Aborting", "Aborting", "shown")), countdown=1),
    )
    at = 1.5 * scenario.start_s + rng.uniform(0.1, 0.8) * scenario.step_s * scenario.policy.last_step
    if rng.random() < 0.7:
        faults += (Fault("stop", at=at),)
    policy = replace(scenario.policy, gather_s=0.2)
    return replace(scenario, policy=policy, faults=faults, straggle_s=rng.choice((0.0, 2.0)))


def _reports_come_in_heaps(scenario: Scenario, rng: Random) -> Scenario:
    """Late reports: several steps become visible at once, or together with the end, and the controller dies at that."""
    if rng.random() < 0.6:
        at = 1.5 * scenario.start_s + rng.uniform(0.3, 0.8)
        faults: tuple[Fault, ...] = (Fault("controller", moment="Aborting"), Fault("stop", at=at))
    else:
        faults = (Fault("controller", moment="Ended"),)
    policy = replace(scenario.policy, gather_s=0.2, last_step=20)
    return replace(scenario, policy=policy, faults=faults, step_s=0.1, late_reports=1.0)


def _pairs(scenario: Scenario, rng: Random) -> Scenario:
    """Few workers, each with a twin that holds the same."""
    wish = Wish(2, rng.choice((1, 2)), 1, 1, 4)
    policy = replace(scenario.policy, wish=wish, micro_batches=max(4, scenario.policy.micro_batches), spares=1)
    return replace(scenario, policy=policy, nodes=3, workers_per_node=2)


AMBUSHES = (
    _only_the_leader_saw,
    _only_the_leader_saw,
    _a_collective_lies,
    _two_deaths_without_spares,
    _controller_dies_at_a_pause,
    _reports_come_in_heaps,
    _reports_come_in_heaps,
)


# ---------------------------------------------------------------- checkpoints


def _with_store(scenario: Scenario, rng: Random) -> Scenario:
    """For a half of the runs a store, and for most of these faults that need it."""
    kind = rng.random()
    if kind < 0.5 or scenario.late_reports:
        return scenario
    if kind < 0.65:
        return _goes_back_twice(scenario, rng)
    if kind < 0.73:
        return _ends_slowly(scenario, rng)
    every, failures = rng.choice((0, 1, 1, 1, 2, 2, 3)), rng.choice((None, None, 1, 2))
    policy = replace(scenario.policy, checkpoint_every=every, max_checkpoint_failures=failures)
    storage = Storage(
        write_s=rng.choice((0.01, 0.05, 0.5)),
        commit_s=rng.choice((0.01, 0.01, 0.3)),
        part_fails=rng.choice((0.0, 0.0, 0.05)),
        commit_fails=rng.choice((0.0, 0.0, 0.2)),
        slow=rng.choice((0.0, 0.0, 0.1)),
        damaged=rng.choice((0.0, 0.0, 0.4, 0.9)),
        told_twice=rng.choice((0.0, 0.2)),
        told_late=rng.choice((0.0, 0.0, 0.2)),
        asked_back=rng.choice((0.0, 0.4)),
    )
    if rng.random() < 0.5:
        faults = tuple(_saving_fault(rng) for _ in range(rng.randint(0, 3)))
        return replace(scenario, policy=policy, storage=storage, faults=scenario.faults + faults)
    faults = tuple(_loss(rng) for _ in range(rng.randint(1, 3)))
    if rng.random() < 0.3:
        # Just when the life before has written down that the run goes back.
        faults += (Fault("controller", moment="loading", countdown=rng.choice((1, 6))),)
    late = rng.choice((scenario.late_reports, scenario.late_reports, 1.0))
    return replace(scenario, policy=policy, storage=storage, faults=scenario.faults + faults, late_reports=late)


def _with_one_death(scenario: Scenario, rng: Random) -> Scenario:
    """In some runs with checkpoints one worker dies when there is one, and the others hold all that is newer."""
    if scenario.storage is None or rng.random() < 0.7:
        return scenario
    wish = scenario.policy.wish
    countdown = rng.randint(2 * wish.max_workers, 5 * wish.max_workers)
    fault = Fault("crash", moment=rng.choice(("forward", "reduce", "commit")), countdown=countdown)
    policy = replace(scenario.policy, checkpoint_every=1, last_step=max(6, scenario.policy.last_step))
    return replace(scenario, policy=policy, faults=(*scenario.faults, fault))


def _with_copies(scenario: Scenario, rng: Random) -> Scenario:
    """In some runs fewer workers keep each part of the state than there are pipelines."""
    if rng.random() < 0.7:
        return scenario
    return replace(scenario, policy=replace(scenario.policy, copies=rng.choice((1, 2, 2))))


def _with_mirrors(scenario: Scenario, rng: Random) -> Scenario:
    """In some runs mirrors, most of them with one pipeline, so that a death takes everybody back to these."""
    if rng.random() < 0.7:
        return scenario
    policy = replace(scenario.policy, mirror_every=rng.choice((1, 1, 2, 3)))
    if rng.random() < 0.2:
        return replace(scenario, policy=policy)  # beside whatever layout and copies it has
    stages, tensor = rng.choice((2, 2, 3)), policy.wish.tensor
    size = stages * (tensor or 1)
    policy = replace(policy, wish=Wish(1, stages, tensor, size, size), last_step=max(7, policy.last_step))
    policy = replace(policy, model=_model(stages + 1, tied=rng.random() < 0.3), spares=rng.choice((1, 2)))
    moment = rng.choice((*MIRROR_MOMENTS, "forward", "reduce", "commit"))
    countdown = rng.randint(2 * size, 5 * size)
    faults = (Fault("crash", moment=moment, countdown=countdown, at_once=rng.random() < 0.5), *_more(rng))
    storage = scenario.storage if rng.random() < 0.5 else None
    if storage is None:
        policy = replace(policy, checkpoint_every=None)
    return replace(scenario, policy=policy, faults=faults, storage=storage, nodes=max(2, scenario.nodes))


def _with_one_kept(scenario: Scenario, rng: Random) -> Scenario:
    """In some runs with mirrors one checkpoint stays, and the manifest of the next may take as long as several steps.

    None is damaged: that is what who keeps one has no other for.
    """
    if not scenario.policy.mirror_every or scenario.late_reports or rng.random() < 0.6:
        return scenario
    policy = replace(scenario.policy, checkpoint_every=rng.choice((1, 2, 3)))
    storage = Storage(0.01, rng.choice((0.01, 0.3, 1.0)), slow=rng.choice((0.0, 0.0, 0.2)), keep=1)
    return replace(scenario, policy=policy, storage=storage)


def _with_few_left(scenario: Scenario, rng: Random) -> Scenario:
    """In some runs with mirrors one pipeline of TP groups loses some workers, and others come late.

    There are places for some of those who are left only, which should be such that hold all of the state.
    """
    if not scenario.policy.mirror_every or scenario.late_reports or rng.random() < 0.75:
        return scenario
    stages = rng.choice((2, 3, 3))
    size = 2 * stages
    policy = replace(scenario.policy, wish=Wish(1, stages, 2, 2, size), spares=0, last_step=9, gather_s=0.2)
    policy = replace(policy, mirror_every=rng.choice((1, 2)), model=_model(stages + 1, tied=False))
    first = rng.randint(4 * size, 6 * size)
    times = [first + i * rng.choice((1, 2, 2)) for i in range(rng.choice((1, 2, 3, 3)))]
    faults = tuple(Fault("crash", moment="commit", countdown=at, at_once=True) for at in times)
    if rng.random() < 0.6:
        policy = replace(policy, checkpoint_every=rng.choice((2, 3)))
        scenario = replace(scenario, storage=Storage(0.01, 0.01))
    nodes, per_node = (1, size) if rng.random() < 0.7 else (size, 2)
    scenario = replace(scenario, nodes=nodes, workers_per_node=per_node, start_s=10.0, start_fails=0.0)
    return replace(scenario, policy=policy, faults=faults)


def _more(rng: Random) -> tuple[Fault, ...]:
    """What else goes wrong when mirrors are gone back to, or before that."""
    kinds, moments = ("crash", "crash", "node", "controller", "hang"), (*MIRROR_MOMENTS, "commit", "forward", "joined")
    return tuple(
        Fault(
            kind,
            moment=rng.choice(MODES if kind == "controller" else moments),
            countdown=rng.randint(1, 16),
            seconds=rng.uniform(0.5, 5.0),
            at_once=rng.random() < 0.5,
        )
        for kind in rng.choices(kinds, k=rng.choice((0, 0, 1, 2)))
    )


def _goes_back_twice(scenario: Scenario, rng: Random) -> Scenario:
    """Everybody dies, and again when the run has gone back; or the controller does before it has a step to show."""
    faults = tuple(
        Fault("all", moment=moment, countdown=rng.randint(3, last))
        for moment, last in rng.sample((("manifest written", 6), ("manifest written", 6), ("commit", 20)), 2)
    )
    if rng.random() < 0.6:
        faults += (Fault("controller", moment="loading", countdown=1),)
    storage = Storage(0.01, 0.01, damaged=rng.choice((0.0, 0.5, 1.0, 1.0)), asked_back=rng.choice((0.0, 0.6)))
    policy = replace(scenario.policy, checkpoint_every=rng.choice((1, 1, 2)), last_step=9, gather_s=0.2)
    return replace(scenario, policy=policy, storage=storage, faults=faults, start_fails=0.0, nonfinite=0.0)


def _ends_slowly(scenario: Scenario, rng: Random) -> Scenario:
    """A writer dies, or its word is lost, when nothing is left to do but to wait for it."""
    faults: tuple[Fault, ...] = ()
    never = rng.choice((0.0, 0.0, 0.5))
    if not never:
        faults += (Fault("crash", moment="saving", countdown=rng.randint(1, 4)),)
    if rng.random() < 0.5:
        at = 1.5 * scenario.start_s + rng.uniform(0.2, 0.8) * scenario.step_s * scenario.policy.last_step
        faults += (Fault("stop", at=at),)
    policy = replace(scenario.policy, checkpoint_every=0)
    return replace(scenario, policy=policy, storage=Storage(0.5, 0.1, told_never=never), faults=faults)


def _loss(rng: Random) -> Fault:
    """Everybody dies, mostly when there is a checkpoint, or when they have begun to read one."""
    moments = (("manifest written", 3), ("manifest written", 4), ("part written", 12), ("loading", 6), ("commit", 25))
    moment, last = rng.choice(moments)
    return Fault("all", moment=moment, countdown=rng.randint(1, last), at_once=rng.random() < 0.3)


def _saving_fault(rng: Random) -> Fault:
    kind = rng.choice(("crash", "crash", "node", "controller"))
    moment = rng.choice(SAVING_MOMENTS)
    most = 3 if kind == "controller" or moment == "manifest written" else 12
    countdown = rng.randint(1, most)
    if kind == "controller":
        countdown = 5 * countdown - 4
    return Fault(kind, moment=moment, countdown=countdown, at_once=rng.random() < 0.5)


# ---------------------------------------------------------------- what chance makes


def _basic(seed: int) -> Scenario:
    rng = Random(seed)
    tensor = rng.choice((1, 1, 1, 2))
    data, pipeline = rng.choice(((1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3), (2, 3), (3, 2)))
    size = data * pipeline * tensor
    least = rng.randint(1, size)
    blocks = rng.randint(max(2, pipeline), pipeline + 3)
    # Tying makes a parameter's group span the stages.
    model = _model(blocks, tied=rng.random() < 0.3)
    free = rng.random() < 0.2
    wish = Wish(None if free else data, None if free else pipeline, tensor, least, size)
    policy = Policy(
        model=model,
        wish=wish,
        micro_batches=rng.randint(size, size + 6),
        last_step=rng.randint(3, 7),
        spares=rng.randint(0, 2),
    )
    per_node = tensor * rng.choice((1, 1, 2, 4))
    network = Network(
        delay_s=0.001,
        jitter_s=rng.choice((0.001, 0.02)),
        late=rng.choice((0.0, 0.0, 0.05)),
        duplicate=rng.choice((0.0, 0.1)),
        lose=rng.choice((0.0, 0.0, 0.0, 0.02)),
    )
    step_s = rng.choice((0.1, 0.3))
    faults = tuple(_fault(rng, step_s * policy.last_step) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 6))))
    return Scenario(
        seed=seed,
        policy=policy,
        nodes=max(1, -(-(size + policy.spares) // per_node)) + rng.randint(0, 1),
        workers_per_node=per_node,
        network=network,
        faults=faults,
        step_s=step_s,
        start_s=rng.choice((0.5, 3.0)),
        start_fails=rng.choice((0.0, 0.0, 0.0, 0.2)),
        nonfinite=rng.choice((0.0, 0.0, 0.1)),
    )


def _fault(rng: Random, run_s: float) -> Fault:
    kind = rng.choice((*WORKER_FAULTS, "crash", "crash", "crash", "crash", "node", "controller", "controller"))
    seconds = rng.uniform(0.5, 20.0)
    if rng.random() < 0.4:
        return Fault(kind, at=rng.uniform(0.5, 4.0 + run_s), seconds=seconds)
    moments = MODES if kind == "controller" else MOMENTS
    return Fault(kind, moment=rng.choice(moments), countdown=rng.randint(1, 25), seconds=seconds)


def _model(blocks: int, tied: bool) -> ModelShape:
    layers = [LayerShape("embed", (ParamShape("embed.weight", (4, 2), 0),), cost=0.0)]
    for i in range(blocks):
        params = (ParamShape(f"block{i}.weight", (4, 4), i % 2), ParamShape(f"block{i}.norm", (4,)))
        layers.append(LayerShape(f"block{i}", params))
    head = () if tied else (ParamShape("head.weight", (4, 2), 0),)
    layers.append(LayerShape("head", head, cost=0.5, ties=("embed.weight",) if tied else ()))
    return ModelShape(tuple(layers), tensor_divides=4)
