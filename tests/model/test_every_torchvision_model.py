"""Every classification model of torchvision, with random weights and small images."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision import models

from tlrunner.model import from_torchvision
from tlrunner.model.backbones import EmptyParameters
from tlrunner.model.from_torchvision import CLASSIFIER_PARTS
from tlrunner.model.stages import module_spans, tensor_names
from tlrunner.model.weights import NO_WEIGHTS

ALL = from_torchvision.names()
IMAGE_SIZES = {"maxvit_t": 224, "inception_v3": 96, "vit_h_14": 70}
TRAINED_BY_DEFAULT = [
    *("alexnet", "resnet18", "squeezenet1_1", "mobilenet_v3_small"),
    *("shufflenet_v2_x0_5", "mnasnet0_5", "regnet_y_400mf", "efficientnet_b0"),
]
HUGE = ["regnet_y_128gf", "vit_h_14"]  # as others of their kinds, with more of the same
TRAINED_SLOWLY = [name for name in ALL if name not in (*TRAINED_BY_DEFAULT, *HUGE)]


NUM_STAGES = {
    **{"alexnet": 5, "googlenet": 10, "inception_v3": 12, "maxvit_t": 5, "mobilenet_v2": 9},
    **{"mobilenet_v3_large": 8, "mobilenet_v3_small": 7, "vit_b": 13, "vit_l": 25, "vit_h": 33},
    **{"resne": 5, "wide_resnet": 5, "vgg": 5, "densenet": 5, "convnext": 5, "swin": 5},
    **{"regnet": 5, "shufflenet": 5, "mnasnet": 8, "squeezenet": 9, "efficientnet_b": 9},
    **{"efficientnet_v2_s": 8, "efficientnet_v2_m": 9, "efficientnet_v2_l": 9},
}


def num_stages(name: str) -> int:
    return next(number for start, number in NUM_STAGES.items() if name.startswith(start))


def size_of(name: str) -> int:
    return IMAGE_SIZES.get(name, 64)


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_has_a_stage_and_only_the_classifier_is_dropped(name):
    with EmptyParameters():
        backbone, stages = from_torchvision.build(name, NO_WEIGHTS, "auto", size_of(name))
        original = from_torchvision._original(name, 224)
    assert sorted(stages.of_parameter) == sorted(tensor_names(backbone))
    assert sorted(set(stages.of_parameter.values())) == list(range(len(stages.names)))
    assert len(stages.names) == num_stages(name)
    assert set(module_spans(backbone, stages)) == dict(backbone.named_modules()).keys()

    kept = {name for name, _ in backbone.named_parameters()}
    sizes = {name: p.numel() for name, p in original.named_parameters()}
    dropped = sizes.keys() - kept
    assert kept <= sizes.keys(), "tensors keep torchvision's names"
    assert {name.partition(".")[0] for name in dropped} <= CLASSIFIER_PARTS | {"heads"}
    if name == "googlenet":  # its published count leaves the auxiliary classifiers out
        dropped = {name for name in dropped if not name.startswith("aux")}
    published = {weights.meta["num_params"] for weights in models.get_model_weights(name)}
    assert sum(sizes[name] for name in kept | dropped) in published


@pytest.mark.parametrize("name", TRAINED_BY_DEFAULT)
def test_frozen_stages_stand_still_while_the_rest_trains(
    name, build, check_frozen_parts_stand_still
):
    check_frozen_parts_stand_still(build(name, size_of(name)), size_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED_SLOWLY)
def test_frozen_stages_stand_still_in_every_other_model(
    name, build, check_frozen_parts_stand_still
):
    check_frozen_parts_stand_still(build(name, size_of(name)), size_of(name))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_features_are_those_of_the_original_model(name, build):
    assert_same_features(name, build, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("convnext_tiny", "swin_t", "swin_v2_t", "vit_b_32", "vgg11", "maxvit_t", "inception_v3"),
        *("regnet_x_400mf", "efficientnet_v2_s", "squeezenet1_0", "shufflenet_v2_x1_0"),
        *("mnasnet1_0", "mobilenet_v3_large", "alexnet", "densenet121", "googlenet"),
    ],
)
def test_features_are_those_of_the_original_model_in_every_family(name, build):
    assert_same_features(name, build, size_of(name))


def assert_same_features(name, build, image_size):
    """The backbone computes what the original feeds to its pooling or its classifier."""
    classifier = build(name, image_size).eval()
    original = from_torchvision._original(name, image_size).eval()
    original.load_state_dict(classifier.backbone.state_dict(), strict=False)
    if name in ("googlenet", "inception_v3"):
        original.transform_input = True
    torch.manual_seed(2)
    images_BCHW = torch.randn(2, 3, image_size, image_size)

    inputs_seen = []
    layer = first_dropped_layer(name, original)
    layer.register_forward_pre_hook(lambda module, inputs: inputs_seen.append(inputs[0]))
    with torch.no_grad():
        original(images_BCHW)
        found = classifier.backbone(images_BCHW)
    expected = inputs_seen[0].mean((2, 3)) if inputs_seen[0].ndim == 4 else inputs_seen[0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def first_dropped_layer(name, original):
    if name.startswith(("vgg", "alexnet")):
        return original.avgpool
    if name.startswith(("squeezenet", "mobilenet_v3")):
        return original.classifier[0]
    if name.startswith("maxvit"):
        return original.classifier[3]
    return [module for module in original.modules() if isinstance(module, nn.Linear)][-1]


def test_a_trial_of_torchvisions_imports_no_timm() -> None:
    script = (
        "import sys, tlrunner.train.trial\n"
        "from tlrunner.config import BackboneConfig, HeadConfig\n"
        "from tlrunner.model.classifier import build_classifier\n"
        "config = BackboneConfig(name='squeezenet1_1', weights='none')\n"
        "build_classifier(config, HeadConfig(), num_classes=2)\n"
        "sys.exit('timm' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
