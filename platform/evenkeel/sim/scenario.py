"""A random cluster, a random network and random faults, all from one seed."""

from dataclasses import dataclass, replace
from random import Random

from evenkeel.control.policy import Policy
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.plan.layout import Wish

WORKER_FAULTS = ("crash", "hang", "suspect", "exception", "slow", "cut")
MOMENTS = ("regroup", "reshard", "forward", "reduce", "vote", "commit", "settle")
REPAIR_MOMENTS = ("abort", "settle", "regroup", "reshard", "joined", "finish")
MODES = ("Forming", "Running", "Aborting", "Settling")


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and when.

    Attributes:
        kind: of WORKER_FAULTS, or "node" (all its workers crash), "controller", or "stop" (a request to stop the run).
        at: virtual seconds, or None to strike at a moment.
        moment: what the victim is doing when it strikes, of MOMENTS and REPAIR_MOMENTS; for the controller the mode
            that it enters.
        countdown: it strikes the so-manieth time that somebody is at that moment.
    """

    kind: str
    at: float | None = None
    moment: str = ""
    countdown: int = 1
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Network:
    """Between the controller and the workers; seconds and probabilities."""

    delay_s: float
    jitter_s: float
    late: float
    """How often a message takes up to a second longer."""
    duplicate: float
    lose: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run.

    Attributes:
        step_s, start_s: virtual seconds of a step's computation, and about those that a worker takes to start.
        start_fails, nonfinite: probabilities, per start and per worker's vote.
        straggle_s: up to so many seconds more for every other worker's start: it comes when the run is under way.
        lying: how often a collective that a death breaks looks complete to a member, with a part of the sums (rule 2).
    """

    seed: int
    policy: Policy
    nodes: int
    workers_per_node: int
    network: Network
    faults: tuple[Fault, ...]
    step_s: float
    start_s: float
    start_fails: float
    nonfinite: float
    straggle_s: float = 0.0
    lying: float = 0.0

    @property
    def calm(self) -> bool:
        """Whether no message is lost or much too late."""
        return not (self.network.lose or self.network.late)

    @property
    def quiet_after(self) -> float:
        """When no timed fault strikes any more."""
        return max((f.at + f.seconds for f in self.faults if f.at is not None), default=0.0)


def random_scenario(seed: int) -> Scenario:
    """The scenario of a seed; the same for ever, whatever the hash seed."""
    scenario = _basic(seed)
    # A source of its own, so that what is added here leaves the seeds found earlier as they were.
    rng = Random(f"{seed} more")
    if rng.random() < 0.5:
        scenario = _stirred(scenario, rng)
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
    )


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
