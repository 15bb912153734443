"""How the file systems of object stores are opened, where the defaults of their clients do not suit a run."""

from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

Options = dict[str, Any]

S3: Options = {
    # Others write to the same folders: a listing that is remembered is wrong.
    "use_listings_cache": False,
    # With more, s3fs asks for a file's size before it reads it: two requests instead of one.
    "max_concurrency": 1,
    "config_kwargs": {
        "connect_timeout": 5,
        # For the answer, not for the transfer; some servers take long to put many parts together.
        "read_timeout": 20,
        # A hiccup is bridged here, without a word. What lasts longer is the business of store/retry.py, which reports.
        "retries": {"mode": "standard", "total_max_attempts": 3},
    },
}
S3_TRIES = 1
"""s3fs would repeat five times all that botocore has repeated already, and be silent for minutes."""


def open_file_system(url: str, options: Options | None = None) -> tuple[AbstractFileSystem, str]:
    """The file system of an fsspec URL or local path, and the path in it. `options` go before what is set here.

    Raises:
        ImportError: no such file system is installed.
        ValueError, TypeError, OSError: there is none of that name, or it does not take these options.
    """
    on_s3 = url.startswith(("s3://", "s3a://"))
    fs, path = fsspec.core.url_to_fs(url, **(merged(S3, options or {}) if on_s3 else options or {}))
    if on_s3:
        fs.retries = S3_TRIES
    return fs, path


def merged(below: Options, above: Options) -> Options:
    """Both; where both have a key, dictionaries are merged and of other values `above` has its way."""
    both = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = merged(below[key], above[key])
    return both
