"""What S3 refuses, in one line each. test_store has what it does, test_s3_faults what breaks."""

import io
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import urllib3
from botocore import exceptions as of_botocore
from fault_proxy import FaultProxy
from s3_servers import KEY, SECRET, Bucket, use_endpoint

from tlrunner.data import s3
from tlrunner.data.s3 import Patience, S3Store
from tlrunner.data.store import Part
from tlrunner.errors import StorageError

QUICK = Patience(attempts=3, timeout_seconds=2, first_pause_seconds=0.001)
PATH = Path(__file__)
VERBS: dict[str, Callable[[S3Store], object]] = {
    "list": lambda store: store.list(),
    "size": lambda store: store.size("name"),
    "read": lambda store: store.read("name"),
    "part": lambda store: store.read("name", Part(0, 10)),
    "put": lambda store: store.put("name", PATH),
    "write": lambda store: store.write("name", b"content"),
    "put_if": lambda store: store.put_if("name", b"content", etag=None),
    "delete": lambda store: store.delete("name"),
}


@contextmanager
def answering(status: int, code: str, **headers: str) -> Iterator[str]:
    """The address of a server that gives this answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = f"<Error><Code>{code}</Code><Message>{KEY} {SECRET}</Message></Error>".encode()
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_HEAD = do_PUT = do_DELETE = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def refusal(store: S3Store, verb: str, *secrets: str) -> str:
    """The line that a verb ends with, after a check that it is one and tells no secret."""
    with pytest.raises(StorageError) as caught:
        VERBS[verb](store)
    line = str(caught.value)
    assert line.startswith(f"'{store.uri}")
    assert "\n" not in line
    told = "".join(traceback.format_exception(caught.value))
    assert not any(secret in told for secret in (KEY, SECRET, *secrets))
    return line


REFUSALS = [
    (403, "AccessDenied", "access denied"),
    (404, "NoSuchBucket", "there is no such bucket"),
    (301, "PermanentRedirect", "another region"),
    (400, "AuthorizationHeaderMalformed", "another region"),
    (400, "IllegalLocationConstraintException", "another region"),
    (403, "InvalidAccessKeyId", "the access key is not known there"),
    (403, "SignatureDoesNotMatch", "the secret key does not belong to the access key"),
    (400, "ExpiredToken", "the credentials have expired"),
    (400, "InvalidToken", "the session token is not valid"),
    (400, "EntityTooLarge", "too large"),
    (501, "NotImplemented", "(HTTP 501)"),
    (418, "Teapot", "Teapot (HTTP 418)"),
]


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_what_will_not_pass_ends_at_once(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    for status, code, words in REFUSALS:
        with answering(status, code) as endpoint:
            use_endpoint(monkeypatch, endpoint)
            store = S3Store("bucket", "prefix", patience=QUICK)
            assert words in refusal(store, verb)
            assert len(store.retries) == 0


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_what_may_pass_is_asked_for_until_patience_ends(
    monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    busy = [(500, "InternalError"), (503, "SlowDown"), (429, "TooManyRequests")]
    busy += [(409, "ConditionalRequestConflict"), (400, "RequestTimeout")]
    busy += [(403, "RequestTimeTooSkewed")]  # until the clock is set right
    for status, code in [*busy, *([(200, "not XML <")] if verb == "list" else [])]:
        with answering(status, code) as endpoint:
            use_endpoint(monkeypatch, endpoint)
            store = S3Store("bucket", patience=QUICK)
            assert ", 3 times; valid: " in refusal(store, verb)
            assert len(store.retries) == 2


@pytest.mark.slow
def test_a_bucket_that_the_server_says_is_elsewhere_is_in_another_region(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with answering(301, "PermanentRedirect", x_amz_bucket_region="eu-west-1") as endpoint:
        use_endpoint(monkeypatch, endpoint)
        for verb in VERBS:
            assert "another region" in refusal(S3Store("bucket", patience=QUICK), verb)


@pytest.mark.parametrize("verb", VERBS)
def test_no_such_bucket_is_told_from_no_such_object(s3_bucket: Bucket, verb: str) -> None:
    assert "there is no such bucket" in refusal(S3Store("nowhere-at-all", "prefix"), verb)
    assert S3Store(s3_bucket.name, "prefix").size("absent") is None


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_wrong_keys_are_told_apart(
    rclone_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    store = S3Store(rclone_bucket.name)
    assert "the secret key does not belong" in refusal(store, verb, "wrong-secret")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
    store = S3Store(rclone_bucket.name)
    assert "the access key is not known" in refusal(store, verb, "wrong-secret", "AKIAWRONG")


@pytest.mark.parametrize("verb", VERBS)
def test_an_endpoint_that_is_down_is_asked_until_patience_ends(
    monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    use_endpoint(monkeypatch, "http://someone:a-password@127.0.0.1:1")
    store = S3Store("bucket", patience=QUICK)
    assert "the endpoint cannot be reached, 3 times" in refusal(store, verb, "a-password")
    assert len(store.retries) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "there are no credentials"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "the credentials are incomplete"),
        ({"AWS_PROFILE": "absent"}, "there is no such profile as AWS_PROFILE names"),
        ({"AWS_ENDPOINT_URL": "what is this"}, "the endpoint or the region is not valid"),
        ({"AWS_DEFAULT_REGION": "no region"}, "the endpoint or the region is not valid"),
        ({"AWS_CONFIG_FILE": str(PATH)}, "the AWS configuration file cannot be read"),
        ({"AWS_SESSION_TOKEN": "two\nlines-of-it"}, "the request cannot be sent"),
    ],
)
def test_settings_that_cannot_work_are_named(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], words: str
) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    for name, value in changes.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    for verb in VERBS:
        assert words in refusal(S3Store("bucket", patience=QUICK), verb, "lines-of-it")


def test_a_name_that_no_object_can_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    for verb in VERBS:
        line = refusal(S3Store("no bucket", patience=QUICK), verb)
        assert "that is no name of a bucket or an object" in line


class Failing:
    """A client that fails once, then answers."""

    def __init__(self, error: Exception) -> None:
        self.errors = [error]

    def get_object(self, **wanted: str) -> dict[str, io.BytesIO]:
        if self.errors:
            raise self.errors.pop()
        return {"Body": io.BytesIO(b"content")}


UNTRUSTED = "certificate verify failed: CERTIFICATE_VERIFY_FAILED"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (of_botocore.SSLError(endpoint_url="", error="EOF occurred"), ""),
        (of_botocore.SSLError(endpoint_url="", error=UNTRUSTED), "no secure connection"),
        (urllib3.exceptions.SSLError("decryption failed"), ""),
        (of_botocore.IncompleteReadError(actual_bytes=1, expected_bytes=2), ""),
        (of_botocore.ProxyConnectionError(proxy_url="http://u:hush@proxy"), ""),
        (of_botocore.CredentialRetrievalError(provider="p", error_msg="hush"), ""),
        (of_botocore.UnauthorizedSSOTokenError(), "the credentials have expired"),
        (PermissionError(13, "hush"), "PermissionError"),
    ],
)
def test_a_fault_on_the_way_is_met_by_asking_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    client = Failing(error)
    monkeypatch.setattr(s3, "_client", lambda timeout_seconds: client)
    store = S3Store("bucket", patience=QUICK)
    if words:
        assert words in refusal(store, "read", "hush")
    else:
        assert store.read("name") == b"content"
    assert len(store.retries) == (0 if words else 1)


def test_a_range_past_the_end_says_that_the_file_is_shorter(
    s3_bucket: Bucket, tmp_path: Path
) -> None:
    store = S3Store(s3_bucket.name, patience=QUICK)
    store.put("name", PATH)
    with pytest.raises(StorageError, match="it is shorter than it was"):
        store.read("name", Part(PATH.stat().st_size, 1))


def test_a_long_list_is_read_to_its_end(s3_bucket: Bucket) -> None:
    keys = [f"p/{number:04d}" for number in range(1003)]
    for key in [*keys, "pp"]:
        s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=key, Body=b"")
    names = [entry.name for entry in S3Store(s3_bucket.name, "p").list()]
    assert names == [f"{number:04d}" for number in range(1003)]


@pytest.mark.slow
def test_keys_that_only_show_a_folder_are_not_listed(moto_bucket: Bucket) -> None:
    for key in ("p/", "p/a", "p/folder/"):
        moto_bucket.client.put_object(Bucket=moto_bucket.name, Key=key, Body=b"")
    assert [entry.name for entry in S3Store(moto_bucket.name, "p").list()] == ["a"]


@pytest.mark.slow
def test_an_object_is_replaced_only_while_it_is_the_one_that_is_meant(moto_bucket: Bucket) -> None:
    store = S3Store(moto_bucket.name, "prefix")
    assert store.put_if("name", b"never", etag='"0"') is None, "there is none to replace"
    first = store.put_if("name", b"first", etag=None)
    assert first is not None
    assert store.put_if("name", b"other", etag=None) is None, "there is one"
    assert store.read_version("name") == (b"first", first)
    second = store.put_if("name", b"second", etag=first)
    assert store.put_if("name", b"third", etag=first) is None, "it is another"
    assert store.read_version("name") == (b"second", second)


@pytest.mark.slow
def test_a_conditional_write_whose_answer_was_lost_is_known_as_a_success(
    moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(moto_bucket.endpoint, {"lost": 0.5}) as proxy:
        use_endpoint(monkeypatch, proxy.endpoint)
        store, etag = S3Store(moto_bucket.name, patience=replace(QUICK, attempts=40)), None
        for number in range(20):
            etag = store.put_if("name", f"{number}".encode(), etag=etag)
            assert etag is not None
        assert proxy.injected["lost"] > 0
        assert store.put_if("name", b"another's", etag=None) is None
    use_endpoint(monkeypatch, moto_bucket.endpoint)
    assert store.read_version("name") == (b"19", etag)


def test_stores_share_a_client_but_not_with_another_process_or_other_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(s3._client, [1.0] * 4)
    assert all(other is first for other in others)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert s3._client(1.0) is not first
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    assert s3._client(1.0) is first
    assert s3._client(2.0) is not first
    monkeypatch.setattr(s3.os, "getpid", lambda: 1)  # as in a fork of this process
    assert s3._client(1.0) is not first


def test_pauses_grow_and_differ() -> None:
    patience = Patience(first_pause_seconds=1, longest_pause_seconds=4)
    for attempt, longest in ((1, 1), (2, 2), (3, 4), (9, 4)):
        pauses = [patience.pause(attempt) for _ in range(200)]
        assert 0 <= min(pauses) < longest / 4
        assert longest * 3 / 4 < max(pauses) <= longest
