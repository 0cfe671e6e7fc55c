"""tlrunner: which pretrained backbone, how much of it to unfreeze, with which hyperparameters?

    model, labels, transform = tlrunner.load("RUN/best")
    logits = model(transform("photo.jpg")[None])

The layers, each importing only what stands before it:

    errors < config < data | model < train < tune < report < run < cli
"""

import logging
from typing import TYPE_CHECKING, Any

from tlrunner.secrets import Redacting

if TYPE_CHECKING:
    from tlrunner.train.export import load

__all__ = ["load"]

logging.getLogger("tlrunner").addFilter(Redacting())  # in every process, those of Ray too


def __getattr__(name: str) -> Any:
    """Import torch only for those who load a model."""
    if name == "load":
        from tlrunner.train.export import load

        return load
    raise AttributeError(f"module 'tlrunner' has no attribute '{name}'")
