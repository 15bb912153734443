"""S3 servers, small disks, and data that is slow, for the tests of whole runs."""

import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from ray_runs import Site

sys.path.append(str(Path(__file__).parents[1] / "store"))

from disks import small_disk
from proxy import Proxy
from servers import BUCKET, KEY, S3, SECRET, Ceph, Moto, options, require_ceph

__all__ = [
    "BUCKET",
    "KEY",
    "S3",
    "SECRET",
    "Ceph",
    "Moto",
    "Proxy",
    "on_s3",
    "options",
    "require_ceph",
    "slow_data",
    "small_disk",
]

SLOW = '''
"""The text dataset, each of whose micro-batches takes `pause_s` seconds more."""

import dataclasses
import time

from evenkeel.data import text


class Slow:
    def __init__(self, data, pause_s):
        self._data, self._pause_s = data, pause_s

    def __len__(self):
        return len(self._data)

    def fingerprint(self):
        return self._data.fingerprint()

    def get(self, indices):
        time.sleep(self._pause_s)
        return self._data.get(indices)


def load(config):
    data = text.load({k: v for k, v in config.items() if k not in ("pause_s", "storage_options")})
    return dataclasses.replace(data, train=Slow(data.train, config["pause_s"]))
'''


def slow_data(site: Site, pause_s: float) -> dict[str, Any]:
    """A section `data` for runs of the site: the same samples, slower."""
    (site.folder / "slow.py").write_text(SLOW)
    return {"name": "slow:load", "pause_s": pause_s}


def on_s3(site: Site, server: S3, link: Proxy, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The site's runs reach the server by the link, as a user says it; this process reads them directly."""
    for name, value in {**server.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{link.port}"}.items():
        monkeypatch.setenv(name, value)
    site.storage = f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"
    site.options = {"endpoint_url": server.endpoint, "key": KEY, "secret": SECRET}
    return site
