"""What a run makes of a profile that lies in its directory: its first shares and cuts."""

import json
from dataclasses import dataclass
from hashlib import blake2b

from evenkeel.config import Config
from evenkeel.config_values import hide_secrets
from evenkeel.core.codec import dump
from evenkeel.core.layout import slowed_kind
from evenkeel.core.model import ModelShape
from evenkeel.plan.speeds import Speeds
from evenkeel.store.errors import StoreError
from evenkeel.store.profiles import Key, ProfileRecord
from evenkeel.store.run_directory import PROFILE, RunDirectory

SHOWN = 4
"""Kinds of device that a line names."""


@dataclass(frozen=True, slots=True)
class Profiled:
    """What a profile says of a run; `note` is a line that tells, "" if there is no profile."""

    speeds: Speeds | None = None
    note: str = ""


def profiled(config: Config, shape: ModelShape, directory: RunDirectory) -> Profiled:
    """What lies in the run's directory, as far as it is of this run: nothing else is used, and no error either."""
    if not config.parallel.rebalance:
        return Profiled()
    try:
        record = directory.read_profile()
    except StoreError as error:
        return Profiled(None, f"profile not used: {error}")
    if record is None:
        return Profiled()
    tensor = config.parallel.tensor or 1
    why = key_of(config, shape).difference(record.key)
    speeds = None if why else Speeds.profiled(record.profile, tensor)
    if speeds is None:
        why = why or f"it has no times at TP {tensor}"
        return Profiled(None, f"profile not used: {directory.files.where(PROFILE)}: {why}")
    kinds = [f"{kind} {seconds:.3g} s" for kind, seconds in sorted(speeds.kinds.items())]
    more = f" and {len(kinds) - SHOWN} more kinds" if len(kinds) > SHOWN else ""
    return Profiled(speeds, f"it begins as it was profiled: a micro-batch takes {', '.join(kinds[:SHOWN])}{more}")


def key_of(config: Config, shape: ModelShape) -> Key:
    """What a profile of this model under this configuration is of."""
    said = {
        "model": [config.model.name, hide_secrets(config.model.options)],
        "data": [config.data.name, hide_secrets(config.data.options)],
        "shape": dump(shape, ModelShape),
        "train": [config.train.precision, config.train.micro_batch],
    }
    text = json.dumps(said, sort_keys=True, default=repr)
    return Key(
        model=config.model.name,
        precision=config.train.precision,
        micro_batch=config.train.micro_batch,
        layers=tuple(layer.name for layer in shape.layers),
        fingerprint=blake2b(text.encode(), digest_size=16).hexdigest(),
    )


def degrees(config: Config) -> tuple[int, ...]:
    """The TP degrees to measure."""
    return tuple(sorted({1, config.parallel.tensor or 1}))


def slowed(config: Config) -> tuple[tuple[int, float], ...]:
    """Ranks and factors of who is made slow in all steps: for some steps only it is no other kind of device."""
    emulate = config.emulate
    if emulate.from_step not in (None, 1) or emulate.to_step is not None:
        return ()
    return tuple((rank, factor) for rank, factor in sorted(emulate.slowdown.items()) if factor > 1)


def lacking(config: Config, record: ProfileRecord) -> str:
    """What the configuration asks for and the profile has not, in words; "" if it has all."""
    factors = sorted({factor for _, factor in slowed(config)})
    ends = {factor: slowed_kind("", factor) for factor in factors}
    unknown = [f for f in factors if not any(device.kind.endswith(ends[f]) for device in record.devices)]
    if unknown:
        return f"it has no times of devices slowed {', '.join(f'{factor:g}' for factor in unknown)} times"
    missing = sorted(set(degrees(config)) - record.degrees())
    return f"it has no times for TP {', '.join(map(str, missing))}" if missing else ""
