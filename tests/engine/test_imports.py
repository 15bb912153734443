"""Training that begins from an import, with real files, workers and controller: as the same state trained plainly."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from lives import Life, finished, prepared_in, values_in
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from evenkeel.config import ConfigError, load_config, to_yaml
from evenkeel.core.ids import INITIAL, Version, WorkerId
from evenkeel.engine.model import initial_values
from evenkeel.runtime.origin import check_fit, version_to_resume
from evenkeel.runtime.prepare import Prepared
from evenkeel.store.checkpoint_reader import Checkpoint
from evenkeel.store.checkpoints import Checkpoints
from evenkeel.store.files import open_files
from evenkeel.tools import importing, plain
from evenkeel.trainer import run

STEPS = 6


@dataclass(frozen=True)
class Given:
    """An `init` of a model: these values, whatever the seed."""

    values: Mapping[str, Tensor]

    def __call__(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(self.values[name])


def shapes_of(prepared: Prepared) -> dict[str, tuple[int, ...]]:
    return {p.name: p.shape for layer in prepared.spec.policy.model.layers for p in layer.params}


def foreign_weights(prepared: Prepared, folder: Path) -> dict[str, Tensor]:
    """Of this model, but of no seed of a run's; as a file that something else could have written."""
    model = prepared.maker(WorkerId("reader")).model
    weights = {name: value.clone() for name, value in initial_values(model, 99, shapes_of(prepared))}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    return weights


def import_into(prepared: Prepared, folder: Path, unchecked: bool = False) -> Checkpoint:
    directory = prepared.directory
    if not unchecked:
        directory.write_config(to_yaml(prepared.config, prepared.fingerprint))
    source = plain.source(open_files(str(folder)), False)
    expected = None if unchecked else importing.expected_of(directory)
    return importing.import_source(directory, source, None, expected, lambda _: None).checkpoint


def final(prepared: Prepared) -> dict[str, Tensor]:
    return load_tensors(prepared.directory.files.read("final/model.safetensors") or b"")


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- they are trained


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_imported_weights_are_trained_as_if_the_model_had_begun_with_them(precision: str, tmp_path: Path) -> None:
    prepared = prepared_in(tmp_path, "imported", STEPS, precision)
    weights = foreign_weights(prepared, tmp_path / "weights")
    model = replace(prepared.maker(WorkerId("reader")).model, init=Given(weights))
    truth = prepared_in(tmp_path, "truth", STEPS, precision, model)
    assert import_into(prepared, tmp_path / "weights").manifest.version == INITIAL
    outcome, expected = finished(Life(prepared)), finished(Life(truth))
    assert [world.saved for world in outcome.worlds] == [True]
    assert outcome.losses == expected.losses
    assert same(final(prepared), final(truth))
    unlike = finished(Life(prepared_in(tmp_path, "seed", 1, precision)))
    assert unlike.losses[0] != outcome.losses[0], "the weights that the seed gives would not show"


def test_an_import_with_moments_goes_on_as_if_it_had_not_moved(tmp_path: Path) -> None:
    """Schedule, data and dropouts, too; and so does a life that is asked to begin anew, though newer ones were kept."""
    truth = prepared_in(tmp_path, "truth", STEPS)
    expected = finished(Life(truth))
    old, moved = (prepared_in(tmp_path, name, STEPS) for name in ("old", "moved"))
    finished(Life(old, last_step=2))
    second = Checkpoints(old.directory.files).open(2)
    assert second is not None
    plain.export(second, open_files(str(tmp_path / "exported")), False, lambda _: None)
    assert import_into(moved, tmp_path / "exported").manifest.version == Version(2, 0)
    outcome = finished(Life(moved))
    assert outcome.losses == expected.losses[2:] and same(final(moved), final(truth))
    assert Checkpoints(moved.directory.files).steps() == [2, 4, 6]
    anew = finished(Life(moved, outcome, resume="never"))
    assert [(world.base, world.saved) for world in anew.worlds] == [(Version(2, 0), True)]
    assert anew.losses == outcome.losses


def test_begun_anew_it_is_from_the_imported_weights(tmp_path: Path) -> None:
    prepared = prepared_in(tmp_path, "run", STEPS)
    foreign_weights(prepared, tmp_path / "weights")
    import_into(prepared, tmp_path / "weights")
    outcome = finished(Life(prepared))
    assert Checkpoints(prepared.directory.files).steps() == [0, 4, 6]
    anew = finished(Life(prepared, outcome, resume="never"))
    assert [(world.base, world.saved) for world in anew.worlds] == [(INITIAL, True)]
    assert anew.losses == outcome.losses


# ---------------------------------------------------------------- or the run ends


def test_weights_of_which_one_stage_cannot_be_read_are_not_mixed_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "PART_BYTES", 1)  # so that the other stage is whole
    prepared = prepared_in(tmp_path, "run", STEPS)
    foreign_weights(prepared, tmp_path / "weights")
    found = import_into(prepared, tmp_path / "weights")
    *_, last = shapes_of(prepared)
    part = Path(found.url) / found.manifest.tensor(f"param/{last}").slices[0].file
    data = bytearray(part.read_bytes())
    data[-3] ^= 1
    part.write_bytes(data)
    outcome = Life(prepared).run()
    assert outcome.status == "failed" and outcome.metrics == []
    assert f"no checkpoint can be read: {part}: bytes 0 to" in outcome.error
    assert "import it again into the directory of a new run" in outcome.error
    assert not (Path(prepared.directory.url) / "final").exists()
    # Submitted again, with all of it gone by now.
    prepared.directory.files.remove_folder("checkpoints")
    again = Life(prepared, outcome).run()
    assert (again.status, again.metrics) == ("failed", [])
    assert "the checkpoint of step 0 that was put here to begin from is gone" in again.error
    with pytest.raises(ConfigError, match=r"^--resume: the checkpoint of step 0, which .* began from, is damaged or"):
        version_to_resume(prepared.directory, "never")


@pytest.mark.parametrize("lost", ["part", "manifest"])
def test_a_new_run_does_not_begin_beside_an_import_that_is_not_whole(lost: str, tmp_path: Path) -> None:
    prepared = prepared_in(tmp_path, "run", STEPS)
    foreign_weights(prepared, tmp_path / "weights")
    found = import_into(prepared, tmp_path / "weights")
    missing = Path(found.url) / ("manifest.json" if lost == "manifest" else found.manifest.files[0].name)
    missing.unlink()
    for resume in ("auto", "never"):
        outcome = Life(prepared, resume=resume).run()
        assert outcome.status == "failed" and outcome.worlds == []
        assert f"what was put here to begin from cannot be read: {missing}: missing" in outcome.error


def test_begin_anew_is_from_the_seed_where_nothing_was_imported(tmp_path: Path) -> None:
    prepared = prepared_in(tmp_path, "run", 2)
    assert version_to_resume(prepared.directory, "never") is None
    outcome = finished(Life(prepared))
    anew = Life(prepared, outcome, resume="never")
    assert version_to_resume(prepared.directory, "never") == INITIAL
    outcome_anew = finished(anew)
    assert [(world.base, world.saved) for world in outcome_anew.worlds] == [(INITIAL, False)]
    assert outcome_anew.losses == outcome.losses


# ---------------------------------------------------------------- of another model


MISFITS = {
    "another width": ({"d_ff": 16}, r"{not_that}: 'param/\S+' has shape \[16, 24\] there and \[16, 16\] in the mod"),
    "fewer layers": ({"layers": 1}, r"{not_that}: 'param/blocks\.1\.\S+' of shape \[16, 16\] is not in the model; "),
    "more layers": ({"layers": 3}, r"{not_that}: 'param/blocks\.2\.\S+' of shape \[16, 16\] is missing there; "),
    "another type": (
        {"precision": "fp64"},
        r"train\.precision: is 'fp64', which keeps F64, but 'exp_avg/\S+' in {url} is F32; import it with this run's ",
    ),
}


@pytest.mark.parametrize(("other", "says"), MISFITS.values(), ids=MISFITS)
def test_a_checkpoint_of_another_model_is_bad_input(
    other: dict[str, int | str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign_weights(prepared_in(tmp_path, "its", STEPS), tmp_path / "weights")
    values = values_in(tmp_path, "run", STEPS, **other)
    prepared = prepared_in(tmp_path, "run", STEPS, **other)
    found = import_into(prepared, tmp_path / "weights", unchecked=True)
    before = sorted(path.name for path in Path(prepared.directory.url).rglob("*"))
    assert [run(load_config([], values=values), dry_run=dry) for dry in (True, False)] == [2, 2]
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 2
    url = re.escape(found.url)
    says = says.format(url=url, not_that=rf"model\.name: is not that of {url}")
    assert all(re.match(rf"evenkeel: Python: {says}", line) for line in said.err.splitlines()), said.err
    assert sorted(path.name for path in Path(prepared.directory.url).rglob("*")) == before


def test_a_given_model_is_blamed_where_one_is_given(tmp_path: Path) -> None:
    its = prepared_in(tmp_path, "its", STEPS)
    foreign_weights(its, tmp_path / "weights")
    smaller = prepared_in(tmp_path, "smaller", STEPS, d_ff=16).maker(WorkerId("reader")).model
    prepared = prepared_in(tmp_path, "run", STEPS, given=smaller)
    import_into(prepared, tmp_path / "weights", unchecked=True)
    with pytest.raises(ConfigError, match=r"^Python: model: is not that of "):
        check_fit(prepared)
    check_fit(its)


def test_no_worker_takes_a_box_of_a_larger_tensor(tmp_path: Path) -> None:
    """Where it gets past that check, such as with another code on the workers' machines."""
    foreign_weights(prepared_in(tmp_path, "its", STEPS), tmp_path / "weights")
    prepared = prepared_in(tmp_path, "run", STEPS, d_ff=16)
    found = import_into(prepared, tmp_path / "weights", unchecked=True)
    outcome = Life(prepared).run()
    assert outcome.status == "failed" and outcome.metrics == []
    assert re.search(rf"{found.url}: param/\S+ has shape \[24, 16\], not \[16, 16\]", outcome.error)
