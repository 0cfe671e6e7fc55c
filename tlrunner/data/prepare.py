"""Shards for a URI: made the first time, found every time after.

They live in `CACHE_DIR/shards/FINGERPRINT`. Any number of processes may ask at once: one writes
while the others wait, and a writer that was killed leaves nothing that is mistaken for a data set.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tlrunner.data.manifest import MANIFEST_NAME, VERSION, read_manifest
from tlrunner.data.sources import open_source, shards_at, unlabelled
from tlrunner.data.write import BAD_NAME, Progress, too_many_bad, write_shards
from tlrunner.files import cannot_write, sha256_json


def prepare(
    uri: str,
    cache_dir: str | Path,
    *,
    max_bad_fraction: float = 0.01,
    labelled: bool = True,
    progress: Progress | None = None,
) -> Path:
    """The directory of shards that holds a URI's images: the URI itself if it is one.

    Raises:
        DataError: nothing usable there, or too many bad images.
        StorageError: the cache directory cannot be written.
    """
    if shards := shards_at(uri):
        if labelled and not read_manifest(shards).class_names:
            raise unlabelled(uri)
        return shards
    source = open_source(uri, labelled=labelled)
    fingerprint = sha256_json([VERSION, source.fingerprint])[:32]
    target = Path(cache_dir).expanduser().resolve() / "shards" / fingerprint
    if not (target / MANIFEST_NAME).is_file():
        with _locked(target.with_name(f"{fingerprint}.lock")):
            if not (target / MANIFEST_NAME).is_file():  # another process may just have written it
                _clear_leftovers(target)
                write_shards(source, target, max_bad_fraction=max_bad_fraction, progress=progress)
    _check_bad_fraction(target, max_bad_fraction)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock, which the system gives back however this process ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as err:
        raise cannot_write(path, err) from err
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _clear_leftovers(target: Path) -> None:
    """Remove what killed writers left; under the lock, so none of them can be at work."""
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_bad_fraction(target: Path, max_bad_fraction: float) -> None:
    manifest = read_manifest(target)
    total = manifest.num_images + manifest.num_bad
    if manifest.num_bad > int(max_bad_fraction * total):
        which = f"{manifest.num_bad} of {total} images cannot be used"
        raise too_many_bad(which, target / BAD_NAME, max_bad_fraction)
