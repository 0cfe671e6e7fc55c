"""Objects below a prefix of an S3 bucket. The only module that knows boto3.

Credentials, region, endpoint and path style come from the environment, as for every AWS client
(AWS_PROFILE, AWS_ENDPOINT_URL_S3 and so on); none of it ever appears in an error. What passes by
itself (throttling, a broken connection, bytes with a wrong checksum) is asked for again, with
growing, jittered pauses; what does not pass ends at once, in one line.
"""

import base64
import logging
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from tlrunner.data.store import WRONG_BYTES, Entry, Part, is_right, no_check, unreachable
from tlrunner.errors import UnavailableError
from tlrunner.files import sha256_bytes, sha256_file

log = logging.getLogger("tlrunner")
T = TypeVar("T")
Strings = list[str]  # the store has a `list` of its own

MAX_CONNECTIONS = 32
_OTHER_REGION = "the bucket is in another region"
_ABSENT_CODES = ("NoSuchKey", "NotFound", "404")
_PASSING_CODES = {
    *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout"),
    *("InternalError", "ServiceUnavailable", "OperationAborted", "ConditionalRequestConflict"),
    *("BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "RequestTimeTooSkewed"),
}
_REFUSALS = {
    "AccessDenied": "access denied (or absent, where listing is not allowed either)",
    "403": "access denied",
    "AllAccessDisabled": "access denied",
    "NoSuchBucket": "there is no such bucket",
    "InvalidBucketName": "there is no such bucket",
    "PermanentRedirect": _OTHER_REGION,
    "AuthorizationHeaderMalformed": _OTHER_REGION,
    "IllegalLocationConstraintException": _OTHER_REGION,
    "301": _OTHER_REGION,
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "ExpiredToken": "the credentials have expired",
    "InvalidToken": "the session token is not valid",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
    "PreconditionFailed": "it was replaced while it was read",
    "InvalidRange": "it is shorter than it was",
    "EntityTooLarge": "the file is too large for one request",
}
_FAULTS = {  # of botocore, by the class that says most
    "NoCredentialsError": "there are no credentials",
    "PartialCredentialsError": "the credentials are incomplete",
    "CredentialRetrievalError": "the credentials cannot be had",
    "TokenRetrievalError": "the credentials cannot be had",
    "UnauthorizedSSOTokenError": "the credentials have expired",
    "SSOTokenLoadError": "the credentials have expired",
    "ProfileNotFound": "there is no such profile as AWS_PROFILE names",
    "ConfigParseError": "the AWS configuration file cannot be read",
    "ParamValidationError": "that is no name of a bucket or an object",
    "EndpointConnectionError": "the endpoint cannot be reached",
    "ConnectTimeoutError": "the endpoint does not answer",
    "ReadTimeoutError": "the answer stalled",
    "ConnectionClosedError": "the connection broke",
    "ResponseStreamingError": "the connection broke",
    "IncompleteReadError": "the connection broke",
    "ResponseParserError": "the answer is not that of an S3 server",
    "HTTPClientError": "the request cannot be sent",
    "ProxyConnectionError": "the proxy cannot be reached",
    "SSLError": "no secure connection",
    "FlexibleChecksumError": WRONG_BYTES,
    "_WrongBytes": WRONG_BYTES,
    "_Replaced": _REFUSALS["PreconditionFailed"],
    # botocore follows a redirect that names no region for ever
    "RecursionError": "the endpoint sends requests elsewhere, as for another region or to https",
    "ValueError": "the endpoint or the region is not valid",
}


@dataclass(frozen=True)
class Patience:
    """How often a request is made, how long it may be silent, and the pauses in between."""

    attempts: int = 8
    timeout_seconds: float = 30.0
    first_pause_seconds: float = 0.4
    longest_pause_seconds: float = 10.0

    def pause(self, attempt: int) -> float:
        """Seconds to wait after an attempt, counted from 1: full jitter, as AWS advises.

        https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        """
        longest = min(self.first_pause_seconds * 2 ** (attempt - 1), self.longest_pause_seconds)
        # not the global generator, which users seed alike in all their processes
        return random.SystemRandom().uniform(0, longest)


@dataclass(frozen=True)
class S3Store:
    """Objects below a prefix of a bucket. Any number of threads may use one.

    `etag`: read only this version of an object. `retries`: why requests were made again.
    """

    bucket: str
    prefix: str = ""
    etag: str | None = None
    patience: Patience = Patience()
    retries: Strings = field(default_factory=Strings, compare=False)  # its append is atomic

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def list(self) -> list[Entry]:
        wanted, found = {"Bucket": self.bucket, "Prefix": self._object("")["Key"]}, {}
        while True:
            page = self._ask(self.uri, lambda client: client.list_objects_v2(**wanted))
            found.update({entry["Key"]: entry["Size"] for entry in page.get("Contents", ())})
            if not page.get("IsTruncated"):
                break
            wanted["ContinuationToken"] = page["NextContinuationToken"]
        # consoles make keys that end with a slash, to show a folder
        keys = sorted(key for key in found if not key.endswith("/"))
        return [Entry(key.removeprefix(wanted["Prefix"]), found[key]) for key in keys]

    def size(self, name: str) -> int | None:
        head = self.head(name)
        return head[0] if head else None

    def head(self, name: str) -> tuple[int, str] | None:
        """Size and ETag of an object; None where there is none."""
        from botocore.exceptions import ClientError

        def request(client: Any) -> tuple[int, str]:
            try:
                found = client.head_object(**self._object(name))
            except ClientError as err:
                if _code_and_status(err)[1] < 500:
                    # HEAD has no body to say why, not even that it is the bucket that is absent
                    client.get_object(**self._object(name), Range="bytes=0-0")["Body"].close()
                raise
            return found["ContentLength"], found["ETag"]

        try:
            return self._ask(self._uri_of(name), request)
        except FileNotFoundError:
            return None

    def read(self, name: str, part: Part | None = None) -> bytes:
        return self.read_version(name, part)[0]

    def read_version(self, name: str, part: Part | None = None) -> tuple[bytes, str]:
        """As `read`, and the ETag of what was read."""
        wanted = self._object(name) | ({"IfMatch": self.etag} if self.etag else {})
        if part is None:
            wanted["ChecksumMode"] = "ENABLED"
        elif part.num_bytes == 0:
            return b"", ""
        else:
            wanted["Range"] = f"bytes={part.start}-{part.start + part.num_bytes - 1}"

        def request(client: Any) -> tuple[bytes, str]:
            answer = client.get_object(**wanted)
            if self.etag and answer["ETag"] != self.etag:  # not every server knows IfMatch
                answer["Body"].close()
                raise _Replaced
            content: bytes = answer["Body"].read()
            if not is_right(content, part):
                raise _WrongBytes
            return content, answer.get("ETag", "")

        return self._ask(self._uri_of(name), request)

    def put(self, name: str, path: Path, before_again: Callable[[], object] = no_check) -> None:
        sha256 = sha256_file(path)

        def request(client: Any) -> None:
            with path.open("rb") as file:
                self._put(client, name, file, sha256)

        self._ask(self._uri_of(name), request, before_again)

    def write(self, name: str, content: bytes) -> None:
        """Make `content` an object."""
        sha256 = sha256_bytes(content)
        self._ask(self._uri_of(name), lambda client: self._put(client, name, content, sha256))

    def put_if(self, name: str, content: bytes, *, etag: str | None) -> str | None:
        """Replace an object if its ETag is still `etag`, or make it if there is none.

        Gives the new ETag, or None where the condition does not hold. `content` is like nothing
        else that is written there, so that a success whose answer was lost is told from a failure.
        """
        condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}

        def request(client: Any) -> str | None:
            from botocore.exceptions import ClientError

            try:
                return self._put(client, name, content, sha256_bytes(content), **condition)
            except ClientError as err:
                if _code_and_status(err)[1] == 412:
                    return None
                raise

        try:
            if written := self._ask(self._uri_of(name), request):
                return written
            found, found_etag = self.read_version(name)
        except FileNotFoundError:
            return None
        return found_etag if found == content else None

    def delete(self, name: str, before_again: Callable[[], object] = no_check) -> None:
        wanted = self._object(name)
        with suppress(FileNotFoundError):  # S3 itself does not mind, some servers do
            self._ask(self._uri_of(name), lambda c: c.delete_object(**wanted), before_again)

    def _put(self, client: Any, name: str, body: Any, sha256: str, **condition: str) -> str:
        # the server compares what it received with this, and refuses what differs
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        wanted = {**self._object(name), "Body": body, "ChecksumSHA256": checksum, **condition}
        return str(client.put_object(**wanted)["ETag"])

    def _object(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{name}" if self.prefix else name}

    def _uri_of(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def _ask(
        self, uri: str, request: Callable[[Any], T], before_again: Callable[[], object] = no_check
    ) -> T:
        """Make a request until it succeeds, fails for good, or has failed too often."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        of_botocore = (ClientError, BotoCoreError, ResponseParserError, HTTPError)
        of_python = (OSError, ValueError, RecursionError)
        for attempt in range(1, self.patience.attempts + 1):
            if attempt > 1:
                before_again()
            try:
                return request(_client(self.patience.timeout_seconds))
            except (*of_botocore, *of_python, _WrongBytes, _Replaced) as err:
                why = _in_words(err)
                # not `from err`: what botocore says can hold a token or the user of a proxy
                if _is_absence(err):
                    raise FileNotFoundError(uri) from None
                if not _passes(err):
                    raise unreachable(uri, why) from None
                if attempt == self.patience.attempts:
                    raise unreachable(uri, f"{why}, {attempt} times", UnavailableError) from None
                self.retries.append(why)
                log.debug("%s: %s, asking again", uri, why)
                time.sleep(self.patience.pause(attempt))
        raise AssertionError("the last attempt returns or raises")


def _client(timeout_seconds: float) -> Any:
    """The client of this process and environment: stores are opened for a single file, too."""
    settings = frozenset((k, v) for k, v in os.environ.items() if k.startswith("AWS_"))
    with _making:
        return _made(timeout_seconds, os.getpid(), settings)


_making = Lock()  # lest all threads of a download make a client each


@lru_cache(maxsize=8)
def _made(timeout_seconds: float, process: int, settings: frozenset[tuple[str, str]]) -> Any:
    """A client, made when first needed: a fork shares no connections with its parent.

    Its session is its own, as the one that boto3 shares keeps the credentials it saw first.
    """
    from boto3.session import Session  # here, as it takes longer than all of tlrunner.data
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},  # `_ask` repeats requests
        connect_timeout=timeout_seconds,
        read_timeout=timeout_seconds,
        max_pool_connections=MAX_CONNECTIONS,
        # some servers send the checksum of the whole object with a range of it
        response_checksum_validation="when_required",
    )
    return Session().client("s3", config=config)


class _WrongBytes(Exception):  # noqa: N818  (neither leaves this module)
    """What came is not what is known to be stored."""


class _Replaced(Exception):  # noqa: N818
    """What came is of another version."""


def _is_absence(err: Exception) -> bool:
    from botocore.exceptions import ClientError

    return isinstance(err, ClientError) and _code_and_status(err)[0] in _ABSENT_CODES


def _passes(err: Exception) -> bool:
    """Whether the same request may succeed later: a clock is set right, credentials are renewed."""
    from botocore import exceptions as of_botocore
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    if isinstance(err, of_botocore.ClientError):
        code, status = _code_and_status(err)
        is_busy = status in (408, 429) or (status >= 500 and status != 501)
        return code in _PASSING_CODES or is_busy
    if isinstance(err, of_botocore.SSLError):
        return "CERTIFICATE" not in str(err)
    on_the_way = (of_botocore.HTTPClientError, of_botocore.ConnectionError, HTTPError)
    half_or_wrong = (of_botocore.IncompleteReadError, of_botocore.FlexibleChecksumError)
    others = (_WrongBytes, ConnectionError, TimeoutError, of_botocore.CredentialRetrievalError)
    return isinstance(err, (*on_the_way, *half_or_wrong, *others, ResponseParserError))


def _in_words(err: Exception) -> str:
    """Why a request failed, of words that are ours or the code that S3 gives."""
    from botocore.exceptions import ClientError

    if isinstance(err, ClientError):
        code, status = _code_and_status(err)
        return _REFUSALS.get(code, f"{code} (HTTP {status})")
    names = [kind.__name__ for kind in type(err).__mro__]
    return next((_FAULTS[name] for name in names if name in _FAULTS), names[0])


def _code_and_status(err: Any) -> tuple[str, int]:
    status = err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(err.response.get("Error", {}).get("Code", "")), int(status)
