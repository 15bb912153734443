"""The work of the model that a configuration names, counted."""

from evenkeel.config import Config
from evenkeel.engine.counting import count_work
from evenkeel.plan.workload import Workload
from evenkeel.runtime.job import make_data, make_model
from evenkeel.runtime.prepare import blamed, check_samples


def work_of(config: Config, device_type: str) -> Workload:
    """Counts the model on the first micro-batch of its data. Imports torch.

    Args:
        device_type: "cuda" or "cpu", where the kernels keep more.

    Raises:
        ConfigError: naming key and file, for a model or data that cannot be built or counted.
    """
    with blamed(config, "model.name", repr(config.model.name)):
        model = make_model(config)
    with blamed(config, "data.name", repr(config.data.name)):
        data = make_data(config, model)
        inputs, targets = check_samples(data.train.get((0,) * config.train.micro_batch))
    with blamed(config, "model.name", repr(config.model.name)):
        return count_work(model, inputs, targets, config.train.precision, device_type)
