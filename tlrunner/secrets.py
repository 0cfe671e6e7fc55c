"""Secrets of the environment, and text without them.

Keys, tokens and passwords are given to a job by environment variables alone. What others say in
errors and tracebacks may repeat them; whatever of it is shown or kept passes through here.
"""

import logging
import os
import re
import traceback
from collections.abc import Iterator
from urllib.parse import quote

from tlrunner.errors import TlrunnerError

HIDDEN = "***"
MIN_CHARACTERS = 6  # `true` or `1` as the value of a token would be hidden in every text
_SECRET_NAME = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS|(_|API)KEY)$", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:([^/@\s]+)@")  # as of a proxy


def redacted(text: str) -> str:
    """`text` with *** for each secret of this process's environment."""
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return text


def without_secrets(error: Exception) -> Exception:
    """The error itself; or, where its traceback has a secret, one that says the same without."""
    told = "".join(traceback.format_exception(error))
    if redacted(told) == told:
        return error
    if isinstance(error, TlrunnerError):
        return type(error)(*map(redacted, (error.found, error.valid, error.remedy)))
    return RuntimeError(redacted(f"{type(error).__name__}: {error}"))


class Redacting(logging.Filter):
    """Of a logger: what it passes on holds no secrets, in message or traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        if record.exc_info and record.exc_info[0]:
            record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
        return True


def _secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        found = [value] if _SECRET_NAME.search(name) else _PASSWORD_IN_URL.findall(value)
        for secret in found:
            if len(secret) >= MIN_CHARACTERS:
                yield from (secret, quote(secret, safe=""))
