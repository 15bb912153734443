"""Configuration: what merges how, and that everything wrong is one line that names source and key."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from evenkeel.config import (
    Config,
    ConfigError,
    FaultSection,
    changes,
    config_from_yaml,
    differences,
    load_config,
    read_layer,
    stored_fingerprint,
    to_yaml,
    with_absolute_data,
    with_absolute_storage,
)
from evenkeel.config_values import HIDDEN, hide_in_url, hide_secrets, is_secret
from evenkeel.config_yaml import MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES

CONF = Path(__file__).parents[2] / "conf"


def made(**sections: Any) -> Config:
    sections["run"] = {"name": "r", **sections.get("run", {})}
    return load_config([], values=sections)


def written(tmp_path: Path, text: str, name: str = "a.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def failure(paths: list[str], *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(paths, ["run.name=r", *overrides])
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def test_the_shipped_configuration_is_valid() -> None:
    config = load_config([CONF / "local.yaml"], ["run.name=x"])
    assert (config.parallel.data, config.parallel.pipeline, config.parallel.tensor) == (2, 2, 1)
    assert config.scaling.workers == [1, 4]
    assert config.scaling.spares == 1
    assert len(config.faults) == 1
    assert config.train.micro_batches == 8


def test_files_merge_left_to_right_then_overrides(tmp_path: Path) -> None:
    first = written(tmp_path, "train: {steps: 5, warmup_steps: 1}\nmodel: {layers: 3, heads: 2}\n", "a.yaml")
    second = written(tmp_path, "train: {steps: 6}\nmodel: {heads: 4}\nscaling: {workers: [2, 8]}\n", "b.yaml")
    config = load_config([first, second], ["run.name=r", "train.learning_rate=1e-4", "model.width=64"])
    assert (config.train.steps, config.train.warmup_steps, config.train.learning_rate) == (6, 1, 1e-4)
    assert config.model.options == {"layers": 3, "heads": 4, "width": 64}
    assert config.scaling.workers == [2, 8]
    assert config.source("train.steps") == second
    assert config.source("train.warmup_steps") == first
    assert config.source("model.width") == "command line"
    assert config.source("train.grad_clip") == "defaults"


def test_an_empty_file_or_section_says_nothing(tmp_path: Path) -> None:
    paths = [written(tmp_path, ""), written(tmp_path, "train:\n# all commented out\n", "b.yaml")]
    assert load_config(paths, ["run.name=r"]) == made()


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("train: {stepz: 5}", "train.stepz", "train.steps"),
        ("train: {mikro_batch: 5}", "train.mikro_batch", "train.micro_batch"),
        ("trian: {steps: 5}", "trian", "train"),
        ("run: {storagepath: x}", "run.storagepath", "run.storage_path"),
        ("faults: [{step: 1, fase: forward, target: spare}]", "faults.0.fase", "faults.0.phase"),
        ("steps: 5", "steps", "train.steps"),
    ],
)
def test_an_unknown_key_names_file_key_and_the_nearest(tmp_path: Path, text: str, key: str, nearest: str) -> None:
    path = written(tmp_path, text)
    error = failure([path])
    assert str(error) == f"{path}: {key}: unknown key; nearest valid key: {nearest}"


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("train.steps=many", "train.steps", "expected a whole number, got 'many'"),
        ("train.steps=1.5", "train.steps", "expected a whole number, got 1.5"),
        ("train.steps=true", "train.steps", "expected a whole number, got True"),
        ("train.steps='5'", "train.steps", "expected a whole number, got '5'"),
        ("train.steps=null", "train.steps", "expected a whole number, got null"),
        ("train.learning_rate=high", "train.learning_rate", "expected a number, got 'high'"),
        ("train.learning_rate=.inf", "train.learning_rate", "expected a number, got inf"),
        ("scaling.use_gpu=1", "scaling.use_gpu", "expected true or false, got 1"),
        ("scaling.workers=4", "scaling.workers", "expected a list, got 4"),
        ("scaling.workers=[1,two]", "scaling.workers.1", "expected a whole number, got 'two'"),
        ("train=5", "train", "expected a mapping, got 5"),
        ("train.steps.x=5", "train.steps", "expected a whole number, got {'x': 5}"),
        ("emulate.slowdown.first=2", "emulate.slowdown.first", "expected a whole number, got 'first'"),
        ("model=decoder", "model", "expected a mapping, got 'decoder'"),
        ("faults=[{phase: forward, target: spare}]", "faults.0.step", "is missing"),
        ("train.steps=[", "train.steps", "the value '[' cannot be read"),
        ("train.steps=${train.step}", "train.steps", "Interpolation key 'train.step' not found"),
    ],
)
def test_a_wrong_type_names_source_key_and_what_is_expected(override: str, key: str, said: str) -> None:
    assert str(failure([], override)) == f"command line: {key}: {said}"


@pytest.mark.parametrize("text", ["train.steps", "=5", "train.=5", ".=5"])
def test_an_override_without_key_and_value_is_refused(text: str) -> None:
    assert str(failure([], text)) == f"command line: {text!r} is not of the form key=value"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {steps: !!int x}", ": cannot be read: ValueError: invalid literal for int() with base 10: 'x'"),
        ("train: {steps: !!float x}", ": cannot be read: ValueError: could not convert string to float: 'x'"),
        ("train: {steps: !!timestamp x}", ": cannot be read: AttributeError: "),
        ("5", ": expected a mapping of sections at the top"),
        ("null", ": expected a mapping of sections at the top"),
        ("train:\n  steps: " + "9" * 301, ":2: not valid YAML: a number, or a value with a tag (!), of more than 300"),
        ("model:\n  x: !!binary eA==\n", ": model.x: is of type bytes; expected a text, a number or the like"),
        ("model: {? !!binary eA== : 1}\n", ": model.b'x': is of type bytes; expected a text, a number or the like"),
        ("train: {steps: 5", ":2: not valid YAML"),
        ("a: 1\n  b: 2\n", ":2: not valid YAML"),
        ("train", ": expected a mapping of sections at the top"),
        ("- 1\n- 2\n", ": expected a mapping of sections at the top"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", ":2: not valid YAML: found duplicate key train"),
    ],
)
def test_what_is_no_mapping_in_yaml_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    assert str(failure([path])).startswith(path + said)


def nested(levels: int) -> str:
    return "model:\n  x: " + "[" * (levels - 2) + "]" * (levels - 2) + "\n"


def chained(levels: int) -> str:
    """As deep, but not as a text: each alias stands for a list with the one before."""
    return "model:\n  a0: &a0 []\n" + "".join(f"  a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, levels - 2))


def listed(values: int) -> str:
    return "model:\n  x: [" + ",".join("1" * (values - 5)) + "]\n"


def doubled(values: int) -> str:
    """As many, but by aliases."""
    return f"model:\n  x: &x [{','.join('1' * 98)}]\n  y: [{','.join(['*x'] * ((values - 105) // 99))}]\n"


@pytest.mark.parametrize(
    ("text", "most", "said"),
    [
        (nested, MAX_DEPTH, ":2: not valid YAML: nested deeper than 64 levels"),
        (chained, MAX_DEPTH, f":{MAX_DEPTH + 1}: not valid YAML: nested deeper than 64 levels by its aliases"),
        (listed, MAX_VALUES, ":3: not valid YAML: more than 10000 values, with what each alias (*name) stands for"),
        (lambda n: f"model: {{x: '{'x' * (n - 14)}'}}", MAX_CHARACTERS, ": not valid YAML: 262145 characters, at most"),
        (lambda n: f"model: {{x: '{'x' * (n - 11)}${{run.name}}'}}", 4000, ":1: not valid YAML: a text with ${...}"),
    ],
    ids=["nested", "chained", "listed", "long", "interpolated"],
)
def test_bounds_of_a_file(tmp_path: Path, text: Any, most: int, said: str) -> None:
    load_config([written(tmp_path, text(most))], ["run.name=r"])
    path = written(tmp_path, text(most + 1))
    assert str(failure([path])).startswith(path + said)


def test_aliases_count_as_what_they_stand_for() -> None:
    read_layer(doubled(MAX_VALUES), "a.yaml")
    with pytest.raises(ConfigError, match="more than 10000 values"):
        read_layer(doubled(2 * MAX_VALUES), "a.yaml")


@pytest.mark.parametrize("raw", ["[" * 100_000, "!!int x", "!!binary eA==", "9" * 301, "${" * 1000])
def test_an_override_that_no_yaml_can_be_is_one_short_line(raw: str) -> None:
    error = failure([], f"model.x={raw}")
    assert (error.source, error.key) == ("command line", "model.x")
    assert str(error).startswith(f"command line: model.x: the value {raw[:20]!r}"[:40])
    assert len(str(error)) < 1500


WORDS = [
    "a: ", "b: ", "run: ", "[", "]", "{", "}", ",", "- ", "? ", ": ", "\n", "  ", "&a ", "*a", "&b ", "*b", "<<: ", "x",
    "9", "0x", "1:59", ".", "e9", "'", '"', "|\n ", "!!int x", "!!float x", "!!timestamp x", "!!int ", "!!float ",
    "!!binary ", "!!set ", "!!omap ", "!!pairs ", "!!str ", "!!null ", "!!bool ", "!!python/object/apply:pathlib.Path ",
    "!x ", "${", "${a}", "${oc.env:X}", "---\n", "...\n", "%YAML 9\n", "#", "\t", "\x00", "\x1b", "\ud800",
    "\U0001f600", "~", "???",
]  # fmt: skip
texts = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from([1, 1, 1, 1, 70, 100_000])), max_size=8).map(
    lambda words: "".join(word * times for word, times in words)[: 2 * MAX_CHARACTERS]
)


@settings(max_examples=300)
@given(texts | texts.map(lambda text: f"run: {{a: {text}}}"))
def test_whatever_a_text_is_it_is_a_configuration_or_one_short_line(text: str) -> None:
    try:
        values = OmegaConf.to_container(read_layer(text, "a.yaml").values, resolve=False)
        problem = ""
    except ConfigError as error:
        problem = str(error)
    if problem:
        assert problem.startswith("a.yaml:")
        assert len(problem.splitlines()) == 1 and len(problem) < 1500
    else:
        assert isinstance(json.loads(json.dumps(values)), dict)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.yaml")
    assert str(failure([missing])) == f"{missing}: cannot be read: No such file or directory"
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not a text in UTF-8" in str(failure([str(tmp_path / "bytes.yaml")]))


@pytest.mark.parametrize(
    ("override", "key", "part"),
    [
        ("train.micro_batch=3", "train.micro_batch", "3 does not divide train.global_batch 16"),
        ("train.micro_batch=0", "train.micro_batch", "at least 1"),
        ("train.steps=0", "train.steps", "at least 1"),
        ("train.steps=-1", "train.steps", "at least 1"),
        ("train.precision=fp8", "train.precision", "one of fp32, bf16, fp64"),
        ("train.schedule=step", "train.schedule", "one of cosine, linear, constant"),
        ("train.learning_rate=0", "train.learning_rate", "above 0"),
        ("train.warmup_steps=-1", "train.warmup_steps", "not be negative"),
        ("run.name=", "run.name", "needs a name"),
        ("run.name=a/b", "run.name", "without path separators"),
        ("run.name=..", "run.name", "without path separators"),
        ("run.name=a\\b", "run.name", "without path separators"),
        ("run.name=dup::1", "run.name", "'dup::1' must be a plain name"),
        ("run.name='a b'", "run.name", "must be a plain name"),
        ("run.name=a?b", "run.name", "must be a plain name"),
        ("run.name=é", "run.name", "must be a plain name"),
        ("run.name=-x", "run.name", "must be a plain name"),
        (f"run.name={'x' * 201}", "run.name", f"'{'x' * 37}...' must be a plain name"),
        ("train.grad_clip=-1", "train.grad_clip", "must not be negative"),
        ("run.storage_path=", "run.storage_path", "must not be empty"),
        ("run.seed=-1", "run.seed", "expected 0 to"),
        ("run.orphan_minutes=0", "run.orphan_minutes", "above 0"),
        ("scaling.workers=[3,2]", "scaling.workers", "[fewest, most]"),
        ("scaling.workers=[0,2]", "scaling.workers", "[fewest, most]"),
        ("scaling.workers=[2]", "scaling.workers", "[fewest, most]"),
        ("scaling.spares=-1", "scaling.spares", "negative"),
        ("scaling.resources_per_worker={CPU: -1}", "scaling.resources_per_worker.CPU", "negative"),
        ("parallel.data=0", "parallel.data", "at least 1"),
        ("parallel.pipeline=2", "parallel.pipeline", "= 2 workers, but scaling.workers allows at most 1"),
        ("redundancy.copies=0", "redundancy.copies", "at least 1"),
        ("checkpoint.keep=0", "checkpoint.keep", "at least 1"),
        ("emulate.slowdown={0: 0.5}", "emulate.slowdown.0", "at least 1"),
        ("emulate.slowdown.7=2", "emulate.slowdown.7", "ranks 0 to 0"),
        ("emulate.slowdown.0=-2", "emulate.slowdown.0", "at least 1"),
        ("emulate.slowdown.0=.nan", "emulate.slowdown.0", "expected a number"),
        ("emulate.slowdown.0=.inf", "emulate.slowdown.0", "expected a number"),
        ("emulate.slowdown={-1: 2}", "emulate.slowdown.-1", "ranks 0 to 0"),
        ("emulate.from_step=0", "emulate.from_step", "expected 1 to train.steps (100)"),
        ("emulate.from_step=101", "emulate.from_step", "expected 1 to train.steps (100)"),
        ("emulate.to_step=0", "emulate.to_step", "expected a step from 1"),
        ("faults=[{step: 101, phase: forward, target: spare}]", "faults.0.step", "expected 1 to train.steps (100)"),
        ("faults=[{step: 1, phase: later, target: spare}]", "faults.0.phase", "one of forward, backward"),
        ("faults=[{step: 1, phase: vote, target: spare}]", "faults.0.phase", "before_vote, after_vote"),
        ("faults=[{step: 1, phase: forward, target: 'rank:x'}]", "faults.0.target", '"rank:N"'),
        ("faults=[{step: 1, phase: forward, target: 'rank:-1'}]", "faults.0.target", '"rank:N"'),
        ("faults=[{step: 1, phase: forward, target: everybody}]", "faults.0.target", '"controller"'),
        ("faults=[{step: 1, phase: save, target: controller}]", "faults.0.phase", "the controller holds no state"),
        ("faults=[{step: 1, phase: forward, target: spare, kind: nap}]", "faults.0.kind", "kill, stop, segv"),
        ("faults=[{step: 1, phase: forward, target: 'rank:9'}]", "faults.0.target", "there are only ranks 0 to 0"),
        ("faults=[{step: 1, phase: forward, target: 'stage:1'}]", "faults.0.target", "there are only stages 0 to 0"),
        ("faults=[{step: 1, phase: forward, target: spare}]", "faults.0.target", "but scaling.spares is 0"),
    ],
)
def test_values_that_make_no_sense_together_name_the_source(override: str, key: str, part: str) -> None:
    error = failure([], override)
    assert (error.source, error.key) == ("command line", key)
    assert part in error.problem


def test_a_value_of_a_file_is_blamed_on_the_file(tmp_path: Path) -> None:
    first, second = written(tmp_path, "train: {micro_batch: 3}"), written(tmp_path, "train: {steps: 7}", "b.yaml")
    assert failure([first, second], "train.steps=9").source == first


def test_an_idle_spare_cannot_raise() -> None:
    fault = {"step": 1, "phase": "forward", "target": "spare", "kind": "exception"}
    with pytest.raises(ConfigError, match=r"faults\.0\.kind: is 'exception', but an idle spare runs no training code"):
        made(scaling={"spares": 1}, faults=[fault])
    made(scaling={"spares": 1}, faults=[{**fault, "kind": "kill"}, {**fault, "phase": "recovery"}])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["parallel.tensor=3"], "parallel.tensor"),
        (["scaling.workers=[1,3]"], "scaling.workers"),
        (["parallel.tensor=3", "parallel.data=4"], "parallel.data"),
    ],
)
def test_of_several_that_do_not_fit_together_the_last_said_is_blamed(
    tmp_path: Path, overrides: list[str], key: str
) -> None:
    file = written(tmp_path, "parallel: {data: 2, pipeline: 2}\nscaling: {workers: [1, 4]}\n")
    error = failure([file], *overrides)
    assert (error.source, error.key) == ("command line", key)


def test_zero_turns_clipping_off() -> None:
    assert load_config([], ["run.name=r", "train.grad_clip=0"]).train.grad_clip == 0.0


def test_texts_of_the_command_line_stay_as_typed() -> None:
    config = load_config([], ["run.name=20260101_12", "data.path=1e3", "data.eval_path=null", "model.depth=1e3"])
    assert (config.run.name, config.data.path, config.data.eval_path) == ("20260101_12", "1e3", None)
    assert config.model.options == {"depth": 1000.0}
    assert load_config([], ["run.name='007'"]).run.name == "007"


def test_interpolation_reaches_over_sources(tmp_path: Path) -> None:
    path = written(tmp_path, "train: {steps: '${model.steps}'}\nmodel: {steps: 5}\n")
    assert load_config([path], ["run.name=r", "model.steps=8"]).train.steps == 8
    assert "expected a whole number" in str(failure([path], "model.steps=x"))


def test_models_and_datasets_blame_their_own_keys() -> None:
    config = load_config([], ["run.name=r", "model.layerz=3"])
    error = config.unknown("model.layerz", ["model.layers", "model.heads"])
    assert str(error) == "command line: model.layerz: unknown key; nearest valid key: model.layers"
    assert str(config.error("model.heads", "must divide")) == "defaults: model.heads: must divide"
    assert str(config.blame(ConfigError("is odd", "model.layerz"))) == "command line: model.layerz: is odd"
    assert config.blame(error) is error


def test_ranks_of_places_that_the_degrees_leave_out_cannot_be_slowed() -> None:
    degrees = {"data": 2, "pipeline": 1, "tensor": 1}
    with pytest.raises(ConfigError, match=r"emulate\.slowdown\.3: there are only ranks 0 to 1"):
        made(scaling={"workers": [1, 4]}, parallel=degrees, emulate={"slowdown": {3: 2}})


def test_errors_survive_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("is\nbad", "a.b", "f.yaml")))
    assert (str(error), error.key, error.source) == ("f.yaml: a.b: is bad", "a.b", "f.yaml")


def test_the_written_configuration_reads_back_equal() -> None:
    fault = {"step": 3, "phase": "commit", "target": "stage:1", "kind": "segv"}
    config = made(
        model={"name": "decoder", "layers": 4, "nested": {"a": [1, 2]}, "options": 3},
        emulate={"slowdown": {0: 2}, "from_step": 3},
        scaling={"workers": [1, 2], "resources_per_worker": {"CPU": 0.5}},
        faults=[fault],
    )
    again = config_from_yaml(to_yaml(config), "config.yaml")
    assert again == config
    assert again.faults == [FaultSection(3, "commit", "stage:1", "segv")]
    assert differences(config, again) == []


def test_the_fingerprint_of_the_data_stands_beside_the_configuration() -> None:
    text = to_yaml(made(), "sha256:0123")
    assert stored_fingerprint(text) == "sha256:0123"
    assert config_from_yaml(text, "config.yaml") == made()
    assert stored_fingerprint(to_yaml(made())) == ""
    with pytest.raises(ConfigError, match="unknown key"):
        load_config([], values={"dataset_fingerprint": "x"})


def test_secrets_are_not_written() -> None:
    config = made(
        run={"storage_path": "s3://me:hush@bucket/runs?api_key=hush&region=eu"},
        data={"storage_options": {"key": "hush", "client": {"x": "hush"}}, "hf_token": "hush", "tokenizer": "bytes"},
        model={"secretKey": "hush", "max_tokens": 7, "parts": [{"password": "hush"}]},
    )
    text = to_yaml(config)
    assert "hush" not in text
    assert f"s3://{HIDDEN}@bucket/runs?api_key={HIDDEN}&region=eu" in text
    assert "tokenizer: bytes" in text
    assert "max_tokens: 7" in text
    assert differences(config_from_yaml(text, "config.yaml"), config) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        # The example of AWS's own documentation: about half of all its secrets have a "/".
        ("s3://AKIAEXAMPLE:wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY@bucket/runs", "s3://***@bucket/runs"),
        ("s3://me:hush//hush/@bucket/runs", "s3://***@bucket/runs"),
        ("s3://me://hush/hush@bucket/runs", "s3://***@bucket/runs"),
        ("s3://me::hush/hush@bucket/runs", "s3://***@bucket/runs"),
        ("s3://me:hush@hush/@hush@bucket/runs", "s3://***@bucket/runs"),
        ("s3://me:hush%2Fhush%40hush@bucket/runs", "s3://***@bucket/runs"),
        ("s3://me%3Ahush/hush@bucket", "s3://***@bucket"),
        ("s3://me%3ahush%2fhush%40bucket", "s3://***%40bucket"),
        ("s3://me:hush hush/\nhush@bucket", "s3://***@bucket"),
        ("https://hush@host/a/b", "https://***@host/a/b"),
        ("simplecache::s3://me:hush/hush@bucket/runs", "simplecache::s3://***@bucket/runs"),
        ("zip://in.txt::simplecache::https://hush@host/a.zip", "zip://in.txt::simplecache::https://***@host/a.zip"),
        ("zip://in.txt::s3://me:hush/hush@bucket/a.zip", "zip://***@bucket/a.zip"),
        ("https://tokyo/x https://tok@b https://hush@c", "https://tokyo/x https://***@b https://***@c"),
        ("s3://bucket/runs?region=eu&token=hush", "s3://bucket/runs?region=eu&token=***"),
        ("s3://bucket/runs?at=1:2&token=hush@hush", "s3://***"),
        ("s3://me:hush?token=hush/hush@bucket/runs", "s3://***"),
    ],
)
def test_credentials_in_urls(text: str, shown: str) -> None:
    assert hide_in_url(text) == shown
    assert hide_in_url(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/runs@home",
        "s3://bucket/a/b@c@d?region=eu",
        "s3://arn:aws:s3:eu-central-1:123456789012:accesspoint/mine/runs",
        "simplecache::s3://bucket/runs@home",
        "zip://in.txt::simplecache::s3://bucket/a@b.zip",
        "webhdfs://host:9870/runs",
        "/home/me@work/a:b@c",
        "mail me:or@me",
    ],
)
def test_what_holds_no_credentials_stays(text: str) -> None:
    assert hide_in_url(text) == text


def test_errors_show_no_secrets() -> None:
    """Of a value that is wrong, wherever it was said: hidden before it is cut to a length."""
    long = "s3://me:hush/" + "hush/" * 40 + "@bucket"
    assert str(failure([], long)) == "command line: 's3://***@bucket' is not of the form key=value"
    assert str(failure([], f"run.storage_path=[{long}]")).endswith("expected a text, got ['s3://***@bucket']")
    assert str(failure([], f"train.steps={long}")).endswith("expected a whole number, got 's3://***@bucket'")
    for key in ("data.storage_options.key", "model.secret"):
        assert str(failure([], f"{key}={{hush")) == f"command line: {key}: the value '***' cannot be read"
    assert "hush" not in str(failure([], "run.name={password: hush}"))


@pytest.mark.parametrize("name", ["password", "aws_secret_access_key", "access_key_id", "hf_token", "API_KEY"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)
    assert hide_secrets({name: "x", f"{name}_none": 1})[name] == HIDDEN


@pytest.mark.parametrize("name", ["tokens", "tokenizer", "max_tokens", "key_value_heads", "keys", "author", "design"])
def test_names_of_no_secrets(name: str) -> None:
    assert not is_secret(name)


def test_what_may_differ_when_a_run_goes_on() -> None:
    old = made(scaling={"workers": [1, 4]})
    new = made(
        run={"orphan_minutes": 5, "storage_path": "elsewhere"},
        scaling={"workers": [2, 8], "spares": 3},
        parallel={"data": 4},
        redundancy={"mirror_every": 2},
        checkpoint={"every_steps": 7},
        emulate={"slowdown": {1: 2.0}},
        faults=[{"step": 1, "phase": "forward", "target": "spare", "kind": "stop"}],
        train={"steps": 500},
    )
    assert differences(old, new) == []
    differing = {key: values for key, *values in changes(old, new)}
    assert differing["train.steps"] == [old.train.steps, 500]
    assert differing["faults.0.kind"] == [None, "stop"]
    assert "run.storage_path" not in differing and "train.global_batch" not in differing


def test_what_may_not_differ_is_named_with_both_values() -> None:
    old = made(model={"layers": 4, "old": 1}, train={"steps": 50})
    new = made(model={"layers": 6, "new": True}, train={"steps": 40, "learning_rate": 0.5}, run={"seed": 3})
    assert differences(old, new) == [
        ("run.seed", 0, 3),
        ("model.layers", 4, 6),
        ("model.old", 1, None),
        ("train.steps", 50, 40),
        ("train.learning_rate", 1e-3, 0.5),
        ("model.new", None, True),
    ]


def test_equal_faults_have_names_of_their_own() -> None:
    fault = {"step": 3, "phase": "commit", "target": "rank:1", "kind": "kill"}
    config = made(scaling={"workers": [1, 2], "spares": 1}, faults=[fault, fault, {**fault, "target": "spare"}])
    expected = ("step3-commit-rank1-kill-1", "step3-commit-rank1-kill-2", "step3-commit-spare-kill-1")
    assert config.fault_keys() == expected


def test_a_relative_storage_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_absolute_storage(made()).run.storage_path == str(tmp_path / "runs")
    for path in ("/abs", "s3://b/x", "memory://x", "simplecache::s3://b/x"):
        assert with_absolute_storage(made(run={"storage_path": path})).run.storage_path == path


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert with_absolute_storage(made(run={"storage_path": "~/runs"})).run.storage_path == str(tmp_path / "runs")


def test_data_that_is_here_gets_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("text.txt", "stdlib"):
        (tmp_path / name).touch()

    def paths(path: str, eval_path: str | None) -> tuple[str, str | None]:
        data = with_absolute_data(made(data={"path": path, "eval_path": eval_path})).data
        return data.path, data.eval_path

    here = str(tmp_path / "text.txt")
    assert paths("text.txt", "~/text.txt") == (here, here)
    assert paths(here, None) == (here, None)
    for name in ("stdlib", "elsewhere.txt", "s3://bucket/text.txt", ""):
        assert paths(name, name) == (name, name)
