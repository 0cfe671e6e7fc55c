"""Which images a trial is about, as a value that is handed to its workers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Images:
    """Images that were prepared: where they are as shards, and the hash of their manifest."""

    shards: str
    sha256: str
