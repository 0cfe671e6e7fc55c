"""Heads: features of a backbone -> logits. Initialised by torch's global generator alone."""

from collections import OrderedDict
from itertools import pairwise

from torch import nn

from tlrunner.config import HeadConfig


def build_head(head: HeadConfig, num_features: int, num_classes: int) -> nn.Module:
    """One linear layer, or a perceptron with ReLU; dropout before each linear layer.

    The module takes (batch, num_features), or for `flatten_mlp` any shape with num_features values
    an image, and returns logits (batch, num_classes). `flatten_mlp` is the classifier of VGG
    (Simonyan and Zisserman, 2015; https://arxiv.org/abs/1409.1556).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if head.kind == "flatten_mlp":
        layers["flatten"] = nn.Flatten()
    widths = (num_features, *(head.hidden_sizes or ()), num_classes)
    for number, (width_in, width_out) in enumerate(pairwise(widths), start=1):
        layers[f"dropout{number}"] = nn.Dropout(head.dropout)
        layers[f"linear{number}"] = nn.Linear(width_in, width_out)
        layers[f"relu{number}"] = nn.ReLU()
    layers.popitem()  # no activation after the logits
    return nn.Sequential(layers)
