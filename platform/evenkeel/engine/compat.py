"""The private APIs of torch that the engine leans on, each with the version on which it was checked."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

# ---------------------------------------------------------------- process groups

_NCCL_SETTINGS = {
    # Without these a watchdog thread of torch ends the process when a communicator fails. We have our own clock.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}


def nccl_backend(store: Store, rank: int, size: int, device: torch.device) -> Any:
    """A connected ProcessGroupNCCL outside torch's registry of groups. Blocks until all ranks have come.

    `ProcessGroupNCCL` and `eager_connect_single_device` are private; checked against the type stubs of torch 2.13 but
    never run. By PyTorch's source it uses the store just once: rank 0 sets the communicator's id, the others get it.
    """
    from torch._C import _distributed_c10d as c10d

    os.environ.update(_NCCL_SETTINGS)
    native: Any = getattr(c10d, "ProcessGroupNCCL")  # noqa: B009 - absent from builds of torch without CUDA
    options = native.Options()
    options._timeout = timedelta(days=7)
    backend = native(store, rank, size, options)
    backend.eager_connect_single_device(device)
    return backend


def reduce_options(op: str) -> Any:
    """AllreduceOptions; `op` is "sum", "max" or "min"."""
    options = dist.AllreduceOptions()
    options.reduceOp = getattr(dist.ReduceOp, op.upper())
    return options


# ---------------------------------------------------------------- autograd


def in_backward() -> bool:
    """Whether this thread is within a backward pass. `_current_graph_task_id` is private; checked on torch 2.13."""
    return bool(torch._C._current_graph_task_id() != -1)
