"""The options of `evenkeel simulate`."""

from pathlib import Path
from typing import Annotated

import typer

MODEL, FAILS, COST, OUT = "Model", "Failures", "Costs", "Output"
ASKED = "What to try: one value, or several such as 0,2,4,8"

Cluster = Annotated[
    str | None,
    typer.Argument(metavar="[CLUSTER]", help="Nodes at full strength x devices, such as 2048x8 or 8x8xH100+8x8xA100."),
]
Config = Annotated[
    list[Path] | None,
    typer.Option("--config", metavar="FILE", rich_help_panel=MODEL, help="A run's configuration; several merge."),
]
Params = Annotated[
    float | None, typer.Option("--params", rich_help_panel=MODEL, help="Parameters, such as 70e9, without --config.")
]
Layers = Annotated[int | None, typer.Option("--layers", rich_help_panel=MODEL, help="Layers of equal work.")]
Pipeline = Annotated[int | None, typer.Option("--pipeline", min=1, rich_help_panel=MODEL, help="Stages of a pipeline.")]
Tensor = Annotated[
    int | None, typer.Option("--tensor", min=1, rich_help_panel=MODEL, help="TP degree; without it as a node allows.")
]
MicroBatches = Annotated[
    int | None, typer.Option("--micro-batches", min=1, rich_help_panel=MODEL, help="Of a step; else 16 a pipeline.")
]
StepSeconds = Annotated[
    float | None, typer.Option("--step-seconds", rich_help_panel=MODEL, help="Of a step; else measured, or guessed.")
]
Tokens = Annotated[float | None, typer.Option("--tokens", rich_help_panel=MODEL, help="Of a step, such as 16e6.")]
MinNodes = Annotated[
    int | None, typer.Option("--min-nodes", min=1, rich_help_panel=MODEL, help="With fewer the run waits.")
]
Rate = Annotated[
    float, typer.Option("--failures-per-node-day", rich_help_panel=FAILS, help="Of each node, at any time.")
]
RepairHours = Annotated[
    float, typer.Option("--repair-hours", rich_help_panel=FAILS, help="Mean time until a node is back; inf: never.")
]
Rack = Annotated[int, typer.Option("--racks", rich_help_panel=FAILS, help="Nodes of a rack, which fail together.")]
RackShare = Annotated[
    float, typer.Option("--rack-share", rich_help_panel=FAILS, help="The part of the failures that takes a whole rack.")
]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", rich_help_panel=FAILS, help="Lines of milliseconds,add|remove,node."),
]
Measured = Annotated[
    str | None, typer.Option("--costs", metavar="RUN", rich_help_panel=COST, help="Measured in this run's directory.")
]
Given = Annotated[
    list[str] | None,
    typer.Option("--cost", metavar="KEY=SECONDS", rich_help_panel=COST, help="One cost, such as detect_s=5."),
]
Price = Annotated[float, typer.Option("--price", rich_help_panel=COST, help="Of a device for an hour.")]
Spares = Annotated[str, typer.Option("--spares", rich_help_panel=ASKED, help="Nodes that stand by, on top of CLUSTER.")]
Copies = Annotated[
    str | None, typer.Option("--copies", rich_help_panel=ASKED, help="Of the optimizer state; all: in every pipeline.")
]
MirrorEvery = Annotated[
    str | None, typer.Option("--mirror-every", rich_help_panel=ASKED, help="Steps between mirrors; 0: none.")
]
Interval = Annotated[
    str | None,
    typer.Option("--interval", rich_help_panel=ASKED, help="Steps between checkpoints; 0: the optimum; none."),
]
Days = Annotated[float | None, typer.Option("--days", help="To simulate; else 30, or as long as the trace.")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, max=10_000, help="How many; else 5; with a trace 1.")]
PerWorker = Annotated[
    bool,
    typer.Option("--per-worker", help="A message for each worker, not for each TP group: slower, the same result."),
]
Processes = Annotated[int | None, typer.Option("--processes", min=1, help="At the same time; else as many as cores.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", rich_help_panel=OUT, help="A .png or .svg.")]
AsJson = Annotated[bool, typer.Option("--json", rich_help_panel=OUT, help="Print one JSON object instead.")]
