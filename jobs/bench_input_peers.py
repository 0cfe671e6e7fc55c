"""Loaders of images to measure side by side, for `bench_input.py`.

`write_files` writes the same JPEGs in every form. A peer is a function: where they are and a number
of cores -> endless batches of 64 training views at 224 px, uint8, of which it gives the number of
images. All make the same views: a random crop of 8 to 100 % of the area, flipped half of the time.

Containers are read twice, decoded by Pillow and torchvision as their users do, and by the fastest
that can be written in a few lines of Python, which is called cv2 here.
"""

import importlib.util
import io
import itertools
import logging
import os
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from tlrunner.config import AugmentConfig, DataConfig, Preprocess
from tlrunner.data.augment import TrainTransform, fitting_box
from tlrunner.data.dataset import open_dataset
from tlrunner.data.loader import train_batches
from tlrunner.data.order import Splits
from tlrunner.data.sources import open_source
from tlrunner.data.world import World
from tlrunner.data.write import write_shards
from tlrunner.train.device import keep_freed_memory
from tlrunner.train.feed import use_decoded_cache
from tlrunner.train.loop import ModelInput

BATCH_SIZE, SIDE, NUM_PARTS = 64, 224, 4
REPEATS = 8  # of the images in an epoch, whose beginning and end are no loader's best moments
PREPROCESS = Preprocess(
    image_size=SIDE,
    crop_fraction=0.875,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bilinear",
)
View = Callable[[bytes], np.ndarray]  # JPEG -> (224, 224, 3)


def write_files(images: Sequence[bytes], root: Path) -> None:
    """Write JPEGs as `folder`, `shards`, `parquet`, `tars` and `litdata`, in 4 parts."""
    for number, data in enumerate(images):
        path = root / "folder" / f"class{number % NUM_PARTS}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_shards(open_source(str(root / "folder")), root / "shards")
    (root / "parquet").mkdir()
    (root / "tars").mkdir()
    for part in range(NUM_PARTS):
        mine = list(enumerate(images))[part::NUM_PARTS]
        columns = {"image": [data for _, data in mine], "label": [i % NUM_PARTS for i, _ in mine]}
        pq.write_table(pa.table(columns), root / "parquet" / f"{part}.parquet", compression="none")
        with tarfile.open(root / "tars" / f"{part}.tar", "w") as tar:
            for number, data in mine:
                for name, content in (("jpg", data), ("cls", str(number % NUM_PARTS).encode())):
                    entry = tarfile.TarInfo(f"{number:06}.{name}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    if importlib.util.find_spec("litdata"):
        os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(root / "chunks")
        os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(root / "data")
        from litdata import optimize

        paths = sorted(map(str, (root / "folder").glob("*/*")))
        optimize(_sample, paths * REPEATS, str(root / "litdata"), num_workers=1, chunk_bytes="16MB")


def _sample(path: str) -> dict[str, Any]:
    return {"image": Path(path).read_bytes(), "label": int(Path(path).parent.name[-1])}


def decode_limit(root: Path, cores: int) -> Iterator[int]:
    """One core that does nothing but decode, in full, from memory."""
    images = [path.read_bytes() for path in sorted((root / "folder").glob("*/*"))]
    while True:
        for start in range(0, len(images), BATCH_SIZE):
            for data in images[start : start + BATCH_SIZE]:
                simplejpeg.decode_jpeg(data)
            yield len(images[start : start + BATCH_SIZE])


def tlrunner(root: Path, cores: int, is_decoded: bool = False) -> Iterator[int]:
    return map(len, tlrunner_images(root, cores, is_decoded))


def tlrunner_images(root: Path, cores: int, is_decoded: bool = False) -> Iterator[torch.Tensor]:
    keep_freed_memory()  # as a trial does
    dataset = open_dataset(root / "shards")
    every, none = np.arange(len(dataset)), np.empty(0, np.int64)
    if is_decoded:
        config = DataConfig(decoded_cache="on", cache_dir=str(root / "cache"))
        use_decoded_cache(config, dataset, Splits(every, none, none), PREPROCESS)
    transform = TrainTransform(AugmentConfig(), PREPROCESS, seed=0)
    for epoch in itertools.count():
        for batch in train_batches(
            dataset,
            np.tile(every, REPEATS),
            transform,
            seed=0,
            epoch=epoch,
            batch_size=BATCH_SIZE,
            world=World(),
            num_threads=cores,
        ):
            yield batch.images_BHWC


def tlrunner_decoded(root: Path, cores: int) -> Iterator[int]:
    return tlrunner(root, cores, is_decoded=True)


def tlrunner_float(root: Path, cores: int) -> Iterator[int]:
    """Normalised as well, in the thread that would train."""
    model_input = ModelInput(PREPROCESS, torch.device("cpu"))
    for images_BHWC in tlrunner_images(root, cores):
        yield len(model_input(images_BHWC))


def image_folder(root: Path, cores: int, is_float: bool = False) -> Iterator[int]:
    """What most people use; normalised as well where `is_float`."""
    steps = [transforms.ToTensor(), transforms.Normalize(PREPROCESS.mean, PREPROCESS.std)]
    transform = transforms.Compose([*crop(), *steps]) if is_float else pil_transform()
    folder = ImageFolder(str(root / "folder"), transform=transform)
    images = ConcatDataset([folder] * REPEATS)
    return _sizes(DataLoader(images, BATCH_SIZE, shuffle=True, **_workers(cores)))


def webdataset(root: Path, cores: int, view: View) -> Iterator[int]:
    import webdataset as wds

    tars = sorted(map(str, (root / "tars").glob("*.tar")))
    samples = wds.WebDataset(tars, shardshuffle=len(tars), empty_check=False).repeat()
    views = samples.shuffle(1000).to_tuple("jpg", "cls").map_tuple(view, int).batched(BATCH_SIZE)
    return _sizes(wds.WebLoader(views, batch_size=None, **_workers(cores)))


def hugging_face(root: Path, cores: int, view: View) -> Iterator[int]:
    import datasets

    # a shuffled pass begins with seconds of waiting, which an epoch of usual length hides
    parts = sorted(map(str, (root / "parquet").glob("*.parquet"))) * 16 * REPEATS
    rows = datasets.load_dataset("parquet", data_files=parts, split="train", streaming=True)
    views = rows.shuffle(seed=0, buffer_size=1000).map(lambda row: {"image": view(row["image"])})
    return _sizes(DataLoader(_Endless(views), BATCH_SIZE, **_workers(cores)))


def litdata(root: Path, cores: int, view: View) -> Iterator[int]:
    from litdata import StreamingDataLoader, StreamingDataset

    class Views(StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[np.ndarray, int]:
            sample = super().__getitem__(index)
            return view(sample["image"]), sample["label"]

    samples = Views(str(root / "litdata"), shuffle=True)
    return _sizes(StreamingDataLoader(samples, batch_size=BATCH_SIZE, **_workers(cores)))


def ray_data(root: Path, cores: int, view: View) -> Iterator[int]:
    import ray

    ray.init(
        num_cpus=cores,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=256 * 2**20,  # with more it runs minutes ahead of who reads
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def views(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"image": np.stack([view(data) for data in batch["image"]])}

    parts = sorted(map(str, (root / "parquet").glob("*.parquet"))) * REPEATS
    rows = ray.data.read_parquet(parts).map_batches(views, batch_size=BATCH_SIZE)
    while True:
        for batch in rows.iter_torch_batches(batch_size=BATCH_SIZE, prefetch_batches=2):
            yield len(batch["image"])


def crop() -> list[Any]:
    return [transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip()]


def pil_transform() -> transforms.Compose:
    return transforms.Compose([*crop(), transforms.PILToTensor()])


def pil_view(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(pil_transform()(image))


def cv2_view(data: bytes) -> np.ndarray:
    """Decode what is large at a fraction of its size, cut out, and resize without a filter."""
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    share, where, x, y = (random.random() for _ in range(4))
    box_hw = fitting_box((height, width), 0.08 + 0.92 * share, where, (3 / 4, 4 / 3))
    rows, columns = SIDE * height / box_hw[0], SIDE * width / box_hw[1]
    pixels = simplejpeg.decode_jpeg(data, min_height=rows, min_width=columns, min_factor=2)
    scale = pixels.shape[0] / height
    high, wide = (max(1, int(side * scale)) for side in box_hw)
    top, left = int(y * (pixels.shape[0] - high)), int(x * (pixels.shape[1] - wide))
    out = cv2.resize(pixels[top : top + high, left : left + wide], (SIDE, SIDE))
    return cv2.flip(out, 1) if random.random() < 0.5 else out


class _Endless(IterableDataset):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        while True:
            for row in self.rows:
                yield row["image"], row["label"]


def _workers(cores: int) -> dict[str, Any]:
    return {"num_workers": cores, "persistent_workers": True}


def _sizes(loader: Any) -> Iterator[int]:
    while True:
        for images, *_ in loader:
            yield len(images)


Peer = Callable[[Path, int], Iterator[int]]


def _with(view: View, container: Callable[[Path, int, View], Iterator[int]]) -> Peer:
    return lambda root, cores: container(root, cores, view)


_CONTAINERS = {  # name -> (what must be importable, reader)
    "webdataset": ("webdataset", webdataset),
    "Hugging Face streaming": ("datasets", hugging_face),
    "litdata": ("litdata", litdata),
    "Ray Data": ("ray.data", ray_data),
}
LIMIT, FOLDER = "decoding alone, 1 core", "ImageFolder, PIL"
PEERS: dict[str, Peer] = {
    LIMIT: decode_limit,
    "tlrunner, 1 thread": lambda root, cores: tlrunner(root, 1),
    "tlrunner": tlrunner,
    "tlrunner, decoded cache, 1 thread": lambda root, cores: tlrunner_decoded(root, 1),
    "tlrunner, decoded cache": tlrunner_decoded,
    "tlrunner, float32": tlrunner_float,
    FOLDER: image_folder,
    "ImageFolder, PIL, float32": lambda root, cores: image_folder(root, cores, is_float=True),
    **{f"{name}, PIL": _with(pil_view, reader) for name, (_, reader) in _CONTAINERS.items()},
    **{f"{name}, cv2": _with(cv2_view, reader) for name, (_, reader) in _CONTAINERS.items()},
}
MODULE_OF = {
    f"{name}, {view}": module
    for name, (module, _) in _CONTAINERS.items()
    for view in ("PIL", "cv2")
}


def is_installed(peer: str) -> bool:
    return peer not in MODULE_OF or importlib.util.find_spec(MODULE_OF[peer]) is not None
