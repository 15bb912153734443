"""One pipeline on a real Ray: who dies is alone with its stage, but for its mirror."""

from typing import Any

from ray_runs import Site

CONFIG: dict[str, Any] = {
    "train": {"steps": 16},
    "scaling": {"workers": [2, 2], "spares": 1},
    "parallel": {"data": 1, "pipeline": 2},
    "redundancy": {"mirror_every": 3},
    "checkpoint": {"every_steps": 100},
}


def test_the_run_goes_back_to_its_mirrors_and_is_the_same(site: Site) -> None:
    """The steps that are run again are as they were. That the model in the end is that of a run without faults is shown
    by tests/engine/test_killed_saves.py, with the same workers and without Ray."""
    fault = {"step": 11, "phase": "backward", "target": "rank:1", "kind": "kill"}
    done = site.run({**CONFIG, "faults": [fault]})
    assert done.status == 0, done.err
    (restored,) = done.events("restored")
    assert "back to the mirrors of step " in restored["reason"]
    base = restored["base"]
    assert 6 <= base < 11
    assert done.steps == [*range(1, 11), *range(base + 1, 17)]
    same = ("step", "loss", "grad_norm", "lr", "tokens", "samples")
    lines = [{key: line[key] for key in same} for line in done.directory.follow("metrics").poll()]
    assert lines[base:10] == lines[10 : 20 - base]
    assert done.directory.files.read("final/model.safetensors")
    assert not done.directory.files.names("checkpoints/step-00000010")
