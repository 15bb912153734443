"""Secrets of a run's storage and data are in none of its files, in no log, and on no terminal."""

import json
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_runs import Site, Started
from stores import BUCKET, KEY, S3, Moto, Proxy, slow_data
from test_resume import LOCAL_RAYS, kill_everything, owner

SECRET, TOKEN = "hush-9f3c57e1a2/K7/hush-4410be7f93", "hush-5b1d08c4e7"
SIGNATURE = "hush-c07e6d92b5"
TELLING = ("hush-9f3c57e1a2", "hush-4410be7f93", TOKEN, SIGNATURE)
"""What is found of them: S3's client, like others, cuts a text at each slash."""

CONFIG: dict[str, Any] = {"train": {"steps": 24}, "checkpoint": {"every_steps": 4}}
CLOSING = '''
"""Slow data that fails once, in some step, and says all that it was given, as the clients of stores do."""

import dataclasses
from pathlib import Path

import slow


class Closing:
    def __init__(self, data, config):
        self._data, self._config, self._left = data, config, 16

    def __len__(self):
        return len(self._data)

    def fingerprint(self):
        return self._data.fingerprint()

    def get(self, indices):
        self._left -= 1
        if self._left < 0 and first():
            try:
                raise KeyError(self._config["url"])
            except KeyError as error:
                raise PermissionError(f"403 with {self._config['storage_options']}, {self._config['url']}") from error
        return self._data.get(indices)


def first():
    try:
        Path(__file__).with_name("has failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def load(config):
    data = slow.load({k: v for k, v in config.items() if k != "url"})
    return dataclasses.replace(data, train=Closing(data.train, config))
'''
TOLD = b"PermissionError: 403 with {'key': '***', 'secret': '***'}, https://there/x?sig=***"


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    server = Moto(tmp_path_factory.mktemp("moto"))
    yield server.s3
    server.stop()


@pytest.fixture
def link(moto: S3) -> Iterator[Proxy]:
    proxy = Proxy(moto.port)
    yield proxy
    proxy.close()


def told_in(folder: Path) -> list[str]:
    """Files below it that hold a secret."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in files if _holds(path.read_bytes())]


def _holds(data: bytes) -> bool:
    return any(secret.encode() in data for secret in TELLING)


def ray_folder(run: Started) -> Path:
    (found,) = [path.parent for path in LOCAL_RAYS.glob("evenkeel-*/owner.json") if owner(path) == run.process.pid]
    return found


def killed_in_trouble(
    site: Site, moto: S3, link: Proxy, monkeypatch: pytest.MonkeyPatch, errors: int
) -> dict[str, Any]:
    """A run that is given secrets as fsspec's own storage options, and for the data; and what it was configured with.

    Its store fails so many requests, its data raises in a worker, and all its processes are killed.
    """
    site.storage = f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"
    site.options = with_secrets(monkeypatch, moto.port)
    with_secrets(monkeypatch, link.port)
    (site.folder / "closing.py").write_text(CLOSING)
    keys = {"storage_options": {"key": "reader", "secret": TOKEN}, "url": f"https://there/x?sig={SIGNATURE}"}
    wanted = {**CONFIG, "data": {**slow_data(site, 0.1), **keys, "name": "closing:load"}}

    run = site.start(wanted)
    run.after_step(6)
    link.fail(errors, "503 Slow Down", "SlowDown")
    run.until(lambda: link.errors_left == 0)
    run.until(lambda: run.has_event("exception"))
    run.until(lambda: any(told_traceback(stored(site, moto))))
    run.after_step(9)
    folder = ray_folder(run)
    (folder / "owner.json").unlink()  # or the next run that is started beside this test removes what a dead one left
    kill_everything(run)
    logs = {path.name: path.read_bytes() for path in folder.rglob("evenkeel-*.log")}
    assert any(TOLD in data for data in logs.values()), logs.keys()
    assert told_in(folder) == []
    shutil.rmtree(folder)
    return wanted


def with_secrets(monkeypatch: pytest.MonkeyPatch, port: int) -> dict[str, str]:
    """Gives them to what is started from now on, and to nobody by another way."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    options = {"key": KEY, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port}"}
    monkeypatch.setenv("FSSPEC_S3", json.dumps(options))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return options


def stored(site: Site, moto: S3) -> dict[str, bytes]:
    """Every file of the run, none of which holds a secret, by name."""
    prefix = f"{site.storage.removeprefix(f's3://{BUCKET}/')}/run/"
    listed = moto.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
    bodies = {
        entry["Key"].removeprefix(prefix): moto.client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
        for entry in listed
    }
    assert [name for name, data in bodies.items() if _holds(data)] == []
    return bodies


def told_traceback(bodies: dict[str, bytes]) -> Iterator[bool]:
    """Of each log that was copied to the store, which a store that failed meanwhile has some seconds later."""
    for name, data in bodies.items():
        yield name.startswith("logs/") and b"Traceback" in data and TOLD in data


def check_stored(bodies: dict[str, bytes]) -> None:
    """That what could hold one is there: the configuration, events of the trouble, a traceback, checkpoints."""
    assert b"***" in bodies["config.yaml"] and json.loads(bodies["run.json"])["name"] == "run"
    assert any(told_traceback(bodies)), bodies.keys()
    assert any(TOLD in data for name, data in bodies.items() if name.startswith("events"))
    assert any(name.endswith("/manifest.json") for name in bodies)
    assert any(name.startswith("lease") for name in bodies)


@pytest.mark.timeout(600)
def test_no_secret_is_left_where_all_was_killed(
    alone: Site, moto: S3, link: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in_trouble(alone, moto, link, monkeypatch, errors=8)
    check_stored(stored(alone, moto))


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_no_secret_is_left_by_a_run_that_goes_on(
    alone: Site, moto: S3, link: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = killed_in_trouble(alone, moto, link, monkeypatch, errors=20)  # so many that the controller meets some
    done = alone.run(wanted)
    assert (done.status, done.err) == (0, "")
    assert not _holds(done.out.encode())
    bodies = stored(alone, moto)
    check_stored(bodies)
    assert "logs/controller.log" in bodies and "final/model.safetensors" in bodies


def test_credentials_in_the_url_are_refused_unseen(alone: Site, moto: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a client, who takes a bucket and a path for them, is asked; a look at a run that is not there asks it."""
    alone.storage = f"s3://{KEY}:{SECRET}@{BUCKET}/secrets"
    done = alone.run(CONFIG)
    assert (done.status, done.out) == (2, "")
    assert "run.storage_path: holds credentials" in done.err and "AWS_SECRET_ACCESS_KEY" in done.err
    assert not _holds(done.err.encode()) and done.err.count("\n") == 1
    with_secrets(monkeypatch, moto.port)
    shown = alone.command(sys.executable, "-m", "evenkeel.cli", "status", f"{alone.storage}/run")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert f"s3://{BUCKET}/secrets/run" in shown.stderr and not _holds(shown.stderr.encode())
