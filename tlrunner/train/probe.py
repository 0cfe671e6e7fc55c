"""What is measured on a model before it trains: that a step fits into memory, and latency."""

import time

import torch

from tlrunner.model.freeze import Level
from tlrunner.train.loop import Loop

LATENCY_SECONDS = 0.2  # spent on measuring, at most
MOMENTS = 2  # tensors that Adam keeps for each trained one


def check_memory(loop: Loop, levels: tuple[Level, ...], num_images: int, image_size: int) -> None:
    """Go forward and backward once with everything that will ever train, and forget it again.

    A trial that does not fit is found here and not in the epoch that thaws its backbone.

    Args:
        num_images: of one worker's micro-batch.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    classifier = loop.classifier
    kept = {name: buffer.clone() for name, buffer in classifier.named_buffers()}
    images_BHWC = torch.zeros(num_images, image_size, image_size, 3, dtype=torch.uint8)
    with torch.random.fork_rng():
        loop.enter_phase(levels)
        trained = list(classifier.trainable_parameters().values())
        moments = [torch.empty_like(parameter) for parameter in trained for _ in range(MOMENTS)]
        loop.model.train()
        loop.accelerator.backward(loop.model(loop.prepared(images_BHWC)).float().sum())
        del moments
    for parameter in trained:
        parameter.grad = None
    with torch.no_grad():
        for name, buffer in classifier.named_buffers():
            buffer.copy_(kept[name])


@torch.no_grad()
def latency_seconds(loop: Loop, image_size: int) -> float:
    """Seconds that the model takes for one image: the fastest of some runs, after a first.

    Not compiled, even where training is: for a single image it would be compiled once more.
    """
    loop.classifier.eval()
    image_BHWC = torch.zeros(1, image_size, image_size, 3, dtype=torch.uint8)
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < LATENCY_SECONDS:
        started = time.perf_counter()
        loop.classifier.forward(loop.prepared(image_BHWC)).argmax().item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
