"""What the steps of one generation need on one worker: its place, its groups, and what it computes there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from evenkeel.control.messages import Event
from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, SyncGroup, sync_groups
from evenkeel.core.model import ModelShape
from evenkeel.core.world import World
from evenkeel.engine.faults import Faults
from evenkeel.engine.groups import Group, GroupSet, GroupSpec
from evenkeel.engine.holdings import Memory
from evenkeel.engine.job import Dataset, Job
from evenkeel.engine.meter import Meter
from evenkeel.engine.mirror import Mirrors
from evenkeel.engine.model import loss_group
from evenkeel.engine.pipeline import Boundary, Executor
from evenkeel.engine.progress import Progress
from evenkeel.engine.saver import Saver
from evenkeel.engine.seat import Seat
from evenkeel.engine.slowdown import Slowdown
from evenkeel.engine.state import PRECISIONS
from evenkeel.engine.sums import GradientSums
from evenkeel.plan.comparison import compared
from evenkeel.plan.copies import copies_of
from evenkeel.plan.samples import sample_indices
from evenkeel.plan.schedule import Action, Kind, one_f_one_b


@dataclass(frozen=True, slots=True)
class Sums:
    """Summed loss and tokens of what this worker counts."""

    loss: float = 0.0
    tokens: float = 0.0


class Training:
    """One generation on one worker.

    Attributes:
        copies: who owns what of the state.
        compared: what of it several own.
        sums: of the gradients.
        meter: of what its passes take.
        send: takes events for the controller; does not block.
    """

    def __init__(
        self,
        job: Job,
        world: World,
        me: WorkerId,
        memory: Memory,
        groups: GroupSet,
        seat: Seat,
        progress: Progress,
        faults: Faults,
        saver: Saver,
        mirrors: Mirrors,
        slowdown: Slowdown,
        send: Callable[[Event], None],
    ) -> None:
        self.job, self.settings = job, job.settings
        self.world, self.me, self.place = world, me, world.layout.places[me]
        self.memory, self.groups = memory, groups
        self.seat, self.progress, self.faults, self.send = seat, progress, faults, send
        self.saver, self.mirrors, self._slowdown = saver, mirrors, slowdown
        self._pipeline = world.layout.pipelines[self.place.pipeline]
        tensor = groups[tensor_name(self.place.pipeline, self.place.stage)] if world.layout.tensor > 1 else None
        watched = None if tensor is None else _Watched(tensor, progress)
        memory.state.set_group(watched)
        self._loss_group = loss_group(job.model, watched)
        self.copies = copies_of(world, job.shape)
        self.compared = compared(world, self.copies)
        self.sums = GradientSums(
            memory.state,
            world.layout,
            self.copies,
            me,
            lambda g: groups[sum_name(g)],
            tensor,
            seat,
            progress,
        )
        stage = self._pipeline.stages[self.place.stage]
        layers = (stage.start, stage.stop)
        self.meter = Meter(me, layers, self.place.tp == 0, memory.device, groups)
        self._train = _Passes(self, job.train, self._training_samples)
        actions = one_f_one_b(self.place.stage, self._depth, self._pipeline.share)
        self._executor = self._make_executor(self._train, actions)
        self._eval = None if job.eval is None else _Passes(self, job.eval, self._evaluation_samples)
        self._evaluator = None if self._eval is None else self._make_executor(self._eval, self._evaluation_actions())

    def begin(self, step: int) -> None:
        self.progress.step = step

    def compute(self) -> Sums:
        """Adds the gradients of this pipeline's share of the step to the buffers.

        Returns:
            Loss and tokens of the share, on the first TP rank of the last stage; nothing elsewhere.
        """
        self._train.begin()
        step = self.progress.step
        measured = self.world.measure_every is not None and step > self.world.base.step + 1
        self.meter.begin(measured, detailed=self.seat.measures(step))
        loss = self._executor.run()
        self.meter.end()
        return self._counted(loss, self._train)

    def evaluate(self) -> Sums:
        """Loss and tokens of this pipeline's share of the validation, counted by the same worker as in `compute`."""
        if self._evaluator is None or self._eval is None:
            return Sums()
        self._eval.begin()
        self.memory.state.stage.eval()
        try:
            return self._counted(self._evaluator.evaluate(), self._eval)
        finally:
            self.memory.state.stage.train()

    # ------------------------------------------------------------ parts

    @property
    def _depth(self) -> int:
        return len(self._pipeline.stages)

    def _make_executor(self, passes: "_Passes", actions: Sequence[Action]) -> Executor:
        stage = self._pipeline.stages[self.place.stage]
        entries, device = self.job.boundaries, self.memory.device
        return Executor(
            self.place.stage,
            self._depth,
            actions,
            passes,
            self.groups[pipeline_name(self.place.pipeline, self.place.tp)] if self._depth > 1 else None,
            Boundary(entries[stage.start], device),
            Boundary(entries[stage.stop], device) if stage.stop < len(entries) else None,
            self.progress,
            self.faults,
            before_last=self.sums.overlap,
            meter=self.meter,
            slowdown=self._slowdown,
        )

    def _counted(self, loss: Tensor, passes: "_Passes") -> Sums:
        if self.place.stage < self._depth - 1 or self.place.tp > 0:
            return Sums()
        return Sums(float(loss), float(passes.tokens))

    def _training_samples(self, micro: int) -> tuple[int, Sequence[int]]:
        whole = self._pipeline.micro_start + micro
        return whole, sample_indices(
            self.settings.seed,
            self.progress.step,
            whole,
            micro_batch=self.settings.micro_batch,
            global_batch=self.settings.global_batch,
            dataset_size=len(self.job.train),
        )

    def _evaluation_samples(self, micro: int) -> tuple[int, Sequence[int]]:
        whole = self._evaluation_share().start + micro
        size = self.settings.micro_batch
        return whole, range(whole * size, (whole + 1) * size)

    def _evaluation_actions(self) -> tuple[Action, ...]:
        return tuple(Action(Kind.FORWARD, micro) for micro in range(len(self._evaluation_share())))

    def _evaluation_share(self) -> range:
        """Validation micro-batches of this pipeline."""
        assert self.job.eval is not None
        micros = min(self.settings.eval_batches, len(self.job.eval) // self.settings.micro_batch)
        index, pipelines = self.place.pipeline, len(self.world.layout.pipelines)
        return range(micros * index // pipelines, micros * (index + 1) // pipelines)


class _Passes:
    """What the stage computes of a micro-batch, forward; the executor does the rest.

    Args:
        samples: from a micro-batch of the pipeline's share to its index in the global batch, and its samples.

    Attributes:
        tokens: in the losses since `begin`.
    """

    def __init__(self, training: Training, data: Dataset, samples: Callable[[int], tuple[int, Sequence[int]]]) -> None:
        self._data, self._samples = data, samples
        self._state, self._key = training.memory.state, training.memory.key
        self._progress, self._ready = training.progress, training.sums.ready
        self._loss, self._group = training.job.model.loss, training._loss_group
        self._device = training.memory.device
        self._dtype = PRECISIONS[training.settings.precision]
        self._last = self._state.shard.stop == training.job.shape.depth
        first = self._state.shard.start
        self._whole = self._last and first == 0
        self._job, self._meter = training.job, training.meter
        self._end = partial(_mark, self._progress, self._meter, -1)
        layers = range(first, first + len(self._state.stage.layers))
        self._marks = [partial(_mark, self._progress, self._meter, layer) for layer in layers]
        self.tokens: Tensor | int = 0

    def begin(self) -> None:
        self.tokens = 0

    def forward(self, micro: int, hidden: Tensor | None) -> Tensor:
        whole, indices = self._samples(micro)
        self._key.at(self._progress.step, whole)
        inputs, targets = self._data.get(indices) if hidden is None or self._last else (None, None)
        x = self._layers(self._first(inputs) if hidden is None else hidden)
        if self._last:
            x, tokens = self._loss(x, self._moved(targets), self._group)
            self.tokens = self.tokens + tokens
            if x.requires_grad:
                x.register_hook(self._marks[-1])  # type: ignore[no-untyped-call]  # the loss counts with the last layer
        self._end()
        return x

    def _layers(self, x: Tensor) -> Tensor:
        for layer, mark in zip(self._state.stage.layers, self._marks, strict=True):
            mark()
            self._ready(self._progress.layer)
            x = layer(x)
            if x.requires_grad:
                x.register_hook(mark)  # type: ignore[no-untyped-call]  # its gradient is there: the layer's backward pass begins
        return x

    def _first(self, inputs: Tensor | None) -> Tensor:
        """What enters the first stage. Raises ValueError for a shape that the stages after it do not expect."""
        assert inputs is not None
        expected = self._job.boundaries[0].shape
        if not self._whole and inputs.shape != expected:
            raise ValueError(
                f"a micro-batch has shape {tuple(inputs.shape)}, one of sample 0 has {expected}: with more than one "
                "stage all must be alike; pad them to one length, or set parallel.pipeline: 1"
            )
        if self._meter.on:
            self._meter.work = inputs.numel() / self._job.usual_work
        return self._moved(inputs)

    def _moved(self, samples: Tensor | None) -> Tensor:
        assert samples is not None
        dtype = self._dtype if samples.is_floating_point() else None
        return samples.to(self._device, dtype, non_blocking=True)


class _Watched:
    """The TP group as layers see it: whoever waits in there is seen to wait."""

    def __init__(self, group: Group, progress: Progress) -> None:
        self._group, self._progress = group, progress
        self.rank, self.size = group.rank, group.size

    def all_reduce(self, tensor: Tensor) -> None:
        with self._progress.communicating():
            self._group.all_reduce(tensor)


def _mark(progress: Progress, meter: Meter, layer: int, _: Tensor | None = None) -> None:
    progress.layer = layer
    meter.at(layer)


def group_specs(layout: Layout, shape: ModelShape) -> list[GroupSpec]:
    """All groups of a layout but the one of everybody, in one order for all members.

    The columns of the pipelines (stages of one TP rank, for activations), the TP groups, and those that sum gradients.
    """
    specs: list[GroupSpec] = []
    for i, pipeline in enumerate(layout.pipelines):
        if len(pipeline.stages) > 1:
            for tp in range(layout.tensor):
                specs.append(GroupSpec(pipeline_name(i, tp), tuple(s.members[tp] for s in pipeline.stages)))
        if layout.tensor > 1:
            specs += [GroupSpec(tensor_name(i, j), s.members) for j, s in enumerate(pipeline.stages)]
    summing = [group for group in sync_groups(layout, shape) if len(group.members) > 1]
    return specs + [GroupSpec(sum_name(group), group.members) for group in summing]


def pipeline_name(pipeline: int, tp: int) -> str:
    return f"pipeline{pipeline}.tp{tp}"


def tensor_name(pipeline: int, stage: int) -> str:
    return f"tensor{pipeline}.{stage}"


def sum_name(group: SyncGroup) -> str:
    return f"sum.{group.name}"
