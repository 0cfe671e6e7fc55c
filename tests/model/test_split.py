"""The two parts of a backbone compute what the whole does, bit for bit."""

import copy
import subprocess
import sys

import pytest
import torch
from timm.layers import Attention
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
HANDING_ON_LISTS = ["timm/hrnet_w18_small", "timm/selecsls42", "timm/efficientvim_m1"]
LARGE = {"inception_v3": 96, "maxvit_t": 224}
HUGE = (  # as others of their kinds, with more of the same
    *("regnet_y_128gf", "regnet_y_32gf", "regnet_y_16gf", "regnet_x_32gf", "vit_h_14", "vit_l_16"),
    *("vit_l_32", "resnext101_64x4d", "convnext_large", "efficientnet_v2_l", "swin_b", "swin_v2_b"),
)


def built(name: str, size: int = 64) -> Classifier:
    torch.manual_seed(0)
    config = BackboneConfig(name=name, weights="none")
    return build_classifier(config, HeadConfig(), 3, size)[0].eval()


def images(size: int = 64, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def split_at(classifier: Classifier, depth: int, size: int = 64) -> Split:
    return split(classifier.backbone, classifier.stages, range(depth), images(size, 2))


@torch.no_grad()
def check_every_boundary(classifier: Classifier, size: int) -> None:
    images_BCHW, below = images(size), None
    whole = classifier.backbone(images_BCHW)
    for depth in range(1, len(classifier.stages.names) + 1):
        cut = split_at(classifier, depth, size)
        values = cut.prefix(images_BCHW)
        assert torch.equal(cut.suffix(*(value.clone() for value in values)), whole)
        if below:
            part = between(below, cut, images(size, 2))
            for ours, theirs in zip(part(*below.prefix(images_BCHW)), values, strict=True):
                assert torch.equal(ours, theirs)
        below = cut


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_compute_what_the_whole_does_at_each_boundary(name: str) -> None:
    check_every_boundary(built(name), 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", HANDING_ON_LISTS)
def test_lists_of_tensors_cross_one_by_one(name: str) -> None:
    classifier = built(name)
    depths = range(1, len(classifier.stages.names) + 1)
    assert max(len(split_at(classifier, depth).crossing) for depth in depths) > 1
    check_every_boundary(classifier, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in backbone_names() if not n.startswith("timm/") and n not in HUGE], ids=str
)
def test_every_torchvision_model_splits_at_each_boundary(name: str) -> None:
    size = LARGE.get(name, 64)
    classifier = built(name, size)
    images_BCHW, depths = images(size), range(1, len(classifier.stages.names) + 1)
    if sum(p.numel() for p in classifier.parameters()) > 10e6:  # minutes, else
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


JOINING = """
import torch
from tlrunner.model.split import fingerprint

graph = torch.fx.Graph()
images = graph.placeholder("images")
graph.output(graph.call_function(torch.cat, ([images, images],)))
found = fingerprint(torch.fx.GraphModule(torch.nn.Module(), graph))
print(found)
"""


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    ours: dict[str, str] = {}
    exec(JOINING, ours)
    command = [sys.executable, "-c", JOINING]
    theirs = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert theirs.strip() == ours["found"]


def test_a_fingerprint_tells_apart_what_differs_beside_weights() -> None:
    def of(layer: nn.Module) -> str:
        backbone = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Flatten(2), layer)
        for parameter in backbone.parameters():
            nn.init.ones_(parameter)
        stages = stages_of(backbone, {"stem": ["0"], "top": ["2"]})
        return fingerprint(split(backbone.eval(), stages, {0, 1}, images()).prefix)

    class Shifted(nn.Linear):
        def __init__(self, shift: float) -> None:
            super().__init__(16, 16)
            self.register_buffer("shift", torch.tensor(shift), persistent=False)

    assert of(Attention(16, num_heads=2)) == of(Attention(16, num_heads=2))
    assert of(Attention(16, num_heads=2)) != of(Attention(16, num_heads=4))
    assert of(Shifted(1.0)) != of(Shifted(2.0))


# -- Small models --------------------------------------------------------------------------------


class TwoStages(nn.Module):
    stem: nn.Module
    top: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.top = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return pooled(self.top(self.stem(images_BCHW)))


def pooled(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.mean((2, 3))


class Deciding(TwoStages):
    """Its path depends on the images, between its stages."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stem(images_BCHW)
        if x_BCHW.mean() > 0:
            x_BCHW = -x_BCHW
        return pooled(self.top(x_BCHW))


class Counting(TwoStages):
    """It computes numbers from the shape at the cut: some stay, some grow with the images."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW: Tensor = self.stem(images_BCHW)
        count, _, height, _ = x_BCHW.shape
        num_rows, num_channels = count * (height - 2), 4
        rows_RK: Tensor = self.top(x_BCHW).transpose(1, 2).reshape(num_rows, -1)
        return rows_RK.reshape(count, height - 2, num_channels, -1).mean((1, 3))


class Listing(TwoStages):
    """Its stem gives a list in a tuple, and its top changes the lists it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.top = Pair(self.stem), Changing(self.top)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        both = self.stem(images_BCHW)[0]
        return pooled(self.top([both[1], both[0]]) + self.top(both))


class Pair(nn.Sequential):
    def forward(self, images_BCHW: Tensor) -> tuple[list[Tensor], int]:
        x_BCHW = self[0](images_BCHW)
        return [x_BCHW, x_BCHW + 1], 2


class Changing(nn.Sequential):
    def forward(self, both: list[Tensor]) -> Tensor:
        both[0] = self[0](both[0])
        return both[0] + both[1][:, :, 2:, 2:]


class Dropping(TwoStages):
    """It trains in another way than it evaluates, around its stages."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = nn.functional.dropout(self.stem(images_BCHW), 0.5, self.training)
        return pooled(self.top(x_BCHW))


class DroppingAbove(TwoStages):
    """It trains in another way than it evaluates, within its top, which is of several stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.top = Dropping()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features: Tensor = self.top(self.stem(images_BCHW))
        return features


class Altering(TwoStages):
    """It changes in place what its top reads before."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stem(images_BCHW)
        return pooled(self.top(x_BCHW)) + pooled(x_BCHW.mul_(2))


class AlteringAbove(TwoStages):
    """Its top changes in place what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Sequential(nn.ReLU(inplace=True), self.top)


class Folding(TwoStages):
    """It hands parts of images on as if they were images."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stem(images_BCHW)
        return pooled(self.top(x_BCHW.reshape(2 * x_BCHW.shape[0], 4, 31, 62)))[::2]


TWO = {"stem": ["stem"], "top": ["top"]}
THREE = {"stem": ["stem"], "middle": ["top.stem"], "top": ["top.top"]}


@pytest.mark.parametrize("kind", [Counting, Listing, Dropping])
def test_numbers_and_lists_at_the_cut_hold_for_any_number_of_images(kind: type[TwoStages]) -> None:
    backbone = kind().eval()
    cut = split(backbone, stages_of(backbone, TWO), {0}, images()[:2])
    with torch.no_grad():
        for count in (1, 2, 5):
            images_BCHW = images(count=count)
            assert torch.equal(cut.suffix(*cut.prefix(images_BCHW)), backbone(images_BCHW))


@pytest.mark.parametrize(
    ("kind", "paths", "reason"),
    [
        (Deciding, TWO, "cannot be traced"),
        (DroppingAbove, THREE, "differ between training and evaluation"),
        (Altering, TWO, "do not compute what the whole does"),
        (AlteringAbove, TWO, "changes the values it is given"),
        (Folding, TWO, "not the images as its first dimension"),
    ],
)
def test_what_cannot_be_split_says_so_and_still_splits_where_all_is_frozen(
    kind: type[TwoStages], paths: dict[str, list[str]], reason: str
) -> None:
    backbone = kind().eval()
    stages = stages_of(backbone, paths)
    with pytest.raises(SplitError, match=reason):
        split(backbone, stages, {0}, images())
    cut = split(backbone, stages, range(len(paths)), images())
    with torch.no_grad():
        assert torch.equal(cut.suffix(*cut.prefix(images())), backbone(images()))


def test_nothing_is_split_where_nothing_is_frozen() -> None:
    classifier = built("resnet18")
    with pytest.raises(SplitError, match="nothing in it is frozen"):
        split_at(classifier, 0)
