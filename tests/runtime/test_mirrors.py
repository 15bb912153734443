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
    truth = site.run(CONFIG, name="truth")
    assert truth.status == 0, truth.err
    fault = {"step": 11, "phase": "backward", "target": "rank:1", "kind": "kill"}
    done = site.run({**CONFIG, "faults": [fault]}, name="killed")
    assert done.status == 0, done.err
    (restored,) = done.events("restored")
    assert "back to the mirrors of step " in restored["reason"]
    base = restored["base"]
    assert 6 <= base < 11
    assert done.steps == [*range(1, 11), *range(base + 1, 17)]
    same = ("loss", "grad_norm", "lr", "tokens", "samples")
    lines = [[{key: line[key] for key in same} for line in run.directory.metrics()] for run in (truth, done)]
    assert lines[0] == lines[1]
    models = [run.directory.files.read("final/model.safetensors") for run in (truth, done)]
    assert models[0] is not None and models[0] == models[1]
    assert not done.directory.files.names("checkpoints/step-00000010")
