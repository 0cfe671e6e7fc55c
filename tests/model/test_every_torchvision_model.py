"""Every classification model of torchvision, with random weights and images as small as it takes."""

import pytest
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
    *("shufflenet_v2_x0_5", "mnasnet0_5", "regnet_y_400mf", "efficientnet_b0", "densenet121"),
]
# 0.6 to 2.6 GB of parameters, whose families have smaller members: built without memory, not run.
TOO_BIG = ["vit_h_14", "vit_l_16", "vit_l_32", "regnet_y_128gf", "convnext_large"]
TRAINED_SLOWLY = [name for name in ALL if name not in {*TRAINED_BY_DEFAULT, *TOO_BIG}]


def size_of(name: str) -> int:
    return IMAGE_SIZES.get(name, 64)


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_has_a_stage_and_only_the_classifier_is_dropped(name):
    with EmptyParameters():
        backbone, stages = from_torchvision.build(name, NO_WEIGHTS, "auto", size_of(name))
        original = from_torchvision._original(name, 224)
    assert sorted(stages.of_parameter) == sorted(tensor_names(backbone))
    assert sorted(set(stages.of_parameter.values())) == list(range(len(stages.names)))
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
def test_frozen_stages_stand_still_while_the_rest_trains(name, build, frozen_parts_stand_still):
    frozen_parts_stand_still(build(name, size_of(name)), size_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED_SLOWLY)
def test_frozen_stages_stand_still_in_every_other_model(name, build, frozen_parts_stand_still):
    frozen_parts_stand_still(build(name, size_of(name)), size_of(name))


def test_stages_follow_the_blocks_of_each_family():
    counts = {}
    for name in ALL:
        with EmptyParameters():
            counts[name] = len(
                from_torchvision.build(name, NO_WEIGHTS, "auto", size_of(name))[1].names
            )
    resnets = [name for name in ALL if "resne" in name]
    assert {counts[name] for name in resnets} == {5}
    assert {counts[name] for name in ALL if name.startswith("vgg")} == {5}
    assert {counts[name] for name in ALL if name.startswith(("swin", "convnext", "dense"))} == {5}
    assert {counts[name] for name in ALL if name.startswith(("regnet", "shufflenet"))} == {5}
    assert {counts[name] for name in ALL if name.startswith("efficientnet_b")} == {9}
    assert {counts[name] for name in ALL if name.startswith("squeezenet")} == {9}
    assert (counts["alexnet"], counts["googlenet"], counts["inception_v3"]) == (5, 10, 12)
    assert (counts["vit_b_16"], counts["vit_l_16"], counts["maxvit_t"]) == (13, 25, 5)
    assert (counts["mobilenet_v2"], counts["mnasnet1_0"]) == (9, 8)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "googlenet", "mobilenet_v2"])
def test_features_are_those_of_the_original_model(name, build):
    assert_same_features(name, build, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size"),
    [("convnext_tiny", 64), ("swin_t", 64), ("swin_v2_t", 64), ("vit_b_32", 64), ("vgg11", 64)]
    + [("maxvit_t", 224), ("inception_v3", 96), ("regnet_x_400mf", 64), ("efficientnet_v2_s", 64)]
    + [("squeezenet1_0", 64), ("shufflenet_v2_x1_0", 64), ("mnasnet0_5", 64), ("alexnet", 64)],
)
def test_features_are_those_of_the_original_model_in_every_family(name, image_size, build):
    assert_same_features(name, build, image_size)


def assert_same_features(name, build, image_size):
    """The backbone computes what the original feeds to its pooling or its last linear layer."""
    import torch
    from torch import nn

    classifier = build(name, image_size).eval()
    original = from_torchvision._original(name, image_size).eval()
    original.load_state_dict(classifier.backbone.state_dict(), strict=False)
    if name in ("googlenet", "inception_v3"):
        original.transform_input = True
    torch.manual_seed(2)
    images_BCHW = torch.randn(2, 3, image_size, image_size)

    seen = []
    last = [m for m in original.modules() if isinstance(m, nn.Linear)]
    pools = [m for m in original.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    hidden = name.startswith(("vgg", "alexnet", "squeezenet", "maxvit"))
    layer = pools[-1] if hidden and pools else last[-1]
    if name.startswith("maxvit"):
        layer = original.classifier[3]
    if name.startswith("squeezenet"):
        layer = original.classifier[0]
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        original(images_BCHW)
        found = classifier.backbone(images_BCHW)
    expected = seen[0].mean((2, 3)) if seen[0].ndim == 4 else seen[0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
