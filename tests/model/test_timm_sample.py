"""A sample of timm's families, and the packaged EfficientNet-Lites."""

import pytest
import timm
import torch

from tlrunner.config import BackboneConfig, HeadConfig
from tlrunner.errors import ConfigError
from tlrunner.model import from_timm
from tlrunner.model.backbones import EmptyParameters, describe
from tlrunner.model.classifier import build_classifier
from tlrunner.model.stages import tensor_names
from tlrunner.model.weights import LITE, NO_WEIGHTS, read_state

TRAINED_BY_DEFAULT = [
    *("timm/resnet18", "timm/convnext_atto", "timm/mobilenetv3_small_050"),
    "efficientnet_lite0",
]
FIXED_SIZE_BY_DEFAULT = ["timm/test_vit"]
TRAINED_SLOWLY = [
    *("timm/densenet121", "timm/vgg11", "timm/inception_v3", "timm/regnety_002"),
    *("timm/poolformer_s12", "timm/nf_resnet26", "timm/edgenext_xx_small", "timm/repvgg_a0"),
    *("efficientnet_lite1", "efficientnet_lite2"),
]
FIXED_SIZE_SLOWLY = [
    *("timm/vit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224", "timm/pit_ti_224"),
    *("timm/deit_tiny_distilled_patch16_224", "timm/maxvit_rmlp_pico_rw_256", "timm/mixer_s32_224"),
    *("timm/beit_base_patch16_224", "timm/cait_xxs24_224", "timm/eva02_tiny_patch14_224"),
    *("timm/tiny_vit_5m_224", "timm/levit_128s", "timm/fastvit_t8"),
]
EVERY = TRAINED_BY_DEFAULT + FIXED_SIZE_BY_DEFAULT + TRAINED_SLOWLY + FIXED_SIZE_SLOWLY


@pytest.mark.parametrize("name", EVERY)
def test_every_tensor_has_a_stage_and_only_the_classifier_is_dropped(name):
    inner = name.removeprefix("timm/")
    with EmptyParameters():
        cfg = timm.get_pretrained_cfg(LITE.get(inner, inner))
        backbone, stages = from_timm.build(inner, NO_WEIGHTS, "auto", cfg.input_size[-1])
        original = timm.create_model(LITE.get(inner, inner), num_classes=1000)
    assert sorted(stages.of_parameter) == sorted(tensor_names(backbone))
    assert sorted(set(stages.of_parameter.values())) == list(range(len(stages.names)))
    assert len(set(stages.names)) == len(stages.names)
    kept = {name: p.numel() for name, p in backbone.named_parameters()}
    sizes = {name: p.numel() for name, p in original.named_parameters()}
    classifier = [cfg.classifier] if isinstance(cfg.classifier, str) else cfg.classifier
    dropped = sizes.keys() - kept.keys()
    assert {name.partition(".")[0] for name in dropped} == {
        name.partition(".")[0] for name in classifier
    }
    assert kept == {name: size for name, size in sizes.items() if name not in dropped}


@pytest.mark.parametrize("name", TRAINED_BY_DEFAULT)
def test_frozen_stages_stand_still_while_the_rest_trains(
    name, build, check_frozen_parts_stand_still
):
    check_frozen_parts_stand_still(build(name, 64), 64)


@pytest.mark.parametrize("name", FIXED_SIZE_BY_DEFAULT)
def test_frozen_layers_of_a_transformer_stand_still(name, build, check_frozen_parts_stand_still):
    size = describe(BackboneConfig(name=name, weights="none")).preprocess.image_size
    check_frozen_parts_stand_still(build(name), size)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED_SLOWLY)
def test_frozen_stages_stand_still_in_more_families(name, build, check_frozen_parts_stand_still):
    check_frozen_parts_stand_still(build(name, 96), 96)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXED_SIZE_SLOWLY)
def test_frozen_layers_stand_still_in_more_transformers(
    name, build, check_frozen_parts_stand_still
):
    size = describe(BackboneConfig(name=name, weights="none")).preprocess.image_size
    check_frozen_parts_stand_still(build(name), size)


def test_efficientnet_lite_has_a_stage_for_each_group_of_blocks_the_stem_and_the_last_convolution():
    blocks = [f"blocks.{number}" for number in range(7)]
    assert describe(BackboneConfig(name="efficientnet_lite0")).stage_names == (
        "stem",
        *blocks,
        "conv_head",
    )


def test_a_last_norm_belongs_to_the_stage_before_it():
    for name in ("timm/vit_tiny_patch16_224", "timm/convnext_atto", "timm/densenet121"):
        names = describe(BackboneConfig(name=name, weights="none")).stage_names
        assert not any("norm" in stage for stage in names)


@pytest.mark.parametrize(
    "number", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_packaged_weights_compute_what_timm_computes_with_them(number):
    name = f"efficientnet_lite{number}"
    classifier, _ = build_classifier(BackboneConfig(name=name), HeadConfig(), 3, 64)
    reference = timm.create_model(f"tf_efficientnet_lite{number}").eval()
    tensors = read_state(from_timm.packaged_file(name)).values()
    reference.load_state_dict(dict(zip(reference.state_dict(), tensors, strict=True)))
    reference.reset_classifier(0)
    images_BCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(classifier.eval().backbone(images_BCHW), reference(images_BCHW))


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_resnet"])
@pytest.mark.parametrize("head", [{"pooling": "avg"}, {"pooling": "max"}, {"kind": "flatten_mlp"}])
def test_features_are_pooled_as_asked(name, head, build):
    size = describe(BackboneConfig(name=name, weights="none")).preprocess.image_size
    classifier = build(name, **head).eval()
    images_BCHW = torch.randn(1, 3, size, size)
    with torch.no_grad():
        features = classifier.backbone(images_BCHW)
        unpooled = build(name, kind="flatten_mlp").eval().backbone(images_BCHW)
        assert classifier(images_BCHW).shape == (1, 3)
    if "pooling" in head:
        places_BNC = unpooled[:, 1:] if unpooled.ndim == 3 else unpooled.flatten(2).transpose(1, 2)
        pooled = places_BNC.mean(1) if head["pooling"] == "avg" else places_BNC.amax(1)
        assert torch.allclose(features, pooled, atol=1e-5)


def test_a_pooling_that_a_model_does_not_have_is_refused(build):
    with pytest.raises(ConfigError, match=r"pit_ti_224 cannot do head\.pooling 'max'"):
        build("timm/pit_ti_224", pooling="max")


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "coat_tiny", "efficientvim_m1"]
)
def test_a_model_that_always_pools_is_refused_for_a_flattened_map(name, build):
    if name not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with pytest.raises(ConfigError, match=rf"{name} cannot do head\.kind 'flatten_mlp'"):
        build(f"timm/{name}", kind="flatten_mlp")


def test_a_transformer_is_built_for_the_size_of_the_images(build):
    assert build("timm/test_vit", 96)(torch.randn(2, 3, 96, 96)).shape == (2, 3)


def test_a_size_that_a_transformer_cannot_take_is_refused(build):
    with pytest.raises(ConfigError, match=r"data\.image_size is 225"):
        build("timm/levit_128s", 225)


def test_a_hybrid_that_runs_its_stem_while_it_is_built_is_described_at_any_size():
    config = BackboneConfig(name="timm/vit_tiny_r_s16_p8_224", weights="none")
    described = describe(config, image_size=256)
    assert (described.preprocess.image_size, len(described.stage_names)) == (256, 13)
