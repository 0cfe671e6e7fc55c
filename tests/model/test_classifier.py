import copy

import pytest
import torch
from torch import nn

from tlrunner.config import BackboneConfig, FreezeConfig, HeadConfig
from tlrunner.errors import ConfigError, StorageError
from tlrunner.model.backbones import backbone_names
from tlrunner.model.classifier import build_classifier, describe
from tlrunner.model.freeze import Level, audit, levels

F, N, T = Level.FROZEN, Level.NORM, Level.TRAINED


# -- Freezing ------------------------------------------------------------------------------------


def test_frozen_stages_stay_in_eval_mode_through_every_train(build):
    classifier = build("efficientnet_b0", 64)
    last_two = levels(FreezeConfig(strategy="last_stages", num_stages=2), 9, epoch=0)
    classifier.set_levels(last_two)
    for _ in range(2):
        classifier.train()
        for name, module in classifier.backbone.features.named_modules():
            if name:
                assert module.training == (int(name.partition(".")[0]) >= 7), name
        classifier.eval()
        assert not any(module.training for module in classifier.modules())
    classifier.train(False).train()
    assert not classifier.backbone.features[0].training
    assert classifier.head.training


def test_dropout_and_stochastic_depth_of_frozen_stages_draw_nothing(build):
    classifier = build("efficientnet_b0", 64).train()
    classifier.set_levels((F,) * 9)
    images_BCHW = torch.randn(2, 3, 64, 64)
    state = torch.get_rng_state()
    first, second = classifier.backbone(images_BCHW), classifier.backbone(images_BCHW)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_copy_of_a_classifier_keeps_its_frozen_stages(build):
    classifier = build("resnet18", 64)
    classifier.set_levels((F, F, F, F, T))
    copied = copy.deepcopy(classifier).train()
    assert not copied.backbone.layer1[0].bn1.training
    assert copied.backbone.layer4[0].bn1.training


def test_norm_level_trains_norm_layers_alone(build, train_step):
    classifier = build("resnet18", 64)
    classifier.set_levels((N,) * 5)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    train_step(classifier, 64)
    after = classifier.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {"bn1", "bn2", "downsample.1"}
    assert {
        name
        for name in before
        if name.startswith("head.") or any(f"{norm}." in name for norm in norms)
    } == changed
    assert changed == set(classifier.trainable_state())
    modes = {type(m).__name__: m.training for m in classifier.backbone.modules()}
    assert modes["BatchNorm2d"] and not modes["Conv2d"] and not modes["BasicBlock"]


def test_unfreezing_undoes_freezing(build):
    classifier = build("resnet18", 64)
    classifier.set_levels((F,) * 5)
    classifier.set_levels((T,) * 5)
    assert all(module.training for module in classifier.modules())
    assert all(parameter.requires_grad for parameter in classifier.parameters())


def test_gradients_of_what_becomes_frozen_are_gone(build, train_step):
    classifier = build("resnet18", 64)
    train_step(classifier, 64)
    classifier.set_levels((F,) * 5)
    assert all(parameter.grad is None for parameter in classifier.backbone.parameters())


def test_a_network_frozen_whole_records_no_graph_below_the_head(build):
    classifier = build("resnet18", 64)
    classifier.set_levels((F,) * 5)
    assert not classifier.backbone(torch.randn(1, 3, 64, 64)).requires_grad


def test_the_audit_counts_each_parameter_once(build):
    classifier = build("resnet18", 64)
    classifier.set_levels((F, F, F, F, T))
    rows = audit(classifier)
    assert [row.stage for row in rows] == [*classifier.stages.names, "head"]
    assert sum(row.num_params for row in rows) == sum(p.numel() for p in classifier.parameters())
    trained = classifier.trainable_parameters().values()
    assert sum(row.num_trainable for row in rows) == sum(p.numel() for p in trained)
    assert [row.num_norm_layers for row in rows] == [1, 4, 5, 5, 5, 0]
    assert [row.num_pinned for row in rows] == [1, 4, 5, 5, 0, 0]


def test_distance_is_counted_in_stages_from_the_head(build):
    classifier = build("resnet18", 64)
    distances = {classifier.distance_from_head(name) for name, _ in classifier.named_parameters()}
    assert distances == {0, 1, 2, 3, 4, 5}
    assert classifier.distance_from_head("backbone.layer4.0.conv1.weight") == 1
    assert classifier.distance_from_head("head.linear1.bias") == 0


# -- State ---------------------------------------------------------------------------------------


def test_the_trainable_state_restores_a_trained_model(build, train_step):
    trained, fresh = build("resnet18", 64), build("resnet18", 64)
    for classifier in (trained, fresh):
        classifier.set_levels((F, F, F, T, T))
    train_step(trained, 64)
    state = trained.trainable_state()
    assert "backbone.layer4.1.bn2.running_var" in state
    assert "backbone.layer1.0.bn1.running_var" not in state
    fresh.load_trainable_state(state)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_a_trainable_state_of_other_levels_is_refused(build):
    classifier = build("resnet18", 64)
    state = dict(classifier.trainable_state())
    classifier.set_levels((F, F, F, F, T))
    with pytest.raises(StorageError, match=r"backbone\.bn1\.bias"):
        classifier.load_trainable_state(state)


# -- Building ------------------------------------------------------------------------------------


def test_building_measures_the_features_without_moving_statistics(build):
    classifier = build("resnet18", 64)
    assert classifier.training
    assert classifier.backbone.bn1.num_batches_tracked == 0
    assert torch.equal(classifier.backbone.bn1.running_mean, torch.zeros(64))


def test_the_same_seed_gives_the_same_head(build):
    first, second = build("efficientnet_lite0", 64), build("efficientnet_lite0", 64)
    assert torch.equal(first.head.linear1.weight, second.head.linear1.weight)


@pytest.mark.parametrize(
    ("head", "linear_shapes"),
    [
        ({"kind": "linear", "dropout": 0.5}, [(3, 512)]),
        ({"kind": "mlp", "hidden_sizes": (8, 6)}, [(8, 512), (6, 8), (3, 6)]),
        ({"kind": "flatten_mlp", "hidden_sizes": (8,)}, [(8, 512 * 2 * 2), (3, 8)]),
    ],
)
def test_heads_fit_the_features(head, linear_shapes, build):
    classifier = build("resnet18", 64, **head)
    linears = [module for module in classifier.head if isinstance(module, nn.Linear)]
    assert [tuple(linear.weight.shape) for linear in linears] == linear_shapes
    assert isinstance(classifier.head[-1], nn.Linear)
    dropouts = [module.p for module in classifier.head if isinstance(module, nn.Dropout)]
    assert dropouts == [head.get("dropout", 0.0)] * len(linears)
    assert classifier(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_torchvision_features_are_pooled_as_asked(build):
    images_BCHW = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features_BCHW = build("resnet18", 64, kind="flatten_mlp").eval().backbone(images_BCHW)
        for pooling, expected in [
            ("auto", features_BCHW.mean((2, 3))),
            ("avg", features_BCHW.mean((2, 3))),
            ("max", features_BCHW.amax((2, 3))),
        ]:
            backbone = build("resnet18", 64, pooling=pooling).eval().backbone
            assert torch.equal(backbone(images_BCHW), expected)


@pytest.mark.parametrize("name", ["vit_b_32", "convnext_tiny"])
@pytest.mark.slow
def test_tokens_and_normed_maps_are_pooled_as_asked(name, build):
    images_BCHW = torch.randn(2, 3, 64, 64)
    shapes = {}
    for head in ({"pooling": "avg"}, {"pooling": "max"}, {"kind": "flatten_mlp"}):
        classifier = build(name, 64, **head).eval()
        assert classifier(images_BCHW).shape == (2, 3)
        shapes[str(head)] = tuple(classifier.backbone(images_BCHW).shape)
    unpooled = (2, 5, 768) if name == "vit_b_32" else (2, 2, 2, 768)
    assert list(shapes.values()) == [(2, 768), (2, 768), unpooled]


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "regnet_y_400mf", "swin_t"])
def test_a_description_needs_no_weights_and_agrees_with_the_model(name, build):
    described = describe(BackboneConfig(name=name))
    classifier = build(name, 64)
    assert described.stage_names == classifier.stages.names
    assert described.num_params == sum(p.numel() for p in classifier.backbone.parameters())


def test_preprocessing_comes_with_the_weights():
    trained = describe(BackboneConfig(name="resnet50", weights="IMAGENET1K_V2")).preprocess
    assert (trained.image_size, round(trained.crop_fraction, 3)) == (224, round(224 / 232, 3))
    random = describe(BackboneConfig(name="resnet50", weights="none")).preprocess
    assert (random.image_size, random.crop_fraction, random.interpolation) == (
        *(224, 0.875),
        "bilinear",
    )
    assert (
        describe(BackboneConfig(name="inception_v3", weights="none")).preprocess.image_size == 299
    )
    assert describe(BackboneConfig(name="inception_v3")).preprocess.image_size == 299
    lite = describe(BackboneConfig(name="efficientnet_lite2")).preprocess
    assert (lite.image_size, lite.mean, lite.interpolation) == (260, (0.5, 0.5, 0.5), "bicubic")


def test_the_image_size_asked_for_is_the_one_preprocessed_to():
    config = BackboneConfig(weights="none")
    classifier, preprocess = build_classifier(config, HeadConfig(), 3, image_size=96)
    assert preprocess.image_size == 96
    assert describe(config, image_size=96).preprocess == preprocess
    assert classifier(torch.randn(2, 3, 96, 96)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "image_size"), [("vit_b_32", 100), ("maxvit_t", 96), ("inception_v3", 48)]
)
def test_an_image_size_that_a_backbone_cannot_take_is_refused(name, image_size):
    config = BackboneConfig(name=name, weights="none")
    with pytest.raises(ConfigError, match=rf"data\.image_size is {image_size}, which {name}"):
        describe(config, image_size=image_size)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("resnet51", "resnet50"),
        ("efficientnet_light0", "efficientnet_lite0"),
        ("convnext_atto", "timm/convnext_atto exists"),
        ("timm/resnet1", "timm/resnet"),
    ],
)
def test_an_unknown_backbone_is_refused_with_the_nearest_name(name, remedy):
    with pytest.raises(ConfigError, match=f"backbone.name is '{name}'.*{remedy}"):
        describe(BackboneConfig(name=name))


def test_every_name_is_listed_once():
    names = backbone_names()
    assert len(names) == len(set(names)) > 1000
    assert {"efficientnet_lite0", "vgg16", "resnet50", "timm/convnext_tiny"} <= set(names)


def test_a_classifier_can_be_traced(build):
    classifier = build("resnet18", 64).eval()
    images_BCHW = torch.randn(2, 3, 64, 64)
    traced = torch.fx.symbolic_trace(classifier)
    with torch.no_grad():
        assert torch.equal(traced(images_BCHW), classifier(images_BCHW))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_b_32", "convnext_tiny", "efficientnet_lite0"])
def test_a_classifier_compiles_to_one_graph(name, build):
    classifier = build(name, 64).eval()
    images_BCHW = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(classifier, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(images_BCHW), classifier(images_BCHW), atol=1e-6)
