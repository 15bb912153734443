"""Secrets of a run's storage and data are in none of its files, in no log, and on no terminal."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_runs import Site, Started
from stores import BUCKET, KEY, S3, Moto, Proxy, slow_data
from test_resume import LOCAL_RAYS, kill_everything, owner

SECRET, TOKEN = "hush-9f3c57e1a2", "hush-5b1d08c4e7"
CONFIG: dict[str, Any] = {"train": {"steps": 16}, "checkpoint": {"every_steps": 4}}


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
    return any(secret.encode() in data for secret in (SECRET, TOKEN))


def ray_folder(run: Started) -> Path:
    (found,) = [path.parent for path in LOCAL_RAYS.glob("evenkeel-*/owner.json") if owner(path) == run.process.pid]
    return found


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_no_secret_is_left_anywhere(alone: Site, moto: S3, link: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given as fsspec's own storage options, and to the data; while the store fails, and all is killed."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    options = {"key": KEY, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{link.port}"}
    monkeypatch.setenv("FSSPEC_S3", json.dumps(options))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    alone.storage = f"s3://{BUCKET}/secrets"
    alone.options = {**options, "endpoint_url": moto.endpoint}
    keys = {"storage_options": {"key": "reader", "secret": TOKEN}}
    wanted = {**CONFIG, "data": {**slow_data(alone, 0.1), **keys}}

    run = alone.start(wanted)
    run.after_step(6)
    link.fail(20, "503 Slow Down", "SlowDown")  # so many that the controller meets some
    run.until(lambda: link.errors_left == 0)
    run.after_step(9)
    folder = ray_folder(run)
    kill_everything(run)
    logs = [path for path in folder.rglob("*.log") if path.stat().st_size]
    assert any(path.name.startswith("evenkeel-controller") for path in logs), logs
    assert told_in(folder) == []
    shutil.rmtree(folder)

    done = alone.run(wanted)
    assert (done.status, done.err) == (0, "")
    assert not _holds(done.out.encode())
    listed = moto.client.list_objects_v2(Bucket=BUCKET, Prefix="secrets/")["Contents"]
    bodies = {entry["Key"]: moto.client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read() for entry in listed}
    assert any(name.endswith("/config.yaml") for name in bodies) and any("/logs/" in name for name in bodies)
    assert [name for name, data in bodies.items() if _holds(data)] == []
    assert b"***" in bodies["secrets/run/config.yaml"]
    shown = alone.command(sys.executable, "-m", "evenkeel.cli", "status", f"s3://{KEY}:{SECRET}@nosuch/run")
    assert shown.returncode == 2 and not _holds((shown.stdout + shown.stderr).encode())


def test_credentials_in_the_url_are_refused_unseen(alone: Site) -> None:
    alone.storage = f"s3://{KEY}:{SECRET}@{BUCKET}/secrets"
    done = alone.run(CONFIG)
    assert (done.status, done.out) == (2, "")
    assert "run.storage_path: holds credentials" in done.err and "AWS_SECRET_ACCESS_KEY" in done.err
    assert SECRET not in done.err and done.err.count("\n") == 1
