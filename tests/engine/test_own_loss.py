"""A loss of the user's own may weigh its samples: what it counts need not be whole numbers, nor above 1."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tiny import Tiny, difference

from evenkeel.control.policy import Policy
from evenkeel.engine.local import LocalRun
from evenkeel.engine.model import Model, model_shape
from evenkeel.plan.layout import Wish

WEIGHT = 2.0**-10


class Weighted(Tiny):
    """64 tokens a step, each with the same small weight, which is exact in any type."""

    def model(self) -> Model:
        model = super().model()
        return replace(model, loss=partial(_weighted, model.loss))


def _weighted(loss: Callable[..., Any], *arguments: Any) -> Any:
    total, tokens = loss(*arguments)
    return WEIGHT * total, WEIGHT * tokens


def test_weights_that_all_samples_have_change_nothing(tmp_path: Path) -> None:
    job = Weighted(tmp_path, steps=6)
    wish = Wish(data=2, pipeline=1, tensor=1, min_workers=2, max_workers=2)
    outcome = LocalRun(job, Policy(model_shape(job.model()), wish, 4, job.steps)).run()
    assert (outcome.status, outcome.error) == ("finished", "")
    assert difference(job.final(), Tiny(tmp_path, steps=6).reference()[1]) < 1e-10
