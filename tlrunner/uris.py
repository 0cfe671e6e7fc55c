"""What a URI or a choice of weights names: pure functions of the string, nothing is looked at."""

import re
from pathlib import Path
from urllib.parse import unquote

from tlrunner.errors import ConfigError

_SECRET_IN_QUERY = re.compile(
    r"[?&][\w-]*(password|passwd|secret|token|signature|api_?key)=", re.IGNORECASE
)
WEIGHTS_SUFFIXES = (".pth", ".pt", ".safetensors")


def local_path(uri: str | Path) -> Path:
    """The absolute path that a path or file:// URI names; `~` is the home directory.

    Raises:
        ConfigError: it begins with `~`, and there is no such home.
    """
    text = str(uri)
    path = Path(unquote(text.removeprefix("file://")) if text.startswith("file://") else text)
    try:
        return path.expanduser().absolute()
    except RuntimeError as err:
        raise ConfigError(
            f"'{text}': there is no such home directory", "", "give an absolute path"
        ) from err


def absolute(uri: str) -> str:
    """A local path made absolute; other URIs as they are."""
    has_scheme = "://" in uri or uri.startswith("sample:")
    return uri if has_scheme else str(local_path(uri).resolve())


def has_credentials(uri: str) -> bool:
    """Whether a URI carries a user name or a key before its host or bucket, or in its query."""
    scheme, _, rest = uri.partition("://")
    place = rest.partition("/")[0]  # a secret may hold a slash, and then ends here
    if "@" in place or (scheme == "s3" and ":" in place):
        return True
    return bool(_SECRET_IN_QUERY.search(rest))


def is_weights_file(weights: str) -> bool:
    """Whether `backbone.weights` is a path or URI, not the name of published weights."""
    return "/" in weights or Path(weights).suffix in WEIGHTS_SUFFIXES
