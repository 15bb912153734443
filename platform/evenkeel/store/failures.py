"""What a store's client raises: whether it passes by waiting, and what it means in one line, without secrets.

Clients are known by the names of their errors, not imported: most users have only one of them, or none.
"""

import errno
import os
import re
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import quote, unquote

from evenkeel.config_values import HIDDEN, credentials_in, hide_in_url, query_secrets
from evenkeel.store.errors import StoreError

_PASSING = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH,
    errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.EAGAIN, errno.EINTR, errno.ESTALE,
}  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT}
"""They, like EIO, are not among the passing: they outlast any wait, so the next checkpoint is the time to try again."""

_PASSING_CLASSES = {
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.parsers.ResponseParserError",
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
}
_LASTING_CLASSES = {"botocore.exceptions.SSLError", "aiohttp.client_exceptions.ClientSSLError"}

_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
# 409: another conditional write to the same name is under way, or the like.
_PASSING_CODES = {"ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown", "Throttling"}

_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_ELSEWHERE = "or use another run.storage_path"
_EXPLANATIONS = {
    "NoSuchBucket": "no such bucket; create it, or correct run.storage_path",
    "InvalidAccessKeyId": f"the server does not know the access key; {_KEYS}",
    "SignatureDoesNotMatch": f"the server refuses the secret; {_KEYS}",
    "ExpiredToken": "the credentials have expired; renew them",
    "AccessDenied": "access denied; the key must be allowed to read, write, list and delete here",
    "botocore.exceptions.NoCredentialsError": "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "EACCES": f"Permission denied; let this user write here, {_ELSEWHERE}",
    "EROFS": f"Read-only file system; mount it writable, {_ELSEWHERE}",
    "ENOSPC": f"No space left on device; free some, {_ELSEWHERE}",
    "EDQUOT": f"Disk quota exceeded; free some space, {_ELSEWHERE}",
    "EFBIG": f"File too large; raise the limit (ulimit -f), {_ELSEWHERE}",
}
"""By server's error code, class of a client's error or name of an errno."""

_SECRETS_IN_ENVIRONMENT = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_PLAIN = ("url", "name", "mode", "version", "style", "region", "host")
"""What the keys of options end in whose texts are no secrets, such as config_kwargs.s3.addressing_style."""

_NAME = re.compile("^.*?(?::|%3a)", re.IGNORECASE | re.DOTALL)
"""Of a user, before the password."""

_CUTS = re.compile("[/:@?#]")
_SHORTEST = 4
"""Letters of what is hidden: less than that tells nothing, and is part of every other word."""


def transient(error: BaseException) -> bool:
    """Whether the same call may succeed later with nothing changed but the store: by the error or what caused it.

    A refused or broken connection, a timeout, a server that is down, overloaded or failing.
    """
    causes = list(_causes(error))
    if any(_LASTING_CLASSES & _class_names(cause) for cause in causes):
        return False
    return any(_passes(cause) for cause in causes)


def full(error: BaseException) -> bool:
    """Whether the disk, or what the user may take of it, is full."""
    return any(
        cause.full if isinstance(cause, StoreError) else getattr(cause, "errno", None) in _FULL
        for cause in _causes(error)
    )


def no_bucket(error: BaseException) -> bool:
    """Whether what was not found is the whole bucket: clients raise FileNotFoundError for it, as for a file."""
    return "NoSuchBucket" in _names(error)


def refuses_condition(error: BaseException) -> bool:
    """Whether a server did not write as the condition is not met, or because it does not know such conditions."""
    return not {"NotImplemented", "PreconditionFailed"}.isdisjoint(_names(error))


def past_the_end(error: BaseException) -> bool:
    """Whether a byte range was refused because the file ends before it."""
    return "InvalidRange" in _names(error)


def explain(error: BaseException, secrets: Collection[str] = ()) -> str:
    """What went wrong in one line, without the secrets, and with the way out where it is known."""
    for name in _names(error):
        if name in _EXPLANATIONS:
            return _EXPLANATIONS[name]
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(hide(text, secrets).split()) or type(error).__name__


def secrets_in(options: Any) -> frozenset[str]:
    """Every text in storage options, however deep, that may be one, and what clients take from the environment.

    Addresses stay readable, but for credentials in them: they are what an error is about.
    """
    found = {os.environ.get(name, "") for name in _SECRETS_IN_ENVIRONMENT}
    waiting = [options]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                plain = isinstance(inner, str) and str(key).lower().endswith(_PLAIN)
                waiting.append(said_of(inner) if plain else inner)
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, str):
            found.update((value.strip(), *said_of(value)))
    return frozenset(text for text in found if len(text) >= _SHORTEST)


def hide(text: str, secrets: Collection[str]) -> str:
    for secret in sorted(_spellings(secrets), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def reveals(error: BaseException, secrets: Collection[str]) -> bool:
    """Whether a traceback of the error would show one of them."""
    shown = [f"{each} {each!r} {getattr(each, '__notes__', '')}" for each in _shown(error)]
    return any(secret in text for text in shown for secret in _spellings(secrets))


def said_of(url: str) -> list[str]:
    """What a client may say of the secrets in a URL, which it cuts where it takes bucket, host or path to end.

    "user:password", the password, its pieces, and what follows each cut: s3://user:a/b/c@bucket is to S3's client the
    path b/c@bucket in a bucket "user:a".
    """
    said = credentials_in(url)
    for secret in [*(_NAME.sub("", each) for each in said), *query_secrets(url)]:
        for spelling in (secret, unquote(secret)):
            said += [spelling, *_CUTS.split(spelling)]
            said += [spelling[cut.end() :] for cut in _CUTS.finditer(spelling)]
    return said


def without_credentials(url: str) -> str:
    """The URL without user:password@, and with the values of secret query parameters hidden."""
    return hide_in_url(url).replace(f"://{HIDDEN}@", "://")


def _spellings(secrets: Collection[str]) -> set[str]:
    """With those that stand in URLs or in quotes for the same, and that these stand for."""
    others = {spell(secret) for secret in secrets for spell in (unquote, quote, _quote_all, _in_quotes)}
    return {*secrets, *(text for text in others if len(text) >= _SHORTEST)}


def _quote_all(text: str) -> str:
    return quote(text, safe="")


def _in_quotes(text: str) -> str:
    return repr(text)[1:-1]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, back to the first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _shown(error: BaseException) -> list[BaseException]:
    """The error, and those that a traceback of it tells: what each was raised from, or while what was handled."""
    shown: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in shown:
        shown.append(each)
        each = each.__cause__ if each.__suppress_context__ else each.__context__
    return shown


def _passes(error: BaseException) -> bool:
    if isinstance(error, StoreError):
        return error.passes
    if isinstance(error, ConnectionError | TimeoutError) or _PASSING_CLASSES & _class_names(error):
        return True
    status, code = _answer(error)
    return status in _PASSING_STATUS or code in _PASSING_CODES or getattr(error, "errno", None) in _PASSING


def _answer(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code of a server's answer, as botocore keeps them; (0, "") if the error is no answer."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return 0, ""
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status, str(response.get("Error", {}).get("Code", ""))


def _names(error: BaseException) -> list[str]:
    """What may stand for the error in a table: error codes of servers, names of errno, names of classes."""
    names: list[str] = []
    for cause in _causes(error):
        number = getattr(cause, "errno", None)
        names += [_answer(cause)[1], errno.errorcode.get(number, "") if isinstance(number, int) else ""]
        names += _class_names(cause)
    return names


def _class_names(error: BaseException) -> set[str]:
    return {f"{c.__module__}.{c.__qualname__}" for c in type(error).__mro__}
