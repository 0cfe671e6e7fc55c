"""What k8s/README.md names is there, and what is there it names."""

import re
from collections.abc import Mapping

import test_manifests
import test_mistakes
import test_operator_rules
from manifests import K8S, OVERLAYS, build, of_kind

README = (K8S / "README.md").read_text()
PLANTED: tuple[Mapping[str, object], ...] = (
    test_manifests.AGAINST_THE_SCHEMA,
    test_operator_rules.CLUSTER_MISTAKES,
    test_operator_rules.JOB_MISTAKES,
    test_mistakes.MISTAKES,
    test_mistakes.JOB_MISTAKES,
)


def test_every_part_is_in_its_tables_and_every_overlay_is_tested() -> None:
    for part in [*(K8S / "components").iterdir(), *(K8S / "overlays").iterdir()]:
        assert f"`{part.name}`" in README, part
    assert {each.name for each in (K8S / "overlays").iterdir()} == set(OVERLAYS)


def test_directories_of_commands_exist() -> None:
    named = [path for path in re.findall(r"-k k8s/(\S+?)`?\s", README) if "NAME" not in path]
    assert len(named) >= 2
    assert [path for path in named if not (K8S / path / "kustomization.yaml").is_file()] == []


def test_versions_are_those_of_the_cluster() -> None:
    (cluster,) = of_kind(build("base"), "RayCluster")
    tags = set(re.findall(r"tlrunner:([0-9a-z.-]+)", README))
    assert {tag.rpartition("-")[0] for tag in tags} == {f"0.1.0-ray{cluster['spec']['rayVersion']}"}
    assert f"Kubernetes 1.32 to {test_manifests.KUBERNETES[-1].removesuffix('.0')}" in README


def test_as_many_mistakes_are_planted_as_it_says() -> None:
    (said,) = re.findall(r"(\d+) planted mistakes", README)
    assert int(said) == sum(len(mistakes) for mistakes in PLANTED)
