"""Published weights staged once, and what trials make of them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from torchvision import models

from tests.s3_servers import Bucket
from tlrunner.config import BackboneConfig, DataConfig, TrialConfig
from tlrunner.data import fetch
from tlrunner.errors import ConfigError, StorageError
from tlrunner.files import sha256_file
from tlrunner.model import from_timm
from tlrunner.model.backbones import describe
from tlrunner.model.weights import LITE
from tlrunner.train.loaded import load_classifier
from tlrunner.train.staged import (
    Staged,
    check_staged,
    local_copy,
    pull,
    push,
    staged_weights,
    verify,
)
from tlrunner.tune.plan import check_trial

Published = dict[str, torch.Tensor]
V1 = BackboneConfig(name="mobilenet_v2", weights="IMAGENET1K_V1")


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    """What `V1` is published as; later on nobody can be asked for it any more."""
    torch.manual_seed(8)
    state = models.mobilenet_v2(num_classes=1000).state_dict()
    torch.save(state, tmp_path / "file.pth")
    digest = sha256_file(tmp_path / "file.pth")[:8]
    file = (tmp_path / "file.pth").rename(tmp_path / f"mobilenet-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(models.MobileNet_V2_Weights.IMAGENET1K_V1.value, "url", file.as_uri())
    return state


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no hub"))
    url = "http://127.0.0.1:9/gone-00000000.pth"
    monkeypatch.setattr(models.MobileNet_V2_Weights.IMAGENET1K_V1.value, "url", url)


def trial(backbone: BackboneConfig, uri: object, tmp_path: Path) -> TrialConfig:
    backbone = backbone.model_copy(update={"weights_uri": str(uri)})
    return TrialConfig(
        backbone=backbone, data=DataConfig(cache_dir=str(tmp_path / "cache"), image_size=64)
    )


def assert_loads(config: TrialConfig, state: Published) -> None:
    classifier, preprocess = load_classifier(config, 3)
    own = classifier.backbone.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.items())
    named = config.backbone.model_copy(update={"weights_uri": None})
    assert preprocess == describe(named, 64).preprocess


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


# -- A directory ---------------------------------------------------------------------------------


def test_what_is_pulled_is_what_a_trial_loads_without_a_hub(published, request, tmp_path):
    staged = pull(V1, str(tmp_path / "staged"))
    assert staged.name == "mobilenet_v2.IMAGENET1K_V1"
    file = tmp_path / "staged" / staged.name / "weights.safetensors"
    assert (staged.sha256, staged.num_bytes) == (sha256_file(file), file.stat().st_size)
    request.getfixturevalue("no_hub")
    assert pull(V1, str(tmp_path / "staged")) == staged
    assert_loads(trial(V1, tmp_path / "staged", tmp_path), published)
    # V1 crops another part of an image than the default V2, which the staged file is not
    default = describe(BackboneConfig(name="mobilenet_v2"), 64).preprocess
    assert describe(V1, 64).preprocess != default


def test_timm_weights_are_staged_as_timm_builds_them(tmp_path, monkeypatch):
    create_model = timm.create_model

    def pretrained(name: str, pretrained: bool = False, **arguments: object) -> torch.nn.Module:
        torch.manual_seed(9 if pretrained else 10)
        is_published = pretrained and "pretrained_cfg_overlay" not in arguments
        return create_model(name, pretrained=pretrained and not is_published, **arguments)

    monkeypatch.setattr(from_timm.timm, "create_model", pretrained)
    backbone = BackboneConfig(name="timm/resnet18.a1_in1k")
    torch.manual_seed(9)
    state = create_model("resnet18.a1_in1k").state_dict()
    assert pull(backbone, str(tmp_path / "staged")).name == "timm/resnet18.a1_in1k"
    assert_loads(trial(backbone, tmp_path / "staged", tmp_path), state)


def test_a_default_is_staged_under_the_set_it_means(published, tmp_path, monkeypatch):
    url = models.MobileNet_V2_Weights.IMAGENET1K_V1.url
    monkeypatch.setattr(models.MobileNet_V2_Weights.IMAGENET1K_V2.value, "url", url)
    default = BackboneConfig(name="mobilenet_v2")
    assert pull(default, str(tmp_path / "staged")).name == "mobilenet_v2.IMAGENET1K_V2"
    with pytest.raises(ConfigError, match=r"weights_uri .* has no mobilenet_v2.IMAGENET1K_V1"):
        check_staged(trial(V1, tmp_path / "staged", tmp_path).backbone)


def test_weights_that_are_not_staged_end_a_job_before_its_trials(tmp_path):
    place = tmp_path / "staged"
    with pytest.raises(ConfigError) as caught:
        check_trial(trial(V1, place, tmp_path))
    assert caught.value.valid == "nothing is staged there"
    assert caught.value.remedy == f"tlrunner weights pull mobilenet_v2:IMAGENET1K_V1 --to {place}"


@pytest.mark.parametrize("name", [*LITE, "squeezenet1_1"])
def test_weights_that_no_hub_has_are_not_staged(name, tmp_path):
    weights = "default" if name in LITE else "none"
    with pytest.raises(ConfigError, match="is not fetched from a hub"):
        pull(BackboneConfig(name=name, weights=weights), str(tmp_path))


def test_a_place_for_weights_that_would_not_be_used_is_refused(tmp_path):
    for weights in ("none", "/own.pth"):
        config = BackboneConfig(name="resnet18", weights=weights, weights_uri="s3://b/weights")
        with pytest.raises(ConfigError, match=f"weights_uri is not used with .*'{weights}'"):
            describe(config)
    packaged = BackboneConfig(name="efficientnet_lite0", weights_uri=str(tmp_path))
    assert local_copy(packaged, tmp_path) is None


def test_a_flipped_bit_is_named_and_refused(published, tmp_path):
    place = tmp_path / "staged"
    staged = pull(V1, str(place))
    assert list(verify(str(place))) == [(staged, "")]
    flip(place / staged.name / "weights.safetensors")
    [(_, fault)] = verify(str(place))
    assert f"{staged.name}/weights.safetensors has the SHA-256" in fault
    with pytest.raises(StorageError, match=staged.sha256):
        load_classifier(trial(V1, place, tmp_path), 3)
    with pytest.raises(StorageError, match=staged.sha256):
        list(push(str(place), str(tmp_path / "copy")))
    assert staged_weights(str(tmp_path / "copy")) == []


def test_a_record_that_is_torn_or_of_others_is_refused(published, tmp_path):
    record = tmp_path / "staged" / pull(V1, str(tmp_path / "staged")).name / "staged.json"
    record.write_text(record.read_text().replace("mobilenet_v2.", "../../"))
    with pytest.raises(StorageError, match="is of"):
        check_staged(trial(V1, tmp_path / "staged", tmp_path).backbone)
    record.write_text(record.read_text()[:40])
    with pytest.raises(StorageError, match=r"staged\.json cannot be read"):
        check_staged(trial(V1, tmp_path / "staged", tmp_path).backbone)


# -- S3 ------------------------------------------------------------------------------------------


def test_a_push_copies_what_is_not_there_yet(published, s3_bucket: Bucket, tmp_path):
    uri, place = f"{s3_bucket.uri}/weights", str(tmp_path / "staged")
    staged = pull(V1, place)
    assert list(push(place, uri)) == [(staged, False)]
    assert list(push(place, uri)) == [(staged, True)]
    assert list(verify(uri)) == [(staged, "")]
    assert_loads(trial(V1, uri, tmp_path), published)
    assert list(push(uri, str(tmp_path / "back"))) == [(staged, False)]


def test_other_weights_of_the_same_name_are_not_replaced(published, tmp_path):
    pull(V1, str(tmp_path / "mine"))
    theirs = tmp_path / "theirs" / "mobilenet_v2.IMAGENET1K_V1"
    theirs.mkdir(parents=True)
    other = Staged(theirs.name, "elsewhere", 1, 64 * "0")
    (theirs / "staged.json").write_text(
        f'{{"name": "{other.name}", "source": "", "num_bytes": 1, "sha256": "{other.sha256}"}}'
    )
    with pytest.raises(StorageError, match=f"has the SHA-256 {other.sha256}"):
        list(push(str(tmp_path / "mine"), str(tmp_path / "theirs")))


def test_wrong_bytes_do_not_get_into_the_cache(published, moto_bucket: Bucket, tmp_path):
    config = trial(V1, f"{moto_bucket.uri}/weights", tmp_path)
    staged = pull(V1, str(config.backbone.weights_uri))
    key = f"weights/{staged.name}/weights.safetensors"
    content = moto_bucket.client.get_object(Bucket=moto_bucket.name, Key=key)["Body"].read()
    wrong = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    moto_bucket.client.put_object(Bucket=moto_bucket.name, Key=key, Body=wrong)
    with pytest.raises(StorageError, match=staged.sha256):
        load_classifier(config, 3)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    moto_bucket.client.put_object(Bucket=moto_bucket.name, Key=key, Body=content)
    assert_loads(config, published)


def test_of_many_trials_one_downloads(published, moto_bucket: Bucket, tmp_path, monkeypatch):
    config = trial(V1, f"{moto_bucket.uri}/weights/", tmp_path)
    pull(V1, str(config.backbone.weights_uri))
    downloaded: list[str] = []
    download = fetch.download

    def counted(store: object, name: str, *rest: object) -> None:
        downloaded.append(name)
        download(store, name, *rest)

    monkeypatch.setattr(fetch, "download", counted)
    with ThreadPoolExecutor(8) as pool:
        copies = set(pool.map(lambda _: local_copy(config.backbone, tmp_path / "c"), range(16)))
    assert len(copies) == len(downloaded) == 1
    assert Path(downloaded[0]).name == "weights.safetensors"
