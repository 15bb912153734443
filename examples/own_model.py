"""Trains a model of one's own: python examples/own_model.py

A model is a sequence of layers, each a function that makes an nn.Module of one tensor in and one out. evenkeel cuts the
sequence into stages, builds each layer where it is needed, and puts it elsewhere when a worker dies.
"""

import sys
from functools import partial

import torch
from torch import Tensor, nn

from evenkeel import ElasticTrainer
from evenkeel.engine.model import LayerSpec, Model


class Mixer(nn.Module):
    """Looks one more power of two back than the layer before."""

    def __init__(self, width: int, back: int) -> None:
        super().__init__()
        self.back = back
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(2 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (micro_batch, seq, width)
        y = self.norm(x)
        past = nn.functional.pad(y, (0, 0, self.back, 0))[:, : y.shape[1]]
        return x + self.mlp(torch.cat([past, y], dim=-1))


def build(config: dict[str, int]) -> Model:
    width = config.get("width", 96)
    blocks = [LayerSpec(f"mixer{i}", partial(Mixer, width, 2**i)) for i in range(config.get("layers", 5))]
    return Model(
        layers=(
            LayerSpec("embed", partial(nn.Embedding, 256, width), cost=0),
            *blocks,
            LayerSpec("head", partial(nn.Linear, width, 256), cost=0.3),
        )
    )


if __name__ == "__main__":
    trainer = ElasticTrainer(
        {
            "run": {"name": sys.argv[1] if len(sys.argv) > 1 else "own-model", "storage_path": "runs"},
            "data": {"name": "text", "path": "stdlib", "seq_len": 128},
            "train": {"steps": 60, "global_batch": 32, "micro_batch": 4, "learning_rate": 3e-3, "eval_every": 30},
            "scaling": {"workers": [1, 3], "spares": 0},
            "faults": [{"step": 30, "phase": "forward", "target": "rank:1", "kind": "kill"}],
        },
        model=build,
    )
    result = trainer.fit()
    print(f"loss {result.metrics['loss']:.4f} after step {result.metrics['step']}, in {result.path}")
