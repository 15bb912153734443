"""The directory of one run: which file says what. Tools outside read it, so its names and fields are stable."""

import json
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from evenkeel.core.codec import load
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.core.world import World
from evenkeel.store import lineage
from evenkeel.store.errors import StoreError
from evenkeel.store.fenced import FencedFiles
from evenkeel.store.files import Files, LocalFiles, open_files
from evenkeel.store.final import FinalWriter, TensorSpec, final_writer
from evenkeel.store.journal import Journal, check_format
from evenkeel.store.lines import LineReader, LineWriter, Record, line_writer
from evenkeel.store.patient import PATIENCE, PatientFiles
from evenkeel.store.profiles import ProfileRecord, from_json, to_json
from evenkeel.store.retry import Patience, Trouble, Unhurried
from evenkeel.store.untrusted import parse_json, short

FORMAT = 1
ROOM = Patience(total_s=30.0)
"""For a full disk: what fills it may be a part of a checkpoint, which is gone as soon as that has failed."""
STATUSES = ("starting", "running", "paused", "finished", "stopped", "failed")
PROFILE = "profile.json"
Stream = Literal["metrics", "events"]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """run.json. Times are unix seconds; `ended` is None while the run may still go on."""

    name: str
    status: str
    started: float
    updated: float
    ended: float | None = None
    error: str = ""
    waiting_for: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is not one of {', '.join(STATUSES)}")

    @property
    def over(self) -> bool:
        return self.status in ("finished", "stopped", "failed")


class RunDirectory:
    """Every method raises StoreError, in one line, where the store fails.

    Args:
        small: where all but checkpoints and the model is written; `files` where it is the same.
    """

    def __init__(self, files: Files, small: PatientFiles | None = None) -> None:
        self.files = files
        self._small: Files = small or files
        self._repeat: Callable[[Callable[[], None]], None] = small.repeat if small else _once
        self._writers: dict[Stream, LineWriter] = {}

    @classmethod
    def of(cls, storage_path: str, name: str, options: dict[str, Any] | None = None) -> "RunDirectory":
        """The directory of the run `name` under an fsspec URL or local path."""
        return cls.at(f"{storage_path.rstrip('/')}/{name}", options)

    @classmethod
    def at(cls, url: str, options: dict[str, Any] | None = None) -> "RunDirectory":
        return cls(open_files(url, options))

    def patient(
        self,
        report: Callable[[Trouble], None],
        wait: Callable[[float], bool],
        patience: Patience | Unhurried = PATIENCE,
    ) -> "RunDirectory":
        """The same directory, with calls that are repeated while a store is out of reach; see PatientFiles.

        On a local path also while the disk is full, but for checkpoints and the model: of these there is a next one.
        """
        if isinstance(self.files, LocalFiles):
            return RunDirectory(self.files, PatientFiles(self.files, report, wait, patience, ROOM))
        return RunDirectory(PatientFiles(self.files, report, wait, patience))

    def fenced(self, fence: Callable[[], None]) -> "RunDirectory":
        """The same directory, for one who may have lost the run; see FencedFiles. To be made `patient` after that."""
        return RunDirectory(FencedFiles(self.files, fence))

    @property
    def url(self) -> str:
        return self.files.where()

    def exists(self) -> bool:
        """Whether a run of this name was started."""
        return self.files.read("run.json") is not None

    def check_writable(self) -> None:
        """Raises StoreError unless files can be created, read back and removed here."""
        name, data = f"writable-{uuid.uuid4().hex}", uuid.uuid4().bytes
        if not self.files.create(name, data) or self.files.read(name) != data:
            raise StoreError(f"{self.url}: does not give back what was written")
        self.files.remove(name)

    # ------------------------------------------------------------ single files

    def write_run(self, record: RunRecord) -> None:
        self._write_json("run.json", {"format": FORMAT, **asdict(record)})

    def read_run(self) -> RunRecord | None:
        """None if there is no such run."""
        values = self._read_json("run.json")
        if values is None:
            return None
        check_format(values, FORMAT, self.files.where("run.json"))
        try:
            record: RunRecord = load({f.name: values[f.name] for f in fields(RunRecord)}, RunRecord)
        except (KeyError, ValueError) as error:
            raise StoreError(f"{self.files.where('run.json')}: damaged: {short(error)}") from None
        return record

    def write_config(self, text: str) -> None:
        self._small.replace("config.yaml", text.encode())

    def read_config(self) -> str | None:
        data = self.files.read("config.yaml")
        try:
            return None if data is None else data.decode()
        except UnicodeDecodeError:
            raise StoreError(f"{self.files.where('config.yaml')}: is not a text in UTF-8") from None

    def write_world(self, record: Mapping[str, Any]) -> None:
        """worlds/NNNNNN.json, from `world_record`; whole before the generation's first metrics line."""
        self._write_json(_world(record["generation"]), record)

    def generations(self) -> list[int]:
        """Of the worlds that are written down."""
        names = self.files.names("worlds")
        return sorted(int(n[:-5]) for n in names if n.endswith(".json") and n[:-5].isdecimal())

    def read_worlds(self) -> list[Record]:
        """By generation."""
        return [w for g in self.generations() if (w := self._read_json(_world(g))) is not None]

    def write_profile(self, record: ProfileRecord) -> None:
        self._write_json(PROFILE, to_json(record))

    def read_profile(self) -> ProfileRecord | None:
        """None if nothing was measured here."""
        values = self._read_json(PROFILE)
        return None if values is None else from_json(values, self.files.where(PROFILE))

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        self._small.replace(name, json.dumps(values, indent=2).encode() + b"\n")

    def _read_json(self, name: str) -> Record | None:
        data = self.files.read(name)
        if data is None:
            return None
        try:
            values = parse_json(data)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise StoreError(f"{self.files.where(name)}: not a JSON object")
        return values

    # ------------------------------------------------------------ lines

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """One committed step. On a local path at once visible; on an object store after `flush`, or some seconds."""
        self._repeat(lambda: self._writer("metrics").write(record))

    def append_event(self, record: Mapping[str, Any]) -> None:
        self._repeat(lambda: self._writer("events").write(record))

    def flush(self) -> None:
        """Returns when every line so far is visible."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, stream: Stream) -> LineWriter:
        if stream not in self._writers:
            self._writers[stream] = line_writer(self.files, stream)
        return self._writers[stream]

    def follow(self, stream: Stream) -> LineReader:
        """From the first line on; each poll gives what is new."""
        return LineReader(self.files, stream)

    def metrics(self) -> list[Record]:
        """One line per committed step, by step: those that led to where the run is, wherever it went back to."""
        lines = self.follow("metrics").poll()
        for line in lines:
            if type(line.get("step")) is not int:
                raise StoreError(f"{self.files.where('metrics')}: a line without a step: {short(line, 60)}")
        return lineage.current(lines, lambda generation: lineage.base_in(self._read_json(_world(generation))))

    def events(self) -> list[Record]:
        return self.follow("events").poll()

    # ------------------------------------------------------------ the rest

    def journal(self) -> Journal:
        return Journal(self._small)

    def claim_fault(self, key: str) -> bool:
        """True for the one caller, over all processes and resumes, that is to let this configured fault happen.

        The claim holds the unix second, as nobody can say afterwards when a process died.
        """
        return self.files.create(_fault(key), f"{time.time():.6f} {uuid.uuid4().hex}".encode())

    def fault_fired(self, key: str) -> bool:
        return self.files.read(_fault(key)) is not None

    def fault_times(self) -> list[float]:
        """Unix seconds at which configured faults happened, in order; of claims that tell them."""
        claims = (self.files.read(_fault(name)) for name in self.files.names("faults"))
        found = (_CLAIM.fullmatch(claim or b"") for claim in claims)
        return sorted(float(claim[1]) for claim in found if claim is not None)

    def final(self, specs: Sequence[TensorSpec], config: Mapping[str, Any]) -> AbstractContextManager[FinalWriter]:
        """Writes final/; see `final_writer`."""
        return final_writer(self.files, specs, config)

    @property
    def log_folder(self) -> str | None:
        """Where processes of this machine write their logs; None on an object store."""
        return self.files.where("logs") if isinstance(self.files, LocalFiles) else None


_CLAIM = re.compile(rb"(\d{1,12}\.\d{1,9}) [0-9a-f]{32}")
"""Of a fault: the unix second, and who has made it."""


def _once(call: Callable[[], None]) -> None:
    call()


def _world(generation: int) -> str:
    return f"worlds/{generation:06d}.json"


def _fault(key: str) -> str:
    return f"faults/{key}"


def world_record(world: World, spares: Sequence[WorkerInfo], time: float) -> Record:
    """worlds/NNNNNN.json of a world that was opened at `time` (unix seconds)."""
    places = world.layout.places
    members = []
    for info in world.members:
        place = places[info.worker_id]
        who = {k: getattr(info, k) for k in ("worker_id", "node_id", "pid", "device", "kind", "visible_devices")}
        members.append({**who, "rank": place.rank, "pipeline": place.pipeline, "stage": place.stage, "tp": place.tp})
    return {
        "generation": world.generation,
        "cause": world.cause,
        "reason": world.reason,
        "time": time,
        "base_step": world.base.step,
        "base_generation": world.base.generation,
        "layout": layout_record(world.layout),
        "members": members,
        "spares": [{"worker_id": s.worker_id, "node_id": s.node_id, "pid": s.pid} for s in spares],
    }


def layout_record(layout: Layout) -> Record:
    """Pipelines with their micro-batches, stages with their layers (both half-open) and members by TP rank."""
    return {
        "pipelines": [
            {
                "micro_batches": [p.micro_start, p.micro_stop],
                "stages": [{"layers": [s.start, s.stop], "members": list(s.members)} for s in p.stages],
            }
            for p in layout.pipelines
        ]
    }
