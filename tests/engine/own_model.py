"""A model of one's own, as the README shows it: an MLP over digits or anything else with features and classes."""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn

from evenkeel.engine.model import LayerSpec, Model


def make_layer(inputs: int, outputs: int, last: bool) -> nn.Module:
    return nn.Linear(inputs, outputs) if last else nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU())


def build(config: Mapping[str, Any]) -> Model:
    widths = [64, *config.get("widths", [32, 32]), 10]
    pairs = list(pairwise(widths))
    return Model(
        layers=tuple(
            LayerSpec(f"layer{i}", partial(make_layer, a, b, last=i == len(pairs) - 1), cost=a * b)
            for i, (a, b) in enumerate(pairs)
        )
    )


def not_a_model(config: Mapping[str, Any]) -> object:
    return config
