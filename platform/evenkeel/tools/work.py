"""The work of the model that a configuration names: counted, and what was measured of it. Imports torch."""

from dataclasses import dataclass

from evenkeel.config import Config, ConfigError
from evenkeel.core.model import ModelShape
from evenkeel.engine.counting import count_work
from evenkeel.engine.model import model_shape
from evenkeel.plan.workload import Profile, Workload
from evenkeel.runtime.job import make_data, make_model
from evenkeel.runtime.prepare import blamed, check_samples
from evenkeel.runtime.profiling import key_of
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


def measured(config: Config, shape: ModelShape, run: str) -> Profile:
    """What `evenkeel profile` measured of this model in a run.

    Raises:
        StoreError: if there is no profile, or it is damaged.
        ConfigError: if it is of another model, or of this one under another configuration.
    """
    directory = RunDirectory.at(run)
    where = directory.files.where(PROFILE)
    record = directory.read_profile()
    if record is None:
        raise StoreError(f"{where}: is not there; measure with: evenkeel profile {run}")
    why = key_of(config, shape).difference(record.key)
    if why:
        raise ConfigError(f"does not fit this configuration: {why}", source=where)
    return record.profile
