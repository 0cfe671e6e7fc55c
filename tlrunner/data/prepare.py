"""Shards for a URI: made the first time, found every time after.

They live in `CACHE_DIR/shards/FINGERPRINT`. Any number of processes may ask at once: one writes
while the others wait; what a killed writer finished is continued.
"""

from pathlib import Path

from tlrunner.data.dataset import load_manifest
from tlrunner.data.fetch import open_store
from tlrunner.data.manifest import MANIFEST_NAME, VERSION, Manifest
from tlrunner.data.sources import open_source, shards_at, unlabelled
from tlrunner.data.write import BAD_NAME, Progress, too_many_bad, write_shards
from tlrunner.files import locked, sha256_json
from tlrunner.uris import local_path


def prepare(
    uri: str,
    cache_dir: str | Path,
    *,
    max_bad_fraction: float = 0.01,
    labelled: bool = True,
    progress: Progress | None = None,
) -> str:
    """Where a URI's images are as shards: the URI itself if it holds them, else a directory.

    Raises:
        DataError: nothing usable there, or too many bad images.
        StorageError: the cache directory cannot be written.
    """
    if shards := shards_at(uri):
        if labelled and not load_manifest(open_store(str(shards))).class_names:
            raise unlabelled(uri)
        return str(shards)
    source = open_source(uri, labelled=labelled, cache_dir=cache_dir)
    fingerprint = sha256_json([VERSION, source.fingerprint])[:32]
    target = local_path(cache_dir) / "shards" / fingerprint
    if not (target / MANIFEST_NAME).is_file():
        with locked(target.with_name(f"{fingerprint}.lock")):
            if not (target / MANIFEST_NAME).is_file():  # another process may just have written it
                write_shards(source, target, max_bad_fraction=max_bad_fraction, progress=progress)
    _check_bad_fraction(target, load_manifest(open_store(str(target))), max_bad_fraction)
    return str(target)


def _check_bad_fraction(target: Path, manifest: Manifest, max_bad_fraction: float) -> None:
    total = manifest.num_images + manifest.num_bad
    if manifest.num_bad > int(max_bad_fraction * total):
        which = f"{manifest.num_bad} of {total} images cannot be used"
        raise too_many_bad(which, str(target / BAD_NAME), max_bad_fraction)
