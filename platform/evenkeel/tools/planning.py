"""`evenkeel plan`: how a model would be laid out over a cluster, how fast that would be, and why."""

import json
import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from evenkeel.config import Config, ConfigError, load_config
from evenkeel.plan.hardware import Cluster
from evenkeel.plan.layout import Infeasible
from evenkeel.plan.parallel import Limits, choose, uniform
from evenkeel.plan.plans import Plan
from evenkeel.plan.workload import Profile, Workload
from evenkeel.tools.clusters import MOST, read_cluster
from evenkeel.tools.devices import Catalogue, catalogue
from evenkeel.tools.plan_text import Answer, record, show

LIVE = "live"

UNSAID: dict[str, Any] = {
    "run": {"name": "plan"},
    "scaling": {"workers": [1, MOST]},
    "parallel": {"data": None, "pipeline": None},
    "faults": [],
}
"""In place of what the files say for a run, which has some devices and not others; the command line still wins."""


class Other(StrEnum):
    """What a plan may be compared with."""

    UNIFORM = "uniform"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be planned."""

    config: Config
    cluster: Cluster
    work: Workload
    limits: Limits
    profile: Profile | None

    @property
    def micro_batches(self) -> int:
        return self.config.train.micro_batches


ClusterSaid = Annotated[
    str,
    typer.Argument(
        metavar="CLUSTER",
        help='"8xH100+2x4xA100" (devices; nodes x devices of each), a YAML file, or "live": the Ray cluster that runs.',
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Wins over every file.")]
Files = Annotated[list[str] | None, typer.Option("--config", metavar="FILE", help="The run's YAML; later files win.")]
Tables = Annotated[str | None, typer.Option("--devices", metavar="FILE", help="YAML with tables of your own devices.")]
Measured = Annotated[str | None, typer.Option("--profile", metavar="RUN", help="What was measured there is believed.")]
Address = Annotated[str | None, typer.Option("--address", metavar="HOST:PORT", help="Of the running cluster.")]
Compare = Annotated[Other | None, typer.Option("--compare", help="Also equal pipelines with equal shares.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def plan(
    cluster: ClusterSaid,
    overrides: Overrides = None,
    config: Files = None,
    devices: Tables = None,
    profile: Measured = None,
    address: Address = None,
    compare: Compare = None,
    as_json: AsJson = False,
) -> None:
    """Lays a model out over a cluster, on paper: who computes what, how long a step takes, what bounds it, and why.

    Of the configuration count the model, one sample of the data, train.global_batch, micro_batch and precision,
    parallel.tensor and redundancy.copies. Nothing is started.
    """
    sys.path.append(str(Path.cwd()))  # where a user's own "module:function" lies
    known = catalogue(devices)
    asked = _asked(
        load_config(config or (), overrides or (), UNSAID), cluster, address, profile, known
    )
    with Console(stderr=True).status("planning"):
        answer = _answer(asked, compare)
    if as_json:
        typer.echo(json.dumps(record(answer)))
    else:
        show(answer, known, Console(highlight=False))


def _asked(config: Config, said: str, address: str | None, run: str | None, known: Catalogue) -> Asked:
    """Raises ConfigError for whatever of it is no good."""
    if address is not None and said != LIVE:
        raise ConfigError(f"is for the cluster {LIVE!r}, not for {said!r}", "--address")
    cluster = _live(config, address, known) if said == LIVE else read_cluster(said, known)
    from evenkeel.tools.work import measured, with_measured_bytes, work_of  # torch: not for what is refused already

    limits = Limits(tensor=config.parallel.tensor, copies=config.redundancy.copies or 1)
    counted = work_of(config, _device(cluster))
    if run is None:
        return Asked(config, cluster, counted.work, limits, None)
    profile = measured(config, counted.shape, run, cluster)
    return Asked(config, cluster, with_measured_bytes(counted.work, profile), limits, profile)


def _live(config: Config, address: str | None, known: Catalogue) -> Cluster:
    from evenkeel.tools.clusters_live import live_cluster

    return live_cluster(address, config.scaling.use_gpu, known)


def _answer(asked: Asked, compare: Other | None) -> Answer:
    """Raises ConfigError where there is no plan."""
    best = _planned(asked, asked.limits.tensor)
    if isinstance(best, Infeasible):
        raise ConfigError(best.reason + _smaller(asked, best))
    others = {} if asked.limits.tensor else {t: _planned(asked, t) for t in _degrees(asked) if t != best.tensor}
    even = None
    if compare is Other.UNIFORM:
        even = uniform(asked.cluster, asked.work, asked.micro_batches, limits=asked.limits, profile=asked.profile)
    return Answer(asked.config, asked.cluster, asked.work, asked.limits.memory, best, others, even)


def _smaller(asked: Asked, found: Infeasible) -> str:
    """The largest micro-batch, halved and halved again, with which it would fit on these devices; "" if none."""
    from evenkeel.tools.work import work_of

    train = asked.config.train
    size = train.micro_batch if found.short_bytes else 1
    while size % 2 == 0:
        size //= 2
        config = replace(asked.config, train=replace(train, micro_batch=size))
        less = replace(asked, config=config, work=work_of(config, _device(asked.cluster)).work, profile=None)
        if isinstance(_planned(less, asked.limits.tensor), Plan):
            return f"; it would fit here with train.micro_batch={size}"
    return ""


def _device(cluster: Cluster) -> str:
    """For which kernels the model is counted."""
    return "cpu" if all(kind.device.name == "cpu" for kind, _ in cluster.nodes) else "cuda"


def _planned(asked: Asked, tensor: int | None) -> Plan | Infeasible:
    limits = Limits(tensor, asked.limits.stages, asked.limits.copies, asked.limits.memory)
    try:
        return choose(asked.cluster, asked.work, asked.micro_batches, limits=limits, profile=asked.profile)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _degrees(asked: Asked) -> list[int]:
    """TP degrees that the planner would try."""
    most = max(kind.devices for kind, _ in asked.cluster.nodes)
    return [2**i for i in range(most.bit_length()) if asked.work.tensor_divides % 2**i == 0]
