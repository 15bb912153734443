"""The work of the model that a configuration names: counted, and what was measured of it. Imports torch."""

from dataclasses import dataclass, replace

from evenkeel.config import Config, ConfigError
from evenkeel.core.model import ModelShape
from evenkeel.engine.counting import count_work
from evenkeel.engine.model import model_shape
from evenkeel.plan.hardware import Cluster
from evenkeel.plan.workload import LayerWork, Profile, Workload
from evenkeel.runtime.job import make_data, make_model
from evenkeel.runtime.prepare import blamed, check_samples
from evenkeel.runtime.profiled import key_of
from evenkeel.store.errors import StoreError
from evenkeel.store.run_directory import PROFILE, RunDirectory


@dataclass(frozen=True, slots=True)
class Counted:
    """A model's work and its shape."""

    work: Workload
    shape: ModelShape


def work_of(config: Config, device_type: str) -> Counted:
    """Counts the model on the first micro-batch of its data.

    Args:
        device_type: "cuda" or "cpu", where the kernels keep more.

    Raises:
        ConfigError: naming key and file, for a model or data that cannot be built or counted.
    """
    with blamed(config, "model.name", repr(config.model.name)):
        model = make_model(config)
        shape = model_shape(model)
    with blamed(config, "data.name", repr(config.data.name)):
        data = make_data(config, model)
        inputs, targets = check_samples(data.train.get((0,) * config.train.micro_batch))
    with blamed(config, "model.name", repr(config.model.name)):
        return Counted(count_work(model, inputs, targets, config.train.precision, device_type), shape)


def measured(config: Config, shape: ModelShape, run: str, cluster: Cluster) -> Profile:
    """What `evenkeel profile` measured of this model in a run.

    Raises:
        StoreError: if there is no profile, or it is damaged.
        ConfigError: if it is of another model, of this one under another configuration, or of other devices only.
    """
    directory = RunDirectory.at(run)
    where = directory.files.where(PROFILE)
    record = directory.read_profile()
    if record is None:
        raise StoreError(f"{where}: is not there; measure with: evenkeel profile {run}")
    why = key_of(config, shape).difference(record.key)
    if why:
        raise ConfigError(f"does not fit this configuration: {why}", source=where)
    known = sorted({device.kind for device in record.devices})
    if not any(node.device.name in known for node, _ in cluster.nodes):
        raise ConfigError(f"is of {' and '.join(known)}, of which the cluster has none", source=where)
    return record.profile


def with_measured_bytes(work: Workload, profile: Profile) -> Workload:
    """With what each layer was measured to keep; TP cuts the same part of it as was counted."""
    if not profile.kept_bytes:
        return work
    layers = (_keeping(layer, kept) for layer, kept in zip(work.layers, profile.kept_bytes, strict=True))
    return replace(work, layers=tuple(layers))


def _keeping(layer: LayerWork, kept: int) -> LayerWork:
    split = kept * layer.split_kept_bytes // max(1, layer.kept_bytes)
    return replace(layer, kept_bytes=kept, split_kept_bytes=split)
