"""Ray's own configurations fill themselves in; what nobody said of them does not count."""

import pytest
from ray.train import FailureConfig, RunConfig
from ray_runs import merged

from evenkeel.trainer import ElasticTrainer

OWN = {"run": {"name": "mine", "storage_path": "/a"}}


@pytest.mark.parametrize(
    ("given", "name", "storage"),
    [
        (RunConfig(failure_config=FailureConfig(max_failures=3)), "mine", "/a"),
        (RunConfig(name="n"), "n", "/a"),
        (RunConfig(storage_path="/b"), "mine", "/b"),
        (RunConfig(name="ray_train_run-of-mine", storage_path="/b"), "ray_train_run-of-mine", "/b"),
    ],
)
def test_what_ray_fills_in_is_not_what_the_user_said(given: RunConfig, name: str, storage: str) -> None:
    made = ElasticTrainer(merged(OWN), run_config=given).config
    assert (made.run.name, made.run.storage_path) == (name, storage)
