"""Published weights staged once, in a directory or below an S3 prefix, so that trials ask no hub.

    URI/NAME/weights.safetensors     every tensor of the model, its classifier's too
             staged.json             written last: size, SHA-256, where they are from

`NAME` is that of `backbones.published_name`, model and set. `tlrunner weights` writes and checks
them; a trial with `backbone.weights_uri` reads them by `local_copy`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file

from tlrunner.config import BackboneConfig
from tlrunner.data.fetch import fetch, open_store
from tlrunner.data.store import Store
from tlrunner.errors import ConfigError, StorageError
from tlrunner.files import locked, sha256_bytes, sha256_file, sha256_text, write_json
from tlrunner.model.backbones import published_name, published_state
from tlrunner.train.place import read_from
from tlrunner.uris import local_path

TENSORS, RECORD = "weights.safetensors", "staged.json"
STAGE_AGAIN = "remove its directory, and stage it again"


@dataclass(frozen=True)
class Staged:
    """What was staged under a name. `source`: the address it was published at."""

    name: str
    source: str
    num_bytes: int
    sha256: str


def staged_weights(uri: str) -> list[Staged]:
    """All that is staged at a URI, by name.

    Raises:
        StorageError: the place cannot be read, or a record in it is none.
    """
    store = open_store(uri)
    ending = f"/{RECORD}"
    names = [e.name.removesuffix(ending) for e in store.list() if e.name.endswith(ending)]
    return [record for name in names if (record := _record(store, name))]


def check_staged(config: BackboneConfig) -> None:
    """Check that the weights of a config are where it says, if it says so.

    Raises:
        ConfigError: they are not, or it names none that are published.
        StorageError: the place cannot be read.
    """
    if config.weights_uri:
        _wanted(config)


def local_copy(config: BackboneConfig, cache_dir: str | Path) -> Path | None:
    """The staged weights of a config on this node, their SHA-256 checked; None if it names none.

    Of any number of trials, one downloads them.

    Raises:
        ConfigError: see `check_staged`.
        StorageError: they cannot be read, or are not those that were staged.
    """
    staged = _wanted(config) if config.weights_uri else None
    if staged is None:
        return None
    uri = f"{open_store(str(config.weights_uri)).uri}/{staged.name}/{TENSORS}"
    if "://" not in uri:
        return fetch(uri, cache_dir, staged.sha256)
    with locked(local_path(cache_dir) / "fetched" / f".{sha256_text(uri)[:32]}.lock"):
        return fetch(uri, cache_dir, staged.sha256)


def pull(config: BackboneConfig, uri: str) -> Staged:
    """Fetch published weights from their hub and stage them at a URI, once.

    Raises:
        ConfigError: they are not published, but a file or installed with tlrunner.
        StorageError: they cannot be fetched or written.
    """
    name = published_name(config)
    if name is None:
        raise ConfigError(
            f"{config.name} with weights '{config.weights}' is not fetched from a hub",
            "weights that torchvision or timm publish, e.g. resnet50 or resnet50:IMAGENET1K_V1",
            "leave it out",
        )
    store = open_store(uri)
    if there := _record(store, name):
        return there
    source, state = published_state(config)
    with TemporaryDirectory(prefix="tlrunner-weights-") as directory:
        path = Path(directory) / TENSORS
        # Cloned, as a safetensors file has no two names for the same memory.
        save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, path)
        staged = Staged(name, source, path.stat().st_size, sha256_file(path))
        _put(store, staged, path)
    return staged


def push(source: str, uri: str) -> Iterator[tuple[Staged, bool]]:
    """Copy what is staged at one URI to another; yields each, and whether it was there before.

    Raises:
        StorageError: nothing is staged there, a place fails, or what is read is not as staged.
    """
    store = open_store(uri)
    for staged in _some_staged(source):
        if there := _record(store, staged.name):
            if there != staged:
                raise StorageError(
                    f"{uri}/{staged.name} has the SHA-256 {there.sha256}",
                    staged.sha256,
                    f"remove {uri}/{staged.name}, or choose another place",
                )
            yield staged, True
            continue
        with TemporaryDirectory(prefix="tlrunner-weights-") as directory:
            path = Path(directory) / TENSORS
            path.write_bytes(_checked(open_store(source), staged))
            _put(store, staged, path)
        yield staged, False


def verify(uri: str) -> Iterator[tuple[Staged, str]]:
    """Read all that is staged at a URI; yields each, and what is wrong with it, or "".

    Raises:
        StorageError: the place cannot be read, or nothing is staged there.
    """
    store = open_store(uri)
    for staged in _some_staged(uri):
        try:
            _checked(store, staged)
        except StorageError as err:
            yield staged, str(err)
        else:
            yield staged, ""


def _some_staged(uri: str) -> list[Staged]:
    staged = staged_weights(uri)
    if not staged:
        raise StorageError(
            f"nothing is staged at {uri}",
            "a place that tlrunner weights pull or push wrote to",
            "check its spelling",
        )
    return staged


def _wanted(config: BackboneConfig) -> Staged | None:
    name, uri = published_name(config), config.weights_uri
    if name is None or uri is None:
        return None
    store = open_store(uri)
    staged = _record(store, name)
    if staged is None:
        spelled = config.name if config.weights == "default" else f"{config.name}:{config.weights}"
        raise ConfigError(
            f"backbone.weights_uri {uri} has no {name}",
            ", ".join(other.name for other in staged_weights(uri)) or "nothing is staged there",
            f"tlrunner weights pull {spelled} --to {uri}",
        )
    return staged


def _record(store: Store, name: str) -> Staged | None:
    staged = read_from(store, Staged, f"{name}/{RECORD}")
    if staged and staged.name != name:
        where = f"{store.uri}/{name}/{RECORD}"
        raise StorageError(f"{where} is of {staged.name}", name, "stage it again")
    return staged


def _checked(store: Store, staged: Staged) -> bytes:
    """The tensors' bytes, if they are those that were staged."""
    where = f"{store.uri}/{staged.name}/{TENSORS}"
    try:
        content = store.read(f"{staged.name}/{TENSORS}")
    except FileNotFoundError:
        raise StorageError(f"{where} is not there", "", STAGE_AGAIN) from None
    if (found := sha256_bytes(content)) != staged.sha256:
        raise StorageError(f"{where} has the SHA-256 {found}", staged.sha256, STAGE_AGAIN)
    return content


def _put(store: Store, staged: Staged, tensors: Path) -> None:
    store.put(f"{staged.name}/{TENSORS}", tensors)
    record = tensors.with_name(RECORD)
    write_json(record, asdict(staged))
    store.put(f"{staged.name}/{RECORD}", record)
