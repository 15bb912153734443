"""NCCL groups on one GPU: one rank is all that NCCL lets share a device."""

import os

import pytest
import torch

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.engine.collective import Op, Share
from evenkeel.engine.mesh import Mesh
from evenkeel.engine.nccl import NcclGroup
from evenkeel.engine.rendezvous import GroupAborted, StoreServer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

ME = WorkerInfo(WorkerId("w0"), NodeId("n0"), os.getpid(), device="cuda")


def test_reduces_aborts_and_is_built_again() -> None:
    server = StoreServer()
    for generation in range(1, 4):
        mesh = Mesh(generation, server)
        group = NcclGroup("world", 0, [ME], mesh)
        group.connect()
        tensor = torch.arange(1000.0, device="cuda")
        group.all_reduce(tensor, Op.MAX)
        group.all_reduce(tensor, async_op=True).wait()
        group.broadcast(tensor, 0)
        group.reduce_shares(tensor, [Share(0, 1000, (0,))])
        group.gather_shares(tensor, [Share(0, 1000, (0,))])
        assert torch.equal(tensor.cpu(), torch.arange(1000.0))
        mesh.abort()
        group.abort()
        with pytest.raises(GroupAborted):
            group.all_reduce(tensor)
        group.close()
        mesh.close()
        torch.cuda.synchronize()
    server.close()
