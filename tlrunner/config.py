"""Every key of a trial: its type, bounds, default and meaning, as frozen pydantic models.

`TrialConfig` says everything about one trial, so that the same config always gives the same model.
The configs of whole jobs, in `jobconfig.py`, are made of these sections and a few more.
"""

from typing import Literal

from pydantic import Field, model_validator

from tlrunner.section import Section, Uri

CACHE_DIR = "~/.cache/tlrunner"


class DataConfig(Section):
    """Which images, and how they are split."""

    uri: Uri = "sample:flowers"
    """`sample:flowers`, an ImageFolder directory, a CSV or JSONL list, Parquet files, or a
    directory or `s3://` prefix of shards with manifest.json."""
    image_size: int | None = Field(None, ge=16, le=2048)
    """Side of the square the model sees, in pixels. None: what the weights were trained at."""
    limit: int | None = Field(None, ge=4)
    """Use this many samples, stratified by class and split. None: all."""
    val_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of each class that validates, chosen by hash of the sample's key. Images whose source
    says that they are for training, validation or test are taken at its word."""
    test_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of each class that neither trains nor validates; `jobs/predict.py` reports it."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Stop when more than this share of the images cannot be used."""
    num_workers: int | None = Field(None, ge=1, le=256)
    """Threads that decode and augment. None: as many as the trial has CPUs."""
    cache_dir: str = Field(CACHE_DIR, min_length=1)
    """Where images are kept as shards, what is fetched, and decoded images."""
    cache_bytes: int | None = Field(None, ge=0)
    """Disk that fetched shards, decoded images and activations may take together, on each node.
    None: a third of what is free, at most 200 GB."""
    streaming: Literal["auto", "on", "off"] = "auto"
    """Read shards in S3 row group by row group and keep none; an epoch then shuffles 16 row groups
    at a time. `auto`: where they do not fit into `cache_bytes`."""
    decoded_cache: Literal["auto", "on", "off"] = "auto"
    """Decode each image once for all trials of a node, with the shorter side that evaluation
    resizes to; training crops are cut from that instead of from the full image. `auto`: where the
    images are larger than that, and fit into `cache_bytes` and half of the memory."""

    @model_validator(mode="after")
    def _splits_leave_training_data(self) -> "DataConfig":
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction together must stay below 1")
        return self

    @model_validator(mode="after")
    def _streams_are_not_kept(self) -> "DataConfig":
        if self.streaming == "on" and self.decoded_cache == "on":
            raise ValueError("'decoded_cache: on' is not used with 'streaming: on'")
        return self


class BackboneConfig(Section):
    """Which pretrained network."""

    name: str = Field("efficientnet_lite0", min_length=1, max_length=200)
    """A torchvision classification model, `timm/NAME`, or `efficientnet_lite0|1|2` (packaged)."""
    weights: Uri = "default"
    """`default`, `none`, a named set (`IMAGENET1K_V2`), or a file path or `s3://` URI."""
    weights_uri: Uri | None = None
    """Where `tlrunner weights` staged published weights. None: their hub is asked for them."""
    weights_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 that a weights file or URI must have."""


Strategy = Literal[
    "head", "last_stages", "first_stages", "norm_and_head", "full", "lp_ft", "gradual"
]


class FreezeConfig(Section):
    """How much of the backbone trains. The head always does."""

    variants = {
        "strategy": {
            "head": {},
            "last_stages": {"num_stages": 1},
            "first_stages": {"num_stages": 1},
            "norm_and_head": {},
            "full": {},
            "lp_ft": {"head_epochs": 1},
            "gradual": {"epochs_per_stage": 1},
        }
    }
    strategy: Strategy = "head"
    """What trains: `head` alone, the `last_stages` or `first_stages`, `norm_and_head`, `full`,
    `lp_ft` (the head alone first, then all), `gradual` (one more stage, from the top, in turn)."""
    num_stages: int | None = Field(None, ge=1)
    """Stages that train, counted from the head (`last_stages`) or the stem (`first_stages`)."""
    head_epochs: int | None = Field(None, ge=1)
    """`lp_ft`: epochs with the head alone, before everything trains."""
    epochs_per_stage: int | None = Field(None, ge=1)
    """`gradual`: epochs before the next stage joins."""

    def __str__(self) -> str:
        """The strategy with the number that goes with it, as `last_stages 2`."""
        numbers = (self.num_stages, self.head_epochs, self.epochs_per_stage)
        return " ".join([self.strategy, *(str(n) for n in numbers if n is not None)])


class HeadConfig(Section):
    """What replaces the backbone's classifier."""

    variants = {
        "kind": {
            "linear": {"pooling": "auto"},
            "mlp": {"pooling": "auto", "hidden_sizes": (512,)},
            "flatten_mlp": {"hidden_sizes": (512, 512)},
        }
    }
    kind: Literal["linear", "mlp", "flatten_mlp"] = "linear"
    """One linear layer, a perceptron on pooled features, or one on the flattened feature map."""
    pooling: Literal["auto", "avg", "max"] | None = None
    """How the feature map is pooled. `auto`: as the backbone was pretrained."""
    hidden_sizes: tuple[int, ...] | None = Field(None, min_length=1, max_length=4)
    """Widths of the hidden layers of a perceptron."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before each linear layer of the head."""

    @model_validator(mode="after")
    def _hidden_sizes_are_widths(self) -> "HeadConfig":
        if any(not 1 <= width <= 65536 for width in self.hidden_sizes or ()):
            raise ValueError("each of hidden_sizes must lie in 1..65536")
        return self


class OptimConfig(Section):
    """How parameters move."""

    variants = {
        "optimizer": {"adamw": {}, "adam": {}, "sgd": {"momentum": 0.9}},
        "schedule": {
            "cosine": {},
            "step": {"step_epochs": 10, "step_gamma": 0.1},
            "constant": {},
        },
    }
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """AdamW (Loshchilov and Hutter, 2019), Adam, or SGD with momentum."""
    lr: float = Field(1e-3, gt=0, le=100)
    """Peak learning rate."""
    weight_decay: float = Field(0.01, ge=0, le=10)
    """Decay of weights; biases and norm parameters are exempt."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """`sgd`: share of the last step that is kept."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of each stage as a multiple of that of the stage above it (the head has 1)."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate falls after warm-up: half a cosine to zero, in steps, or not."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs, fractions allowed, of linear warm-up before the schedule."""
    step_epochs: int | None = Field(None, ge=1)
    """`step`: epochs between two drops."""
    step_gamma: float | None = Field(None, gt=0, lt=1)
    """`step`: factor of each drop."""
    max_grad_norm: float | None = Field(None, gt=0)
    """Clip the norm of all trained gradients. None: no clipping."""


class TrainConfig(Section):
    """How long and in what precision one trial trains."""

    epochs: int = Field(5, ge=1, le=10_000)
    """Passes over the training images."""
    batch_size: int = Field(32, ge=1, le=65536)
    """Images per optimizer step, whatever the number of workers or micro-batches."""
    gradient_accumulation_steps: int = Field(1, ge=1, le=1024)
    """Micro-batches that a batch is cut into to save memory. The result stays the same, but for
    BatchNorm layers that train: they see a micro-batch at a time."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Number format of matrix products and convolutions; fp16 needs a GPU."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over all classes."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Validate and keep an exponential moving average of the weights. None: the weights."""
    checkpoint_seconds: float = Field(300.0, gt=0, le=1e8)
    """Seconds of an epoch between checkpoints that a trial can go on from; there is one at the end
    of each epoch, too."""
    stall_seconds: float = Field(1800.0, gt=0, le=1e8)
    """Seconds without a step, after which a trial's process ends, to go on in a new one."""
    channels_last: bool = True
    """Store tensors in NHWC order, which convolutions are faster in."""
    compile: bool = False
    """Compile the model with torch.compile."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the head's first weights, the order of images, their augmentation, and dropout."""

    @model_validator(mode="after")
    def _micro_batches_are_not_empty(self) -> "TrainConfig":
        if self.gradient_accumulation_steps > self.batch_size:
            raise ValueError("gradient_accumulation_steps must not exceed batch_size")
        return self


class AugmentConfig(Section):
    """How a training image varies from view to view. Zero or null turns an entry off."""

    crop_scale: tuple[float, float] | None = (0.5, 1.0)
    """Random resized crop: least and greatest share of the image's area."""
    horizontal_flip: float = Field(0.5, ge=0, le=1)
    """Probability."""
    vertical_flip: float = Field(0.0, ge=0, le=1)
    """Probability."""
    rotation: float = Field(0.0, ge=0, le=180)
    """Greatest angle either way, in degrees."""
    translation: float = Field(0.0, ge=0, le=1)
    """Greatest shift either way, as a share of the side."""
    zoom: float = Field(0.0, ge=0, lt=1)
    """Greatest relative change of scale either way."""
    shear: float = Field(0.0, ge=0, le=60)
    """Greatest angle either way, in degrees."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Factor drawn from 1 - x to 1 + x."""
    contrast: float = Field(0.0, ge=0, le=1)
    """As brightness."""
    saturation: float = Field(0.0, ge=0, le=1)
    """As brightness."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Greatest shift either way, as a share of the colour circle."""
    random_erasing: float = Field(0.0, ge=0, le=1)
    """Probability that a rectangle is painted over (Zhong et al., 2020)."""
    trivial_augment: bool = False
    """One random operation of random strength per view (Müller and Hutter, 2021)."""
    mixup: float = Field(0.0, ge=0, le=10)
    """Alpha of the Beta distribution that blends pairs of images (Zhang et al., 2018)."""
    cutmix: float = Field(0.0, ge=0, le=10)
    """Alpha of the Beta distribution of pasted areas (Yun et al., 2019)."""
    num_views: int | None = Field(None, ge=1)
    """Each sample has this many fixed views, the same for all seeds; epoch e uses view e mod
    num_views. None: a new view every epoch."""

    @model_validator(mode="after")
    def _crop_scale_is_a_range(self) -> "AugmentConfig":
        low, high = self.crop_scale or (1.0, 1.0)
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is {[low, high]}, valid: 0 < least <= greatest <= 1")
        return self


class ReuseConfig(Section):
    """Whether what frozen stages compute is kept and read again, by all trials of a node."""

    mode: Literal["auto", "on", "off"] = "auto"
    """`auto`: where it saves more time than it takes, and fits into `data.cache_bytes`; `on`:
    wherever stages from the stem up are frozen and there is room."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of what is kept. `auto`: as it is computed, so that no result changes."""
    uri: Uri | None = None
    """An `s3://` prefix, or a directory that all nodes see, through which nodes hand on what they
    computed; other kinds of CPUs or GPUs may differ in the last digits. None: each node computes
    its own."""

    @model_validator(mode="after")
    def _what_is_handed_on_is_kept(self) -> "ReuseConfig":
        if self.mode == "off" and self.uri is not None:
            raise ValueError("'uri' is not used with 'mode: off', valid modes: auto, on")
        return self


class ResourceConfig(Section):
    """What one trial gets."""

    workers_per_trial: int = Field(1, ge=1, le=1024)
    """Processes that share each batch of a trial, on one node or on several. The result does not
    depend on it, but for BatchNorm layers that train on CPUs."""
    cpus_per_worker: int = Field(1, ge=1, le=1024)
    """CPUs, which is also the number of compute threads."""
    gpus_per_worker: int | float | None = Field(None, ge=0, le=1)
    """0, 1, or the share of a GPU and its memory that a trial with one worker has, as 0.25. None:
    1 if the machine or cluster has any, else 0."""

    @model_validator(mode="after")
    def _workers_have_gpus_or_shares(self) -> "ResourceConfig":
        if 0 < (self.gpus_per_worker or 0) < 0.01:
            raise ValueError(f"gpus_per_worker is {self.gpus_per_worker}, valid: 0, or 0.01 to 1")
        if self.workers_per_trial > 1 and self.gpus_per_worker not in (None, 0, 1):
            raise ValueError(
                f"gpus_per_worker is {self.gpus_per_worker}, valid with several workers_per_trial: "
                "0 or 1, since NCCL takes one worker a GPU"
            )
        return self


class TrialConfig(Section):
    """Everything that decides the outcome of one trial."""

    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    freeze: FreezeConfig = FreezeConfig()
    head: HeadConfig = HeadConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    augment: AugmentConfig = AugmentConfig()
    reuse: ReuseConfig = ReuseConfig()
    resources: ResourceConfig = ResourceConfig()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> "TrialConfig":
        epochs, strategy = self.train.epochs, self.freeze.strategy
        parts = self.resources.workers_per_trial * self.train.gradient_accumulation_steps
        if parts > self.train.batch_size:
            raise ValueError(
                "resources.workers_per_trial times train.gradient_accumulation_steps is "
                f"{parts}, valid: at most train.batch_size ({self.train.batch_size})"
            )
        if self.optim.warmup_epochs >= epochs:
            raise ValueError(
                f"optim.warmup_epochs is {self.optim.warmup_epochs}, valid: below train.epochs "
                f"({epochs})"
            )
        if self.freeze.head_epochs is not None and self.freeze.head_epochs >= epochs:
            raise ValueError(
                f"freeze.head_epochs is {self.freeze.head_epochs}, valid: below train.epochs "
                f"({epochs})"
            )
        if self.data.streaming == "on" and self.reuse.uri is not None:
            raise ValueError(
                "'reuse.uri' is not used with data.streaming 'on', where nothing frozen is kept"
            )
        if strategy == "head" and self.optim.layer_decay != 1:
            raise ValueError("'optim.layer_decay' is not used with freeze.strategy 'head'")
        return self


class Preprocess(Section):
    """How an image becomes what a backbone expects. Not set by users: it comes with the weights.

    The short side is resized to `image_size / crop_fraction` and the centre is cropped; pixels in
    [0, 1] are then normalised by `mean` and `std`, per RGB channel.
    """

    image_size: int = Field(ge=1, le=2048)
    """Side of the square that the model sees, in pixels."""
    crop_fraction: float = Field(gt=0, le=1)
    """Share of the short side that the crop keeps."""
    mean: tuple[float, float, float]
    """Of R, G and B, in [0, 1]."""
    std: tuple[float, float, float]
    """Of R, G and B, in [0, 1]."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    """Filter of the resize."""
