"""What a trial will cost, measured on a few images before it starts.

One training step and one forward pass of the real architecture are timed on this machine, and the
bytes that autograd keeps for the backward pass are counted; both grow with the number of images.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tlrunner.config import BackboneConfig, Preprocess, TrialConfig
from tlrunner.model.classifier import Classifier, build_classifier
from tlrunner.model.freeze import levels

PROBE_IMAGES = 4
OPTIMIZER_COPIES = {"adamw": 2, "adam": 2, "sgd": 1}  # moments kept for each trained parameter


@dataclass(frozen=True)
class Cost:
    """Of one trial, without the images' decoding, which is hidden behind the computing."""

    seconds: float
    memory_bytes: int


def estimate_costs(
    trials: list[TrialConfig], num_classes: int, num_train: int, num_val: int
) -> list[Cost]:
    """The cost of each trial; equal architectures and strategies are measured once."""
    measured: dict[str, tuple[float, float, int, int]] = {}
    costs = []
    for trial in trials:
        keys = (trial.backbone, trial.freeze, trial.head, trial.data.image_size)
        architecture = repr(
            (*keys, trial.optim.optimizer, trial.train.ema_decay, trial.train.epochs)
        )
        if architecture not in measured:
            measured[architecture] = _measure(trial, num_classes)
        train_seconds, val_seconds, fixed_bytes, image_bytes = measured[architecture]
        micro_batch = -(-trial.train.batch_size // trial.train.gradient_accumulation_steps)
        per_epoch = num_train * train_seconds + num_val * val_seconds
        memory = fixed_bytes + min(micro_batch, num_train) * image_bytes
        costs.append(Cost(trial.train.epochs * per_epoch, memory))
    return costs


def _measure(trial: TrialConfig, num_classes: int) -> tuple[float, float, int, int]:
    """Seconds of training and of evaluating an image, fixed bytes, and bytes for each image."""
    classifier, preprocess, device = with_random_weights(trial, num_classes)
    # The last epoch trains the most stages, so the estimate of a phased strategy is an upper one.
    last_epoch = trial.train.epochs - 1
    classifier.set_levels(levels(trial.freeze, len(classifier.stages.names), last_epoch))
    classifier.to(memory_format=torch.channels_last)
    side = preprocess.image_size
    images_BCHW = torch.rand(PROBE_IMAGES, 3, side, side, device=device).contiguous(
        memory_format=torch.channels_last
    )
    trained = sum(p.numel() * p.element_size() for p in classifier.trainable_parameters().values())
    total = sum(p.numel() * p.element_size() for p in classifier.parameters())
    copies = 1 + OPTIMIZER_COPIES[trial.optim.optimizer] + (trial.train.ema_decay is not None)
    activation_bytes = _saved_bytes(classifier, images_BCHW)
    train_seconds = _seconds(lambda: _train_step(classifier.train(), images_BCHW))
    with torch.no_grad():
        val_seconds = _seconds(lambda: classifier.eval()(images_BCHW))
    return (
        train_seconds / PROBE_IMAGES,
        val_seconds / PROBE_IMAGES,
        total + copies * trained,
        activation_bytes // PROBE_IMAGES + images_BCHW[0].nbytes,
    )


def with_random_weights(trial: TrialConfig, num_classes: int) -> tuple[Classifier, Preprocess, str]:
    """The trial's classifier without its weights, on the device that the trial would use here."""
    device = "cuda" if trial.resources.gpus_per_worker != 0 and torch.cuda.is_available() else "cpu"
    torch.set_num_threads(trial.resources.cpus_per_worker)
    backbone = BackboneConfig(name=trial.backbone.name, weights="none")
    size = trial.data.image_size
    classifier, preprocess = build_classifier(backbone, trial.head, num_classes, size)
    classifier.to(device)
    return classifier, preprocess, device


def _train_step(classifier: Classifier, images_BCHW: Tensor) -> None:
    logits_BK = classifier(images_BCHW)
    F.cross_entropy(logits_BK, logits_BK.detach().argmax(1)).backward()  # type: ignore[no-untyped-call]


def _saved_bytes(classifier: Classifier, images_BCHW: Tensor) -> int:
    """Bytes of the distinct storages that a backward pass of these images would need."""
    parameters = {p.untyped_storage().data_ptr() for p in classifier.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        classifier.train()(images_BCHW)
    return sum(storages.values())


def _seconds(run: Callable[[], object]) -> float:
    """Time of the faster of two runs after a first that warms up."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])
