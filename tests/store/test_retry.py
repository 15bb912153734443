"""What passes is waited for, no longer than stated and not deaf to a stop; what does not is raised at once."""

import errno
import random
import threading
from collections.abc import Callable, Iterable
from itertools import islice
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenkeel.store.errors import StoreError
from evenkeel.store.failures import explain, hide, reveals, said_of, secrets_in, transient
from evenkeel.store.options import merged
from evenkeel.store.retry import EXCUSED, Patience, Trouble, Unhurried, retrying


def caused(cause: BaseException, text: str = "s3://b/x: down") -> StoreError:
    error = StoreError(text)
    error.__cause__ = cause
    return error


REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")


class Clock:
    """Time that passes only while something waits, or a call takes so long."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        self.pauses.append(seconds)
        return False

    def failing(self, errors: Iterable[BaseException], takes_s: float = 0.0) -> Callable[[], str]:
        rest = iter(errors)

        def call() -> str:
            self.now += takes_s
            for error in rest:
                raise error
            return "done"

        return call


def test_a_passing_error_is_waited_out_and_each_attempt_reported() -> None:
    clock, told = Clock(), list[Trouble]()
    call = clock.failing([caused(REFUSED), caused(TimeoutError("slow")), caused(REFUSED)], takes_s=1.0)
    assert retrying(call, told.append, clock.wait, Patience(60, 1, 3), clock) == "done"
    assert [(t.attempt, t.pause_s) for t in told] == list(enumerate(clock.pauses, start=1))
    assert all(low <= pause <= 2 * low for low, pause in zip((0.5, 1, 1.5), clock.pauses, strict=True))
    assert told[2].since_s == pytest.approx(3 + sum(clock.pauses[:2]))
    assert "slow" in str(told[1].error.__cause__)


def test_a_lasting_error_is_raised_at_once_as_it_was() -> None:
    clock, error = Clock(), caused(PermissionError("Access Denied"))
    with pytest.raises(StoreError) as caught:
        retrying(clock.failing([error]), pytest.fail, clock.wait, clock=clock)
    assert caught.value is error


def test_errors_that_are_not_the_stores_pass_through() -> None:
    clock = Clock()
    with pytest.raises(KeyError):
        retrying(clock.failing([KeyError("x")]), pytest.fail, clock.wait, clock=clock)


def test_patience_ends_with_what_was_wrong_and_how_long_it_was_tried() -> None:
    clock, told = Clock(), list[Trouble]()
    with pytest.raises(StoreError, match=r"s3://b/x: down \(given up after \d+ attempts in \d+ s\)") as caught:
        retrying(clock.failing([caused(REFUSED)] * 99), told.append, clock.wait, Patience(30, 1, 8), clock)
    assert clock.now <= 30
    assert clock.now > 30 - 8, "the last pause that did not fit"
    assert transient(caught.value), "who asks later still sees the cause"
    assert f"after {len(told) + 1} attempts" in str(caught.value)


def test_an_attempt_that_got_on_for_long_and_then_failed_is_repeated() -> None:
    """15 GB at 50 MB/s, all well, and then one connection is reset."""
    clock, told = Clock(), list[Trouble]()
    call = clock.failing([caused(ConnectionResetError(errno.ECONNRESET, "reset"))], takes_s=300.0)
    assert retrying(call, told.append, clock.wait, clock=clock, moved_at=clock) == "done"
    assert [t.since_s for t in told] == [300.0]


def test_attempts_that_get_on_and_fail_are_not_repeated_for_ever() -> None:
    clock, told = Clock(), list[Trouble]()
    call = clock.failing([caused(REFUSED)] * 99, takes_s=300.0)
    with pytest.raises(StoreError, match=rf"given up after {EXCUSED + 1} attempts in 12\d\d s"):
        retrying(call, told.append, clock.wait, clock=clock, moved_at=clock)
    assert len(told) == EXCUSED


def test_who_got_on_a_little_and_then_waited_has_waited() -> None:
    clock = Clock()
    call = clock.failing([caused(REFUSED)], takes_s=300.0)
    with pytest.raises(StoreError, match="given up after 1 attempts in 300 s"):
        retrying(call, pytest.fail, clock.wait, clock=clock, moved_at=lambda: 10.0)


@given(takes=st.lists(st.floats(0, 1000), max_size=20), waits=st.floats(0, 50))
def test_the_time_for_which_attempts_got_on_does_not_count_but_of_few(takes: list[float], waits: float) -> None:
    """Each gets on for some time, then waits and fails; short ones do not use up what the long ones may take."""
    clock, begun, moved_at = Clock(), list[float](), 0.0
    rest = iter(takes)

    def attempt() -> str:
        nonlocal moved_at
        begun.append(clock.now)
        for takes_s in rest:
            moved_at = clock.now + takes_s
            clock.now = moved_at + waits
            raise caused(REFUSED)
        return "done"

    patience, told = Patience(100, 1, 8), list[Trouble]()
    try:
        assert retrying(attempt, told.append, clock.wait, patience, clock, moved_at=lambda: moved_at) == "done"
    except StoreError:
        assert clock.now - sum(sorted(takes[: len(begun)])[-EXCUSED:]) + patience.most_s > patience.total_s - 1e-6
    for n, at in enumerate(begun):
        assert at <= patience.total_s + sum(sorted(takes[:n])[-EXCUSED:]) + 1e-6


def test_a_stop_ends_the_wait_at_once() -> None:
    stop, waiting = threading.Event(), threading.Event()
    ended: list[BaseException] = []
    error = caused(REFUSED)

    def fail() -> None:
        raise error

    def upload() -> None:
        try:
            retrying(fail, lambda trouble: waiting.set(), stop.wait, Patience(3600, 3600, 3600))
        except StoreError as e:
            ended.append(e)

    thread = threading.Thread(target=upload)
    thread.start()
    assert waiting.wait(60)
    stop.set()
    thread.join(60)
    assert ended == [error]


def test_the_unhurried_wait_as_long_as_it_takes_and_tell_it_in_few_lines() -> None:
    clock, told = Clock(), list[Trouble]()
    call, patience = clock.failing([caused(REFUSED)] * 1000), Unhurried(lambda: False, Patience(30, 1, 8))
    assert retrying(call, told.append, clock.wait, patience, clock) == "done"
    assert clock.now > 3600
    assert [t.attempt for t in told if t.is_news] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    call = clock.failing([caused(PermissionError(errno.EACCES, ""), "Permission denied")])
    with pytest.raises(StoreError, match="Permission denied"):
        retrying(call, pytest.fail, clock.wait, patience, clock)


@pytest.mark.parametrize("hurried_at", [1, 50])
def test_in_a_hurry_they_wait_no_longer_than_others(hurried_at: int) -> None:
    """Counted from the first attempt on; what has failed for longer already is tried once more."""
    clock, patience = Clock(), Unhurried(lambda: False, Patience(30, 1, 8))

    def report(trouble: Trouble) -> None:
        if trouble.attempt == hurried_at:
            patience.hurry()

    with pytest.raises(StoreError, match=r"s3://b/x: down \(given up after \d+ attempts in \d+ s\)"):
        retrying(clock.failing([caused(REFUSED)] * 99), report, clock.wait, patience, clock)
    if hurried_at == 1:
        assert 30 - 8 < clock.now <= 30
    else:
        assert len(clock.pauses) == 50 and clock.now > 30


def test_a_pause_ends_when_somebody_gets_into_a_hurry() -> None:
    asked = threading.Event()
    for begin in (asked.set, None):
        patience = Unhurried(asked.is_set)
        thread = threading.Thread(target=patience.wait, args=(3600,))
        thread.start()
        (begin or patience.hurry)()
        thread.join(60)
        assert not thread.is_alive() and patience.total_s == 30.0
        asked.clear()
    waiting = Unhurried(lambda: False)
    assert waiting.wait(0.01) is False and waiting.total_s == inf


times = st.floats(0.01, 1000)


@given(first=times, most=times, seed=st.integers(0, 2**32))
def test_pauses_double_up_to_a_bound(first: float, most: float, seed: int) -> None:
    pauses = list(islice(Patience(1, first, most).pauses(random.Random(seed)), 20))
    for n, pause in enumerate(pauses):
        longest = min(first * 2**n, most)
        assert longest / 2 <= pause <= longest * (1 + 1e-12)


@given(total=st.floats(0, 500), first=times, most=times, takes=st.floats(0, 50), failures=st.integers(0, 60))
def test_no_attempt_begins_after_the_stated_time(
    total: float, first: float, most: float, takes: float, failures: int
) -> None:
    clock, begun = Clock(), list[float]()
    call = clock.failing([caused(REFUSED)] * failures, takes)

    def attempt() -> str:
        begun.append(clock.now)
        return call()

    try:
        assert retrying(attempt, lambda trouble: None, clock.wait, Patience(total, first, most), clock) == "done"
    except StoreError:
        assert len(begun) <= failures
    assert all(at <= total * (1 + 1e-9) for at in begun)


class Answer(Exception):  # noqa: N818
    """As botocore's ClientError keeps what the server said."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("cause", "passes"),
    [
        (REFUSED, True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.EHOSTUNREACH, ""), True),
        (OSError(errno.ESTALE, ""), True),
        (Answer(500, "InternalError"), True),
        (Answer(503, "SlowDown"), True),
        (Answer(409, "ConditionalRequestConflict"), True),
        (Answer(400, "RequestTimeout"), True),
        (Answer(429, ""), True),
        (Answer(403, "SignatureDoesNotMatch"), False),
        (Answer(404, "NoSuchBucket"), False),
        (Answer(409, "BucketAlreadyExists"), False),
        (Answer(412, "PreconditionFailed"), False),
        (Answer(501, "NotImplemented"), False),
        (OSError(errno.ENOSPC, ""), False),
        (OSError(errno.EIO, ""), False),
        (PermissionError(errno.EACCES, ""), False),
        (FileNotFoundError(), False),
        (ValueError(), False),
    ],
)
def test_what_passes_by_waiting(cause: Exception, passes: bool) -> None:
    assert transient(caused(cause)) is passes
    between = OSError(errno.EREMOTEIO, "as s3fs wraps it")
    between.__cause__ = cause
    assert transient(caused(between)) is passes


def test_clients_are_known_by_name() -> None:
    errors = pytest.importorskip("botocore.exceptions")
    url = {"endpoint_url": "http://x"}
    assert transient(caused(errors.EndpointConnectionError(**url, error="")))
    assert transient(caused(errors.ReadTimeoutError(**url, error="")))
    assert not transient(caused(errors.SSLError(**url, error=""))), "a wrong certificate stays wrong"
    assert not transient(caused(errors.NoCredentialsError()))
    assert "set AWS_ACCESS_KEY_ID" in explain(errors.NoCredentialsError())


def test_explanations_are_one_line() -> None:
    assert explain(OSError(errno.ENOSPC, "x")).startswith("No space left on device; free some")
    assert explain(ValueError("a\n  b")) == "a b"
    assert explain(ValueError()) == "ValueError"


def test_secrets_are_found_in_options_and_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "from the environment")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    options = {
        "secret": "hush-hush",
        "client_kwargs": {"deep": ["down below"]},
        "endpoint_url": "http://there",
        "anon": False,
        "key": "abc",
    }
    secrets = secrets_in(options)
    assert secrets == {"hush-hush", "down below", "from the environment"}
    assert hide("down belowhush-hush at http://there", secrets) == "****** at http://there"


def test_what_plainly_is_no_secret_stays_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SESSION_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    plain = {
        "config_kwargs": {"s3": {"addressing_style": "path"}, "signature_version": "s3v4"},
        "client_kwargs": {"region_name": "eu-central-1"},
        "region": "eu-central-1",
        "host": "minio",
    }
    assert secrets_in(plain) == frozenset()
    told = explain(ValueError("no path of s3v4 in eu-central-1"), secrets_in({**plain, "key": "minio"}))
    assert told == "no path of s3v4 in eu-central-1"
    addresses = {"endpoint_url": "http://me:hush-hush@minio:9000", "proxies": {"http": "http://us:hush@proxy"}}
    said = hide("at minio:9000 with hush-hush or me:hush-hush by us:hush@proxy", secrets_in(addresses))
    assert said == "at minio:9000 with *** or *** by ***@proxy"
    assert hide("hush-hush", secrets_in({"token": "hush-hush\n"})) == "***"


def test_what_clients_say_of_credentials_in_a_url_is_hidden() -> None:
    """As they are, as they stand in another URL, or in the pieces that bucket and path are to a client of S3."""
    secrets = secrets_in(said_of("s3://AKIAEXAMPLE:wJal/K7/bPxR%2BfiCY@bucket/runs"))
    for said, shown in (
        ("no AKIAEXAMPLE:wJal/K7/bPxR%2BfiCY@bucket", "no ***@bucket"),
        ("no wJal/K7/bPxR+fiCY here", "no *** here"),
        ("no wJal%2FK7%2FbPxR%2BfiCY here", "no *** here"),
        ("no bucket AKIAEXAMPLE:wJal", "no bucket AKIAEXAMPLE:***"),
        ("no file K7/bPxR%2BfiCY@bucket/runs", "no file ***@bucket/runs"),
        ("no file K7/bPxR+fiCY", "no file ***"),
        ("no file bPxR%252BfiCY", "no file ***"),
    ):
        assert hide(said, secrets) == shown
        assert reveals(OSError(said), secrets) and not reveals(OSError(shown), secrets)
    assert said_of("s3://bucket/runs@home") == []
    queried = said_of("s3://bucket/runs?token=hush%2Fhush&region=eu-central/run")
    assert hide("no runs?token=hush/hush&region=eu-central/run", queried) == "no runs?token=***&region=eu-central/run"
    assert hide("at host/hu%2Fsh with hu/sh", ["hu/sh"]) == "at host/*** with ***"


def test_secrets_are_hidden_where_they_are_quoted_or_noted() -> None:
    options = {"key": "hu\\sh\nhush"}
    secrets = secrets_in(options)
    assert hide(f"not with {options}", secrets) == "not with {'key': '***'}"
    error = OSError("no")
    assert not reveals(error, secrets)
    error.add_note(f"with {options['key']}")
    assert reveals(error, secrets)


def test_the_way_out_is_readable_whatever_the_secrets_are() -> None:
    assert explain(Answer(404, "NoSuchBucket"), ["path"]) == "no such bucket; create it, or correct run.storage_path"
    assert explain(ValueError("a hush\n b"), ["hush\n"]) == "a *** b"


def test_options_given_go_before_ours_and_deep_ones_are_merged() -> None:
    ours = {"a": 1, "config": {"retries": {"n": 3}, "t": 5}}
    assert merged(ours, {"a": 2, "config": {"t": 6}, "b": 0}) == {
        "a": 2, "b": 0, "config": {"retries": {"n": 3}, "t": 6},
    }  # fmt: skip
    assert ours == {"a": 1, "config": {"retries": {"n": 3}, "t": 5}}
