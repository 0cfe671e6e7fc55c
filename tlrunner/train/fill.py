"""Filling what is kept of a frozen prefix: each chunk once, by whichever process comes first.

Cuts that the search reads are tiers, each computed from the one below it. A chunk of the last tier
is computed from the deepest tier that has it already, else from images, and leaves the tiers
between behind it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from tlrunner.data.activations import ActivationFile
from tlrunner.data.order import Rows
from tlrunner.train.cut import Values
from tlrunner.train.entries import EntryLayout


@dataclass(frozen=True)
class Tier:
    """A cut whose values are kept.

    Attributes:
        step: values of the tier below -> values here; of the lowest, from images (B, H, W, C).
    """

    file: ActivationFile
    layout: EntryLayout
    step: Callable[[Values], Values]

    def read(self, chunk: int) -> Values:
        return self.layout.unpack(self.file.entries[self.file.span(chunk)].copy())

    def has_first(self, num_chunks: int) -> bool:
        return all(self.file.has(chunk) for chunk in range(num_chunks))


def fill(
    tiers: Sequence[Tier],
    rows_N: Rows,
    render: Callable[[Iterable[Rows]], Iterator[Tensor]],
    num_chunks: int,
    beat: Callable[[], object] = lambda: None,
) -> None:
    """Fill the first chunks of the last tier; they are there when this returns.

    Args:
        rows_N: the row of each entry.
        render: groups of rows -> their images.
        beat: called for each chunk, made here or elsewhere.

    Raises:
        StorageError: the disk does not take it.
        DataError: an image cannot be decoded.
    """
    top = tiers[-1].file
    claimed: deque[int] = deque()

    def claims(wait: bool, among: Callable[[int], bool]) -> Iterator[int]:
        for chunk in range(num_chunks):
            beat()
            if among(chunk) and top.claim(chunk, wait=wait):
                claimed.append(chunk)
                yield chunk

    def is_below(chunk: int) -> bool:
        return any(tier.file.has(chunk) for tier in tiers[:-1])

    try:
        # First what nobody works on, then what others began: they have it soon, or left it.
        for wait in (False, True):
            for _ in claims(wait, is_below):
                _complete(tiers, claimed, ())
            groups = (rows_N[top.span(chunk)] for chunk in claims(wait, lambda chunk: True))
            for images_BHWC in render(groups):
                _complete(tiers, claimed, (images_BHWC,))
    finally:
        for chunk in claimed:
            for tier in tiers:
                tier.file.release(chunk)


def _complete(tiers: Sequence[Tier], claimed: deque[int], images: Values) -> None:
    """Compute the chunk that was claimed first."""
    chunk = claimed[0]
    there = [place for place, tier in enumerate(tiers) if tier.file.has(chunk)]
    values = tiers[there[-1]].read(chunk) if there else images
    for tier in tiers[there[-1] + 1 if there else 0 :]:
        if tier is tiers[-1] or tier.file.claim(chunk, wait=True):
            values = tier.step(values)
            tier.file.commit(chunk, tier.layout.pack(values))
        else:  # made by another process while this one waited
            values = tier.read(chunk)
    claimed.popleft()
