"""docker/Dockerfile is built for real, but for the 6 GB of its packages: a minute with buildah.

The lock is cut down to setuptools, so that everything runs but the smoke test and what is left out.
docker/prove.py is the whole of it.
"""

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import images
import pytest
import smoke

pytestmark = pytest.mark.slow

LET_IN = ("tlrunner", "jobs", "docker", "README.md", "pyproject.toml", ".dockerignore")


@pytest.fixture(scope="module")
def store(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[images.Images]:
    """A storage with the base in it, and a context whose lock has setuptools alone."""
    if lacking := images.missing(images.NEEDED):
        pytest.skip(f"{' and '.join(lacking)} not installed (Debian has them)")
    if os.geteuid():
        pytest.skip("an image is built by root here")
    work = tmp_path_factory.mktemp("image")
    context = work / "context"
    context.mkdir()
    for name in LET_IN:
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, context / name)
    (context / "tlrunner" / ".env").write_text("PASSWORD=hush\n")
    lock = context / "docker" / "requirements.lock"
    (setuptools,) = re.findall(r"^setuptools==(?:.+\n)+?(?=    #|\S)", lock.read_text(), re.M)
    lock.write_text(setuptools)
    store = images.Images(work, context)
    try:
        store.make_base()
        yield store
    finally:
        store.close()


@pytest.fixture(scope="module")
def runtime(store: images.Images) -> Iterator[tuple[dict[str, Any], Path]]:
    """What both images run on: config and file system."""
    yield from built(store, "runtime")


@pytest.fixture(scope="module")
def package(store: images.Images) -> Iterator[tuple[dict[str, Any], Path]]:
    yield from built(store, "package")


def built(store: images.Images, target: str) -> Iterator[tuple[dict[str, Any], Path]]:
    log = store.work / f"{target}.log"
    try:
        store.build(target, f"small:{target}", log)
    except subprocess.CalledProcessError:
        pytest.fail(log.read_text()[-3000:])
    container, root = store.mount(f"small:{target}")
    yield store.config(f"small:{target}"), root
    store.buildah("rm", container)


def in_root(root: Path, command: str) -> str:
    """What bash says as the user of the image, within its file system."""
    user = f"{smoke.UID}:{smoke.UID}"
    return subprocess.run(
        ["chroot", f"--userspec={user}", root, "/usr/bin/env", "-i", "/bin/bash", "-c", command],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_what_images_run_on_has_no_file_with_rights_of_its_owner(
    runtime: tuple[dict[str, Any], Path],
) -> None:
    _, root = runtime
    rises = [
        path
        for path in root.rglob("*")
        if path.is_file()
        and not path.is_symlink()
        and path.lstat().st_mode & (stat.S_ISUID | stat.S_ISGID)
    ]
    assert rises == []


def test_the_user_has_a_home_a_shell_and_wget(runtime: tuple[dict[str, Any], Path]) -> None:
    config, root = runtime
    assert in_root(root, "id -un; id -u; id -g").split() == ["tlrunner", "10001", "10001"]
    assert in_root(root, "cd ~tlrunner && pwd && touch here && rm here") == "/home/tlrunner"
    assert in_root(root, "command -v wget")
    assert in_root(root, "bash -lc 'echo $PATH'").startswith("/opt/venv/bin:")
    assert config["WorkingDir"] == "/home/tlrunner"
    assert config["Labels"]["org.opencontainers.image.version"]


def test_python_has_the_bytecode_of_its_own_modules(runtime: tuple[dict[str, Any], Path]) -> None:
    _, root = runtime
    code = "import importlib.util as u, json; print(u.cache_from_source(json.__file__))"
    (bytecode,) = in_root(root, f'python3 -c "{code}"').split()
    assert (root / bytecode.lstrip("/")).is_file()


def test_nothing_is_left_of_building_it(runtime: tuple[dict[str, Any], Path]) -> None:
    _, root = runtime
    for path in ("tmp", "home/tlrunner", "root/.cache", "var/lib/apt/lists"):
        assert not (root / path).exists() or list((root / path).iterdir()) == []
    assert not any((root / path).exists() for path in ("usr/bin/gcc", "usr/bin/cc", "usr/bin/sudo"))


def test_the_package_is_a_layer_of_its_own_files_alone(
    root: Path, package: tuple[dict[str, Any], Path]
) -> None:
    layer = package[1] / "package"
    assert sorted(path.name for path in layer.rglob("*") if path.name == ".env") == []
    assert [path.name for path in (layer / "opt").iterdir() if path.name != "venv"] == ["tlrunner"]
    assert (layer / "opt/tlrunner/jobs/tune_flowers.yaml").is_file()
    installed = layer / "opt/venv/lib/python3.11/site-packages/tlrunner"
    for directory in ("tlrunner", "tlrunner/tune", "tlrunner/train", "jobs"):
        of = (layer / "opt/tlrunner" if directory == "jobs" else installed.parent) / directory
        sources = {path.stem for path in (root / directory).glob("*.py")}
        assert sources == {path.stem for path in of.glob("*.py")}
        assert sources == {path.name.split(".")[0] for path in of.glob("__pycache__/*.pyc")}
    script = (layer / "opt/venv/bin/tlrunner").read_text()
    assert script.startswith("#!/opt/venv/bin/python")


def test_settings_of_pip_are_in_no_layer(
    store: images.Images, package: tuple[dict[str, Any], Path]
) -> None:
    config, root = package
    conf = root / "etc/pip.conf"
    assert not conf.exists() or conf.read_text() == ""
    for value in images.pip_settings().values():
        assert value not in json.dumps(config)
