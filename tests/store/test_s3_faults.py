"""S3 servers that are killed, cut off, slow, failing or closed to us: a retry that succeeds, or one clear line."""

import logging
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any, cast

import pytest
from children import DATA, PART, PIECE, upload, upload_and_die
from proxy import Proxy
from servers import BUCKET, S3, Ceph, options

from evenkeel.store.errors import StoreError
from evenkeel.store.failures import transient
from evenkeel.store.files import Files, open_files
from evenkeel.store.journal import Journal
from evenkeel.store.retry import Patience, Trouble, Unhurried, retrying
from evenkeel.store.run_directory import RunDirectory

PATIENT = Patience(total_s=120, first_s=0.2, most_s=1)
HUSH = "hush-9f3c57e1a2"


@pytest.fixture(scope="module", params=["moto", pytest.param("rgw", marks=pytest.mark.rgw)])
def server(request: pytest.FixtureRequest) -> S3:
    """What is behind the link: neither forgets anything while it is cut off, and the one is quick, the other real."""
    if request.param == "moto":
        return cast(S3, request.getfixturevalue("moto"))
    return cast(Ceph, request.getfixturevalue("ceph")).s3


def retried(call: Callable[[], Any], told: list[Trouble]) -> Any:
    return retrying(call, told.append, threading.Event().wait, PATIENT)


def unfinished(server: S3) -> int:
    return len(server.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []))


# ------------------------------------------------------------ errors and cuts


@pytest.mark.parametrize(("status", "code"), [("503 Slow Down", "SlowDown"), ("500 Oops", "InternalError")])
def test_a_hiccup_is_bridged_without_a_word(linked: Files, link: Proxy, status: str, code: str) -> None:
    linked.replace("a", b"1")
    link.fail(1, status, code)
    linked.replace("a", b"2")
    assert link.errors_left == 0
    assert linked.read("a") == b"2"


def test_errors_that_last_are_reported_and_waited_out(linked: Files, link: Proxy) -> None:
    told: list[Trouble] = []
    link.fail(5, "503 Service Unavailable", "ServiceUnavailable")
    assert retried(lambda: linked.create("a", b"mine"), told) is True
    assert told and all("s3://tests/" in str(t.error) and len(str(t.error).splitlines()) == 1 for t in told)
    assert linked.read("a") == b"mine"


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.soak)])
def test_a_cut_of_some_seconds_is_waited_out(linked: Files, link: Proxy, seconds: float) -> None:
    linked.replace("a", b"1")
    link.cut()
    threading.Timer(seconds, link.mend).start()
    told: list[Trouble] = []
    journal = Journal(linked)
    retried(lambda: journal.append(1, [{"n": 1}]), told)
    assert told and f"http://127.0.0.1:{link.port}" in str(told[0].error)
    assert Journal(linked).read_all() == [{"n": 1}]


def test_a_controllers_lines_and_journal_wait_without_end_but_not_deaf_to_a_stop(
    root: str, linked: Files, link: Proxy
) -> None:
    stop, pauses = threading.Event(), threading.Semaphore(0)
    told: list[Trouble] = []
    ended: list[BaseException] = []

    def report(trouble: Trouble) -> None:
        told.append(trouble)
        pauses.release()

    # In a hurry it gives up at once, so that whatever goes well here has waited longer than it may in a hurry.
    patience = Unhurried(stop.is_set, Patience(total_s=0, first_s=0.02, most_s=0.1))
    run = RunDirectory(linked).patient(report, patience.wait, patience)
    journal = run.journal()

    def write(step: int) -> None:
        try:
            run.append_metrics({"step": step, "generation": 1})
            run.flush()
            journal.append(1, [{"step": step}])
        except StoreError as error:
            ended.append(error)

    write(1)
    link.cut()
    for step, then in ((2, link.mend), (3, stop.set)):
        thread = threading.Thread(target=write, args=(step,))
        thread.start()
        for _ in range(4):
            assert pauses.acquire(timeout=60)
        assert thread.is_alive()
        then()
        thread.join(60)
        assert not thread.is_alive()
        if step == 2:
            assert ended == [] and [line["step"] for line in RunDirectory(linked).metrics()] == [1, 2]
            assert Journal(linked).read_all() == [{"step": 1}, {"step": 2}]
            link.cut()
            while pauses.acquire(blocking=False):
                pass
    (error,) = ended
    assert isinstance(error, StoreError) and transient(error) and "(given up after" in str(error)
    assert all(f"http://127.0.0.1:{link.port}" in str(trouble.error) for trouble in told)


def test_an_error_that_shows_a_secret_is_waited_out_all_the_same(root: str, moto: S3) -> None:
    """An access key that is called as the bucket is stands in every URL that the client tells."""
    proxy = Proxy(moto.port)
    path_style = {"s3": {"addressing_style": "path"}, "retries": {"total_max_attempts": 2}}
    files = open_files(root, options(proxy, key=BUCKET, secret=HUSH, config_kwargs=path_style))
    files.replace("a", b"1")
    proxy.cut()
    told: list[Trouble] = []

    def report(trouble: Trouble) -> None:
        told.append(trouble)
        if len(told) == 1:
            proxy.mend()

    assert retrying(lambda: files.read("a"), report, threading.Event().wait, PATIENT) == b"1"
    said = f'{root}/a: Could not connect to the endpoint URL: "http://127.0.0.1:{proxy.port}/***/'
    assert str(told[0].error).startswith(said) and told[0].error.__cause__ is None
    proxy.close()


@pytest.mark.parametrize("upload_bytes", [PART // 2, PART + PART // 2, 2 * PART + PIECE // 2])
def test_a_cut_upload_is_invisible_and_repeated_whole(
    linked: Files, link: Proxy, server: S3, upload_bytes: int
) -> None:
    linked.names("")  # connects
    link.cut_after(upload_bytes)
    with pytest.raises(StoreError) as caught:
        upload(linked, "c/part")
    assert transient(caught.value)
    link.mend()
    assert linked.names("c") == [] and linked.read("c/part") is None
    told: list[Trouble] = []
    retried(lambda: upload(linked, "c/part"), told)
    assert linked.read("c/part") == DATA
    assert linked.drop_unfinished("c") <= 1
    assert unfinished(server) == 0


@pytest.mark.parametrize("fault", ["cut", "errors"])
def test_a_piece_of_an_upload_that_fails_is_sent_again_alone(
    linked: Files, link: Proxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Also where half of it was sent: what went before it is there, and stays."""
    fs = linked.fs  # type: ignore[attr-defined]
    call, asked = fs.call_s3, list[str]()

    def call_s3(method: str, **kwargs: Any) -> Any:
        asked.append(method)
        try:
            return call(method, **kwargs)
        except Exception:
            link.heal()
            raise

    def spoil() -> None:
        """The second of three pieces; the client tries twice."""
        if fault == "cut":
            link.cut_after(PART // 2)
        else:
            link.fail(2, "503 Slow Down", "SlowDown")

    monkeypatch.setattr(fs, "call_s3", call_s3)
    upload(linked, "c/part", 8, spoil)
    assert asked == ["create_multipart_upload", *["upload_part"] * 4, "complete_multipart_upload"]
    assert linked.read("c/part") == DATA


@pytest.mark.parametrize("seconds", [1, pytest.param(30, marks=pytest.mark.soak)])
def test_an_answer_that_is_late_is_awaited(linked: Files, link: Proxy, seconds: float) -> None:
    linked.names("")
    link.stall()
    threading.Timer(seconds, link.flow).start()
    told: list[Trouble] = []
    assert retried(lambda: linked.create("a", b"1"), told)
    assert linked.read("a") == b"1"


def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(root: str, link: Proxy) -> None:
    files = open_files(root, options(link, config_kwargs={"read_timeout": 0.5, "retries": {"total_max_attempts": 1}}))
    files.replace("a", b"1")
    link.stall()
    told: list[Trouble] = []

    def report(trouble: Trouble) -> None:
        told.append(trouble)
        link.flow()

    assert retrying(lambda: files.read("a"), report, threading.Event().wait, PATIENT) == b"1"
    assert "Read timeout" in str(told[0].error)


def test_a_lost_reply_to_a_conditional_put_is_ones_own_success(linked: Files, link: Proxy) -> None:
    linked.names("")
    link.lose_reply()
    assert linked.create("entry", b"mine"), "the client repeated it, and was refused by what it had written itself"
    link.lose_reply()
    assert not linked.create("entry", b"yours")
    assert linked.read("entry") == b"mine"


# ------------------------------------------------------------ files that give way


@pytest.mark.parametrize(
    ("count", "status", "code", "again"),
    [(2, "503 Service Unavailable", "ServiceUnavailable", 1), (1, "412 Precondition Failed", "PreconditionFailed", 0)],
    ids=["one that passes", "a tag is refused in one spelling"],
)
def test_after_an_error_a_file_gives_way_only_to_whoever_has_just_seen_it(
    linked: Files, link: Proxy, server: S3, root: str, count: int, status: str, code: str, again: int
) -> None:
    """Somebody else is quicker by a moment than the request that follows the error."""
    linked.replace("n", b"1")
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    link.before_put(b"/n", lambda: server.client.put_object(Bucket=bucket, Key=f"{prefix}/n", Body=b"theirs"))
    seen: list[bytes | None] = []

    def gives_way() -> bool:
        seen.append(linked.read("n"))
        if len(seen) == 1:
            link.fail(count, status, code)
        return seen[-1] == b"1"

    told: list[Trouble] = []
    assert retried(lambda: linked.replace_if("n", b"mine", gives_way), told) is False
    assert len(told) == again and seen == [b"1", *again * [b"1"], b"theirs"]
    assert link.errors_left == 0
    assert linked.read("n") == b"theirs"


@pytest.mark.parametrize(
    ("status", "code"),
    [("501 Not Implemented", "NotImplemented"), ("412 Precondition Failed", "PreconditionFailed")],
    ids=["says so", "refuses its own tags"],
)
def test_a_server_that_knows_no_such_condition_is_asked_without(
    linked: Files, link: Proxy, status: str, code: str
) -> None:
    linked.replace("n", b"1")

    def gives_way() -> bool:
        link.fail(2, status, code)
        return True

    assert linked.replace_if("n", b"2", gives_way)
    assert link.errors_left == 0
    assert linked.read("n") == b"2"


def test_a_lost_reply_to_a_replacement_leads_to_another_look(linked: Files, link: Proxy) -> None:
    linked.replace("n", b"1")
    seen: list[bytes | None] = []

    def gives_way() -> bool:
        seen.append(linked.read("n"))
        if len(seen) == 1:
            link.lose_reply()
        return seen[-1] == b"1"

    assert not linked.replace_if("n", b"2", gives_way), "it cannot know that the file is its own"
    assert seen == [b"1", b"2"]


# ------------------------------------------------------------ a real server


@pytest.mark.rgw
@pytest.mark.parametrize("pause_at", [8, 99], ids=["within", "before the end"])
def test_a_server_that_is_killed_during_an_upload(ceph: Ceph, root: str, pause_at: int) -> None:
    files = open_files(root, options(ceph.s3))
    attempts = 0

    def attempt() -> None:
        nonlocal attempts
        attempts += 1
        upload(files, "c/part", pause_at, ceph.kill_gateway if attempts == 1 else lambda: None)

    def report(trouble: Trouble) -> None:
        told.append(trouble)
        if attempts == 1:
            ceph.start_gateway()
            assert files.names("c") == [] and files.read("c/part") is None

    told: list[Trouble] = []
    retrying(attempt, report, threading.Event().wait, PATIENT)
    assert attempts >= 2 and told
    assert files.read("c/part") == DATA
    files.drop_unfinished("c")
    assert unfinished(ceph.s3) == 0


@pytest.mark.rgw
def test_a_writer_that_is_killed_leaves_nothing_that_is_seen(ceph: Ceph, root: str) -> None:
    writer = multiprocessing.get_context("spawn").Process(target=upload_and_die, args=(root, options(ceph.s3)))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    files = open_files(root, options(ceph.s3))
    assert files.names("c") == [] and files.folders("") == []
    assert unfinished(ceph.s3) == 1
    assert files.drop_unfinished("") == 1
    assert unfinished(ceph.s3) == 0


CALLS: dict[str, Callable[[Files], Any]] = {
    "read": lambda f: f.read("a"),
    "read_into": lambda f: f.read_into("a", 0, memoryview(bytearray(4))),
    "names": lambda f: f.names("c"),
    "replace": lambda f: f.replace("a", b"1"),
    "create": lambda f: f.create("a", b"1"),
    "remove": lambda f: f.remove("a"),
    "upload": lambda f: upload(f, "c/part"),
    "drop_unfinished": lambda f: f.drop_unfinished("c"),
}


@pytest.mark.rgw
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"secret": HUSH}, "the server refuses the secret; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ({"key": "nobody", "secret": HUSH}, "the server does not know the access key; check AWS_ACCESS_KEY_ID"),
    ],
    ids=["secret", "key"],
)
def test_who_is_refused_is_told_at_once(
    ceph: Ceph, root: str, changed: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = Proxy(ceph.s3.port)
    files = open_files(root, options(proxy, **changed))
    for call in CALLS.values():
        before = proxy.requests
        with caplog.at_level(logging.DEBUG), pytest.raises(StoreError) as caught:
            call(files)
        assert proxy.requests - before <= 2, "nothing is tried again; `create` reads back"
        assert str(caught.value).startswith(f"{root}/") and said in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert not transient(caught.value)
        assert HUSH not in "".join(traceback.format_exception(caught.value)) + caplog.text + repr(files)
        caplog.clear()
    proxy.close()


@pytest.mark.rgw
def test_a_missing_bucket_is_told_at_once(ceph: Ceph) -> None:
    files = open_files("s3://nosuch/run", options(ceph.s3))
    for call in (c for name, c in CALLS.items() if name != "remove"):
        said = r"^s3://nosuch/run/.+: no such bucket; create it, or correct run\.storage_path$"
        with pytest.raises(StoreError, match=said) as caught:
            call(files)
        assert not transient(caught.value)


def test_no_credentials_are_told(moto: S3, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    files = open_files(root, {"endpoint_url": moto.endpoint, "skip_instance_cache": True})
    with pytest.raises(StoreError, match=r"/a: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        files.read("a")


def test_credentials_in_a_url_are_told_by_no_call(moto: S3, caplog: pytest.LogCaptureFixture) -> None:
    """S3's client takes a bucket and a path for them. Like about half of AWS's secrets this one has a "/"."""
    pieces = ("wJalrXUtnFEMI", "K7MDENG", "bPxRfiCYEXAMPLEKEY")
    files = open_files(f"s3://AKIAEXAMPLE:{'/'.join(pieces)}@bucket/runs", options(moto))
    for call in (c for name, c in CALLS.items() if name != "remove"):
        with caplog.at_level(logging.WARNING), pytest.raises(StoreError, match=r"^s3://bucket/runs/") as caught:
            call(files)
        told = "".join(traceback.format_exception(caught.value)) + caplog.text + files.where()
        assert [piece for piece in pieces if piece in told] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"token": f"{HUSH}\n"},
        {"key": f"{HUSH}\n"},
        {"client_kwargs": {"aws_session_token": {"x": HUSH}}},
        {"config_kwargs": {"retries": HUSH}},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_told_without_their_values(moto: S3, root: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(StoreError) as caught:
        open_files(root, options(moto, **wrong)).replace("a", b"1")
    assert str(caught.value).startswith(root)
    assert HUSH not in "".join(traceback.format_exception(caught.value))
