"""S3 servers on loopback for the tests: moto, which is quick, and Ceph's RADOS gateway, which is real.

Both are children of the test process: they end with it, and are stopped by their process, never by a name.
"""

import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import boto3
import pytest
from botocore.config import Config
from children import PART
from proxy import Proxy

BUCKET = "tests"
KEY, SECRET = "testkey", "testsecret"
PATIENCE_S = 120.0
"""How long a server may take to answer before the tests fail: it says that it hangs, never that it is slow."""

QUIET_PORTS = range(20_000, 32_000)
"""Linux gives connections those from 32768 on (net.ipv4.ip_local_port_range)."""

CEPH_PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "monmaptool")
CEPH_MISSING = "apt-get install --no-install-recommends radosgw ceph-mon ceph-osd"

# With the parent, also when that is killed: nobody would end them otherwise.
_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")

_MOTO = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
# One request at a time: moto looks whether a file is there and then writes it, with no lock.
application = DomainDispatcherApplication(create_backend_app)
make_server("127.0.0.1", int(sys.argv[1]), application, ssl_context=sys.argv[2] or None).serve_forever()
"""


@dataclass(frozen=True)
class S3:
    """Where a server is. `environment` is what a user would set to reach it."""

    port: int
    scheme: str = "http"

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def client(self) -> Any:
        """boto3's: what the tests look with from outside, by another road than evenkeel's."""
        config = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.endpoint, config=config, verify=False, **keys)

    def make_bucket(self) -> None:
        self.client.create_bucket(Bucket=BUCKET)

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=5, context=ssl._create_unverified_context()).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True


class Process:
    """A server as a child process, whose output goes to a file."""

    def __init__(self, log: Path, *command: str, environment: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as out:
            self._child = _start(out, command, environment)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Raises AssertionError, with what the server said, if it ends first."""
        limit = time.monotonic() + PATIENCE_S
        while not ready():
            said = f"{' '.join(map(str, self._child.args[3:]))}: {self.log.read_text(errors='replace')[-3000:]}"
            assert self._child.poll() is None, f"ended with {self._child.returncode}: {said}"
            assert time.monotonic() < limit, f"does not answer: {said}"
            time.sleep(0.05)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()


def _start(out: IO[bytes], command: tuple[str, ...], environment: dict[str, str] | None) -> Any:
    words = [*_WITH_PARENT, *command]
    env = {**os.environ, **(environment or {})}
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env)


class Moto:
    """S3 as moto plays it, in memory: it accepts any secret, and forgets everything when it ends.

    Args:
        tls: with a certificate that nobody has signed.
    """

    def __init__(self, folder: Path, tls: bool = False) -> None:
        self.s3 = S3(free_ports(1)[0], "https" if tls else "http")
        # Its own client must not be led to a server that the environment names.
        words = ("-c", _MOTO, str(self.s3.port), "adhoc" if tls else "")
        self._process = Process(folder / "moto.log", sys.executable, *words)
        self._process.wait_until(self.s3.answers)
        self.s3.make_bucket()

    def stop(self) -> None:
        self._process.kill()


class Ceph:
    """One monitor, one OSD on a sparse file and one gateway; without authentication among themselves.

    Raises:
        AssertionError: if one of them does not start, with what it said.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        s3_port, self._mon_port = free_ports(2)
        self.s3 = S3(s3_port)
        self._processes: list[Process] = []
        for name in ("mon", "osd", "run", "log"):
            (folder / name).mkdir(parents=True)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        fsid = str(uuid.uuid4())
        (self._folder / "ceph.conf").write_text(self._config(fsid))
        address = f"[v2:127.0.0.1:{self._mon_port}]"
        self._call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, self._path("monmap"))
        self._call("ceph-mon", "--mkfs", "-i", "a", "--monmap", self._path("monmap"))
        self._serve("ceph-mon", "-i", "a").wait_until(self._has_quorum)
        osd = str(uuid.uuid4())
        self._call("ceph", "osd", "new", osd)
        self._call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._serve("ceph-osd", "-i", "0")
        self.start_gateway()
        user = ("--uid", "t", "--display-name", "t", "--access-key", KEY, "--secret-key", SECRET)
        self._call("radosgw-admin", "user", "create", *user)
        self.s3.make_bucket()

    def start_gateway(self) -> None:
        self._gateway = self._serve("radosgw", "-n", "client.rgw")
        self._gateway.wait_until(self.s3.answers)

    def kill_gateway(self) -> None:
        """As a crash: what it has not told its client it has done may be done, half done, or not."""
        self._gateway.kill()
        self._processes.remove(self._gateway)

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
        shutil.rmtree(self._folder)

    def _has_quorum(self) -> bool:
        return self._run("ceph", "--connect-timeout", "5", "-s").returncode == 0

    def _serve(self, program: str, *words: str) -> Process:
        """In the foreground, so that it stays a child."""
        log = self._folder / "log" / f"{program}.out"
        process = Process(log, program, "-f", *words, environment=self._environment)
        self._processes.append(process)
        return process

    def _call(self, *words: str) -> None:
        done = self._run(*words)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-3000:]}"

    def _run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(words, env={**os.environ, **self._environment}, timeout=PATIENCE_S, **out)  # type: ignore[call-overload, no-any-return]

    @property
    def _environment(self) -> dict[str, str]:
        return {"CEPH_CONF": self._path("ceph.conf")}

    def _path(self, name: str) -> str:
        return str(self._folder / name)

    def _config(self, fsid: str) -> str:
        """Small: little memory, one placement group a pool, one copy; nobody else can reach it."""
        values = {
            "fsid": fsid,
            "mon_host": f"v2:127.0.0.1:{self._mon_port}/0",
            "public_addr": "127.0.0.1",
            "ms_bind_ipv6": "false",
            **dict.fromkeys(("auth_cluster_required", "auth_service_required", "auth_client_required"), "none"),
            # Without authentication there is no key to encrypt with, which the gateway would otherwise insist on.
            **dict.fromkeys(("ms_mon_client_mode", "ms_client_mode", "ms_cluster_mode", "ms_service_mode"), "crc"),
            "auth_allow_insecure_global_id_reclaim": "false",
            "run_dir": self._path("run"),
            "admin_socket": self._path("run/$name.asok"),
            "log_file": self._path("log/$name.log"),
            "mon_data": self._path("mon"),
            "osd_data": self._path("osd"),
            "mon_allow_pool_size_one": "true",
            "osd_pool_default_size": 1,
            "osd_pool_default_min_size": 1,
            "osd_pool_default_pg_num": 1,
            "osd_pool_default_pgp_num": 1,
            "osd_pool_default_pg_autoscale_mode": "off",
            "osd_crush_chooseleaf_type": 0,
            "mon_max_pg_per_osd": 1000,
            # The gateway makes its pools one by one, and each waits for the monitor's next decision.
            "paxos_propose_interval": 0.05,
            "mon_data_avail_warn": 1,
            "mon_data_avail_crit": 1,
            "osd_objectstore": "bluestore",
            "bluestore_block_size": 4 << 30,
            "bluestore_block_wal_size": 0,
            "bluestore_block_db_size": 0,
            "bluestore_cache_autotune": "false",
            "bluestore_cache_size": 64 << 20,
            "osd_memory_target": 896 << 20,
            "rgw_frontends": f"beast endpoint=127.0.0.1:{self.s3.port}",
            "rgw_thread_pool_size": 16,
            "rgw_enable_apis": "s3,admin",
            "rgw_run_sync_thread": "false",
        }
        return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())


def options(server: S3 | Proxy, **changed: Any) -> dict[str, Any]:
    """To reach what listens at server.port: as they are by default, but for small parts, and one quick repetition less
    before the client gives up."""
    base = {"endpoint_url": f"http://127.0.0.1:{server.port}", "key": KEY, "secret": SECRET}
    quick = {"default_block_size": PART, "config_kwargs": {"retries": {"total_max_attempts": 2}}}
    return {**base, **quick, **changed}


def require_ceph() -> None:
    """Skips the test where the server is not installed; in CI, where it must be, that is a failure."""
    if missing := ceph_missing():
        text = f"not installed: {', '.join(missing)}; get them with: {CEPH_MISSING}"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)


def ceph_missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in CEPH_PROGRAMS if shutil.which(name) is None]


def free_ports(count: int) -> list[int]:
    """Different ones of loopback that nobody listens on; nor will any connection get one of them meanwhile."""
    ports = random.SystemRandom().sample(QUIET_PORTS, 1000)
    return list(islice(filter(_is_free, ports), count))


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
