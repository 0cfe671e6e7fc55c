"""What a URI or a choice of weights names: pure functions of the string, nothing is looked at."""

from pathlib import Path

WEIGHTS_SUFFIXES = (".pth", ".pt", ".safetensors")


def absolute(uri: str) -> str:
    """A local path made absolute; other URIs as they are."""
    has_scheme = "://" in uri or uri.startswith("sample:")
    return uri if has_scheme else str(Path(uri).expanduser().resolve())


def has_credentials(uri: str) -> bool:
    """Whether a URI carries a user name or a key before its host or bucket."""
    scheme, _, rest = uri.partition("://")
    place = rest.partition("/")[0]  # a secret may hold a slash, and then ends here
    return "@" in place or (scheme == "s3" and ":" in place)


def is_weights_file(weights: str) -> bool:
    """Whether `backbone.weights` is a path or URI, not the name of published weights."""
    return "/" in weights or Path(weights).suffix in WEIGHTS_SUFFIXES
