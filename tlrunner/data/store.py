"""Single files from anywhere: a path, file:// or s3://. The only module that knows S3.

Credentials, region and endpoint come from the environment, as for every AWS client
(AWS_PROFILE, AWS_ENDPOINT_URL_S3 and so on); none of it ever appears in an error.
"""

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any

from tlrunner.errors import StorageError
from tlrunner.files import sha256_file, write_with

_SCHEMES = "a path, file://PATH or s3://BUCKET/KEY"
_ATTEMPTS = 3
_BLOCK_BYTES = 8 << 20


def fetch(uri: str, cache_dir: str | Path, sha256: str | None = None) -> Path:
    """A local path to the file that a URI names; S3 objects are downloaded once.

    `sha256`: hex digest that the file must have.

    Raises:
        StorageError: it cannot be had, or is not the file that was meant.
    """
    scheme, separator, rest = uri.partition("://")
    if separator and scheme not in ("file", "s3"):
        raise StorageError(f"'{uri}' cannot be read", _SCHEMES)
    if scheme == "s3" and separator:
        return _fetch_s3(uri, rest, Path(cache_dir).expanduser(), sha256)
    path = Path(rest if separator else uri).expanduser()
    if not path.is_file():
        raise StorageError(f"{path} is not a file", _SCHEMES, "check the path")
    _check_digest(uri, path, sha256)
    return path


def _fetch_s3(uri: str, rest: str, cache_dir: Path, sha256: str | None) -> Path:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = rest.partition("/")
    if not bucket or not key or key.endswith("/"):
        raise StorageError(f"'{uri}' names no object", "s3://BUCKET/KEY")
    try:
        client = _client()
        etag = client.head_object(Bucket=bucket, Key=key)["ETag"]
        # an object that is replaced gets another ETag, and so another place here
        version = hashlib.sha256(f"{uri}\n{etag}".encode()).hexdigest()[:32]
        path = cache_dir / "fetched" / version / PurePosixPath(key).name
        if not path.is_file():
            write_with(path, lambda temporary: _download(client, bucket, key, etag, temporary, uri))
    except ClientError as err:
        response = err.response
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
        raise _unreachable(uri, f"{response['Error'].get('Code', '')} (HTTP {status})") from err
    except (BotoCoreError, ValueError) as err:
        raise _unreachable(uri, type(err).__name__) from err
    _check_digest(uri, path, sha256)
    return path


def _client() -> Any:
    import boto3  # here, as it takes longer to import than most uses of this module take
    from botocore.config import Config

    retries = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
    return boto3.client("s3", config=Config(retries=retries, connect_timeout=10, read_timeout=60))


def _download(client: Any, bucket: str, key: str, etag: str, path: Path, uri: str) -> None:
    """Write an object to a file, going on where a broken connection stopped."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    for attempt in range(_ATTEMPTS):
        done = path.stat().st_size if attempt else 0
        wanted = {"Range": f"bytes={done}-"} if done else {}
        body = client.get_object(Bucket=bucket, Key=key, IfMatch=etag, **wanted)["Body"]
        try:
            with path.open("ab" if done else "wb") as file:
                for block in body.iter_chunks(_BLOCK_BYTES):
                    file.write(block)
            return
        except (HTTPClientError, IncompleteReadError):
            continue  # retried by botocore before the first byte only
    raise _unreachable(uri, f"the connection broke {_ATTEMPTS} times")


def _check_digest(uri: str, path: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    found = sha256_file(path)
    if found != sha256.lower():
        raise StorageError(
            f"'{uri}' has SHA-256 {found}", sha256, "check that the URI names the right file"
        )


def _unreachable(uri: str, why: str) -> StorageError:
    return StorageError(
        f"'{uri}' cannot be read: {why}",
        "an object that the AWS settings in the environment may read",
        "check the URI, the credentials and the endpoint",
    )
