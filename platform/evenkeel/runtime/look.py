"""What a run directory holds before anything is started: whether it can be used, and whether it is of the same run."""

from evenkeel.config import Config, ConfigError, changes, config_from_yaml, differences, stored_fingerprint
from evenkeel.config_values import hide_in_url
from evenkeel.runtime.origin import check_fit
from evenkeel.runtime.prepare import Prepared
from evenkeel.store.errors import StoreError
from evenkeel.store.run_directory import RunDirectory, RunRecord

STORAGE = "run.storage_path"


def check_shared(config: Config) -> None:
    """Raises ConfigError for a storage path that only this process would see."""
    if hide_in_url(config.run.storage_path) != config.run.storage_path:
        what = 'holds credentials, or a ":" before an "@" like them, which the run\'s other processes would not get'
        how = "give them in the environment, for S3 as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise config.error(STORAGE, f"{what}; {how}")
    if config.run.storage_path.rpartition("::")[2].startswith("memory:"):
        what = (
            f"{config.run.storage_path!r} is memory of one process; the run's processes need a store that all can see"
        )
        raise config.error(STORAGE, what)


def look(prepared: Prepared) -> RunRecord | None:
    """What there is of the run.

    Raises:
        ConfigError: the storage cannot be used, or holds a run of this name with another configuration.
    """
    try:
        record = prepared.directory.read_run()
    except StoreError:
        _check_writable(prepared.config)  # which tells more, if it is the storage
        raise
    if record is None:
        _check_writable(prepared.config)
    else:
        check_same(prepared)
    return record


def look_only(prepared: Prepared) -> None:
    """Like `look`, without a trace: whether the storage can be written to is not tried."""
    if prepared.directory.read_run() is not None:
        check_same(prepared)
    check_fit(prepared)


def _check_writable(config: Config) -> None:
    try:
        RunDirectory.at(config.run.storage_path).check_writable()
    except StoreError as error:
        raise config.error(STORAGE, str(error)) from None


def check_same(prepared: Prepared) -> Config:
    """The configuration of the run in this directory.

    Raises:
        ConfigError: for the first key that differs from it, and may not.
    """
    config, directory = prepared.config, prepared.directory
    text = directory.read_config()
    where = f"{directory.url}/config.yaml"
    if text is None:
        raise ConfigError("is missing beside run.json", source=where)
    stored = config_from_yaml(text, where)
    for key, old, new in differences(stored, config):
        raise config.error(key, f"is {new!r}, but the run in {directory.url} has {old!r}; choose another run.name")
    if stored_fingerprint(text) != prepared.fingerprint:
        what = f"{hide_in_url(config.data.path)} is not the data that the run in {directory.url} began with"
        raise config.error("data.path", f"{what}; choose another run.name")
    return stored


def what_it_keeps(running: Config, given: Config) -> list[str]:
    """In one line, if there is any, what was given and does not count for a run that is running already."""
    kept = [f"{key}={old!r}, not {new!r}" for key, old, new in changes(running, given)]
    after = "submit again after it has ended to use what is given now"
    return [f"the running run keeps {'; '.join(kept)}; {after}"] if kept else []
