"""The two parts of a backbone compute what the whole does, bit for bit."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tlrunner.config import BackboneConfig, HeadConfig
from tlrunner.model.backbones import backbone_names
from tlrunner.model.classifier import Classifier, build_classifier
from tlrunner.model.freeze import Level
from tlrunner.model.split import Split, SplitError, between, fingerprint, split
from tlrunner.model.stages import stages_of

FAMILIES = [
    *("resnet18", "densenet121", "googlenet", "squeezenet1_1", "shufflenet_v2_x0_5"),
    *("vit_b_32", "swin_t", "convnext_tiny", "efficientnet_lite0"),
    *("timm/vit_tiny_patch16_224", "timm/mobilenetv3_small_050", "timm/resnet10t"),
]
LARGE = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56}


def built(name: str, size: int = 64) -> Classifier:
    torch.manual_seed(0)
    config = BackboneConfig(name=name, weights="none")
    return build_classifier(config, HeadConfig(), 3, size)[0].eval()


def images(size: int = 64, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def split_at(classifier: Classifier, depth: int, size: int = 64) -> Split:
    return split(classifier.backbone, classifier.stages, range(depth), images(size))


@torch.no_grad()
def check_every_boundary(classifier: Classifier, size: int) -> None:
    images_BCHW, below = images(size, 2), None
    whole = classifier.backbone(images_BCHW)
    for depth in range(1, len(classifier.stages.names) + 1):
        cut = split_at(classifier, depth, size)
        values = cut.prefix(images_BCHW)
        assert torch.equal(cut.suffix(*(value.clone() for value in values)), whole)
        if below:
            part = between(below, cut, images(size))
            for ours, theirs in zip(part(*below.prefix(images_BCHW)), values, strict=True):
                assert torch.equal(ours, theirs)
        below = cut


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_compute_what_the_whole_does_at_each_boundary(name: str) -> None:
    check_every_boundary(built(name), 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in backbone_names() if not n.startswith("timm/")], ids=str
)
def test_every_torchvision_model_splits_at_each_boundary(name: str) -> None:
    size = LARGE.get(name, 64)
    classifier = built(name, size)
    images_BCHW, depths = images(size, 2), range(1, len(classifier.stages.names) + 1)
    if sum(p.numel() for p in classifier.parameters()) > 30e6:  # minutes, else
        depths = depths[:: len(depths) // 2]
    with torch.no_grad():
        whole = classifier.backbone(images_BCHW)
        for depth in depths:
            cut = split_at(classifier, depth, size)
            assert torch.equal(cut.suffix(*cut.prefix(images_BCHW)), whole)


def test_a_suffix_trains_the_backbone_itself() -> None:
    classifier = built("resnet18")
    depth = 3
    levels = tuple(Level.TRAINED if stage >= depth else Level.FROZEN for stage in range(5))
    classifier.set_levels(levels)
    classifier.split = split_at(classifier, depth)
    classifier.train()
    images_BCHW = images()
    with torch.no_grad():
        values = classifier.split.prefix(images_BCHW)
    classifier(values=values).sum().backward()
    ours = {n: p.grad.clone() for n, p in classifier.named_parameters() if p.grad is not None}
    statistics = copy.deepcopy(dict(classifier.named_buffers()))
    other = built("resnet18")
    other.set_levels(levels)
    other.train()
    other(images_BCHW).sum().backward()
    theirs = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(statistics[n], tensor) for n, tensor in other.named_buffers())


def test_splitting_changes_neither_modes_nor_statistics() -> None:
    classifier = built("efficientnet_b0")
    classifier.set_levels((Level.FROZEN,) * 4 + (Level.TRAINED,) * 5)
    classifier.train()
    modes = [module.training for module in classifier.modules()]
    state = copy.deepcopy(classifier.state_dict())
    random = torch.get_rng_state()
    split_at(classifier, 4)
    assert modes == [module.training for module in classifier.modules()]
    assert all(torch.equal(state[name], t) for name, t in classifier.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_models_that_share_a_base_share_its_fingerprint() -> None:
    one, other = built("resnet18"), built("resnet18")
    with torch.no_grad():
        other.backbone.get_submodule("layer4").get_parameter("0.conv1.weight").add_(1)
    assert fingerprint(split_at(one, 3).prefix) == fingerprint(split_at(other, 3).prefix)
    assert fingerprint(split_at(one, 5).prefix) != fingerprint(split_at(other, 5).prefix)
    other.backbone.get_buffer("bn1.running_mean")[0] += 1e-3
    assert fingerprint(split_at(one, 3).prefix) != fingerprint(split_at(other, 3).prefix)
    assert fingerprint(split_at(one, 2).prefix) != fingerprint(split_at(one, 3).prefix)


class Deciding(nn.Module):
    """Its path depends on the images, between its stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.top = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stem(images_BCHW)
        if x_BCHW.mean() > 0:
            x_BCHW = -x_BCHW
        return self.top(x_BCHW).mean((2, 3))


class Dropping(Deciding):
    """It trains in another way than it evaluates, between its stages."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = nn.functional.dropout(self.stem(images_BCHW), 0.5, self.training)
        return self.top(x_BCHW).mean((2, 3))


@pytest.mark.parametrize(("kind", "reason"), [(Deciding, "traced"), (Dropping, "training")])
def test_what_cannot_be_followed_says_so_and_still_splits_where_all_is_frozen(
    kind: type[Deciding], reason: str
) -> None:
    backbone = kind().eval()
    stages = stages_of(backbone, {"stem": ["stem"], "top": ["top"]})
    with pytest.raises(SplitError, match=reason):
        split(backbone, stages, {0}, images())
    cut = split(backbone, stages, {0, 1}, images())
    with torch.no_grad():
        assert torch.equal(cut.suffix(*cut.prefix(images())), backbone(images()))
