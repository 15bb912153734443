"""Layers and links measured: on real modules and between real processes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Child, Line, children
from tiny import Tiny
from torch import Tensor, nn

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.data.dataset import TensorDataset
from evenkeel.engine.groups import GroupSet
from evenkeel.engine.job import Job, Settings
from evenkeel.engine.links import fit_link, measure_link
from evenkeel.engine.model import LayerSpec, Model
from evenkeel.engine.profiling import LayerProfile, alike, measure_layers
from evenkeel.engine.rendezvous import StoreServer
from evenkeel.engine.slowdown import Slowdown
from evenkeel.plan.hardware import Link

CPU = torch.device("cpu")
WIDTH, ROWS = 16, 4


class Heavy(nn.Module):
    """Multiplies by its square matrix again and again."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(x @ self.weight)
        return x


def job(*times: int, precision: str = "fp32") -> Job:
    inputs = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(1))
    layers = tuple(LayerSpec(f"layer{i}", partial(Heavy, n)) for i, n in enumerate(times))
    data = TensorDataset(inputs, torch.zeros(20, dtype=torch.int64))
    return Job(Model(layers), data, None, Settings(0, 10, 8, ROWS, precision=precision))


def test_a_device_that_is_made_slow_takes_so_many_times_as_long() -> None:
    plain = measure_layers(job(200, 200), CPU, 0.5)
    slow = measure_layers(job(200, 200), CPU, 0.5, slowdown=Slowdown(4.0))
    for one, other in zip(plain, slow, strict=True):
        assert 2.5 < other.time.total_s / one.time.total_s < 6
        assert one.kept_bytes == other.kept_bytes


def test_layers_that_are_built_alike_are_known_by_the_first() -> None:
    # The first takes the data, and the last one is followed by the loss; a plain attribute makes another layer.
    assert alike(job(9, 9, 9, 40, 9, 9)) == (0, 0, 0, 3, 0, 5)


def test_a_layer_of_so_many_times_the_work_takes_so_many_times_as_long() -> None:
    found = measure_layers(job(100, 400, 100, 400, 1), CPU, 1.0)
    assert len(found) == 5
    assert found[0].time == found[2].time and found[1].time == found[3].time
    for part in ("forward_s", "backward_s"):
        ratio = getattr(found[1].time, part) / getattr(found[0].time, part)
        assert 2.5 < ratio < 6, part


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("fp64", 8), ("bf16", 2)])
def test_kept_bytes_are_what_autograd_keeps(precision: str, width: int) -> None:
    first, middle, _ = measure_layers(job(1, 3, 1, precision=precision), CPU, 0.0)
    one = ROWS * WIDTH * width
    # Each product keeps its input, and each tanh its output, which is the next one's input.
    assert (first.kept_bytes, middle.kept_bytes) == (2 * one, 4 * one)


def test_a_layer_of_a_decoder_has_its_own_time_whatever_it_is_tied_to(tmp_path: Path) -> None:
    made = Tiny(tmp_path, tied=True, blocks=3, precision="bf16")(WorkerId("w"))
    found = measure_layers(made, CPU, 0.0)
    assert len(found) == made.shape.depth == 5
    assert all(layer.time.forward_s > 0 and layer.time.backward_s > 0 and layer.kept_bytes > 0 for layer in found[1:])
    assert found[1] == found[2] == found[3]


def test_own_layers_may_hand_on_whole_numbers_and_end_in_anything() -> None:
    class Rounds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0).long()

    layers = (LayerSpec("a", Rounds), LayerSpec("b", lambda: nn.Embedding(2, WIDTH)), LayerSpec("c", Sums))
    made = job(1)
    made.model = Model(layers, loss=lambda out, targets, _: ((out**2).sum(), targets.new_tensor(ROWS)))
    found = measure_layers(made, CPU, 0.0)
    assert found[0].kept_bytes == 0 and found[2].time.backward_s > 0


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).sum(-2)


# ---------------------------------------------------------------- between processes


def meet(line: Line, rank: int) -> GroupSet:
    """A generation of two, at each of them."""
    server = StoreServer()
    info = WorkerInfo(WorkerId(f"w{rank}"), NodeId("n"), rank, store_port=server.port)
    line.send(info)
    groups = GroupSet(1, info.worker_id, line.receive(), [], server)
    groups.connect()
    return groups


def introduce(both: list[Child]) -> None:
    infos = [child.receive() for child in both]
    for child in both:
        child.send(infos)


def links(line: Line, rank: int, budget_s: float) -> None:
    line.send(measure_link(meet(line, rank).world, CPU, budget_s))
    line.receive()


@pytest.mark.parametrize("budget_s", [2.0, 0.0])
def test_a_link_between_two_processes(budget_s: float) -> None:
    """Also where there is no time: two sizes of message are enough for a line, and none is too few."""
    with children(links, 2, budget_s) as both:
        introduce(both)
        link, none = (child.receive() for child in both)
    assert none is None
    assert 1e-6 < link.latency_s < 0.1 and 1e7 < link.bytes_per_s < 1e12


def layers_in_parallel(line: Line, rank: int, make: Any) -> None:
    line.send(measure_layers(make(WorkerId(f"w{rank}")), CPU, 0.5, meet(line, rank).world))
    line.receive()


def test_a_tp_group_agrees_on_the_times_of_its_slowest_and_keeps_less_each(tmp_path: Path) -> None:
    make = Tiny(tmp_path, blocks=2)
    with children(layers_in_parallel, 2, make) as both:
        introduce(both)
        ours, theirs = (child.receive() for child in both)
    alone: tuple[LayerProfile, ...] = measure_layers(make(WorkerId("w")), CPU, 0.0)
    assert [layer.time for layer in ours] == [layer.time for layer in theirs]
    assert all(two.kept_bytes < one.kept_bytes for two, one in zip(ours[1:-1], alone[1:-1], strict=True))


# ---------------------------------------------------------------- the line through the times


def dumb_fit(samples: list[tuple[int, float]]) -> tuple[float, float]:
    from scipy.optimize import least_squares

    def errors(x: Any) -> list[float]:
        return [(x[0] * 1e-5 + b / (x[1] * 1e9) - s) / s for b, s in samples]

    found = least_squares(errors, [1.0, 1.0], bounds=([0, 1e-6], [1e6, 1e6]), xtol=1e-15, ftol=1e-15, gtol=1e-15)
    return float(found.x[0]) * 1e-5, float(found.x[1]) * 1e9


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_line_is_that_of_a_general_solver(noise: float) -> None:
    sizes = (1 << 10, 1 << 16, 1 << 20, 1 << 26)
    samples = [(b, (5e-5 + b / 2e9) * (1 + noise * (-1) ** n)) for n, b in enumerate(sizes)]
    latency, bandwidth = dumb_fit(samples)
    found = fit_link(samples)
    assert found.latency_s == pytest.approx(latency, rel=1e-4)
    assert found.bytes_per_s == pytest.approx(bandwidth, rel=1e-4)


@pytest.mark.parametrize("samples", [[], [(1024, 1e-3)], [(1024, 1e-3)] * 3, [(1024, 0.0), (2048, 1e-3)]])
def test_a_line_needs_two_sizes_and_times_above_0(samples: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match="two sizes"):
        fit_link(samples)


def test_a_line_as_good_as_flat_is_none() -> None:
    flat = fit_link([(1 << 10, 1e-3), (1 << 26, 1e-3 * (1 + 1e-9))])
    assert flat.bytes_per_s == pytest.approx((1 << 26) / 5e-4)


def test_times_that_fit_no_line_still_give_a_link_that_can_be() -> None:
    falling = fit_link([(1000, 2e-3), (1 << 20, 1e-3)])
    assert falling == Link((1 << 20) / 5e-4, 2e-3)
    bent = fit_link([(1000, 1e-6), (1 << 20, 1e-2), (1 << 26, 1e-1)])
    assert bent.latency_s >= 0 and 0 < bent.bytes_per_s < 1e12
