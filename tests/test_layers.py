"""The walls between the layers, as the code's own import statements tell them."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tlrunner"
RANKS = [
    {"errors"},
    {
        "section",
        "config",
        "files",
        "configfile",
        "searchconfig",
        "secrets",
        "stored",
        "jobconfig",
        "uris",
        "machine",
        "signals",
        "paths",
    },
    {"data", "model"},
    {"train"},
    {"tune"},
    {"report"},
    {"run", "predict", "screen", "tools"},
    {"cli"},
]
RANK_OF = {layer: rank for rank, layers in enumerate(RANKS) for layer in layers}
HOME_OF = {"ray": "tlrunner.tune", "accelerate": "tlrunner.train", "boto3": "tlrunner.data.s3"}
HOME_OF["botocore"] = HOME_OF["boto3"]


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module, the package's own __init__ aside."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found["tlrunner"]  # it offers `load` of a higher layer, imported when asked for
    return found


MODULES = modules()


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, at its top or later; modules where they are ours."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & MODULES.keys() or {node.module}
    return names


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def layer_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_layers_below_its_own(module: str) -> None:
    layer = layer_of(module)
    for imported in IMPORTS[module] & MODULES.keys():
        other = layer_of(imported)
        is_peer = RANK_OF[other] == RANK_OF[layer] and {layer, other} != {"data", "model"}
        assert RANK_OF[other] < RANK_OF[layer] or is_peer, f"{module} imports {imported}"


def test_every_import_of_ours_is_of_a_module_that_exists() -> None:
    for module, names in IMPORTS.items():
        ours = {name for name in names if name.split(".")[0] == "tlrunner"}
        assert ours <= MODULES.keys(), module


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {name: IMPORTS[name] & MODULES.keys() for name in MODULES}
    ordered = TopologicalSorter(graph).static_order()  # raises CycleError
    assert set(ordered) == set(MODULES)


@pytest.mark.parametrize("library", sorted(HOME_OF))
def test_a_walled_library_is_imported_in_its_home_alone(library: str) -> None:
    importers = {
        module
        for module, names in IMPORTS.items()
        if any(name.split(".")[0] == library for name in names)
    }
    home = HOME_OF[library]
    assert importers, f"nobody imports {library}: the wall is not needed any more"
    assert all(f"{module}.".startswith(f"{home}.") for module in importers)


def test_nothing_is_unpickled() -> None:
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called, keywords = ast.unparse(node.func), map(ast.unparse, node.keywords)
                assert called.split(".")[0] not in ("pickle", "dill", "cloudpickle"), module
                assert called != "torch.load" or "weights_only=True" in keywords, module


def test_a_trial_runs_where_ray_cannot_be_imported(tmp_path: Path, colour_folder: Path) -> None:
    script = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "optuna"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
from tlrunner.config import BackboneConfig, DataConfig, ResourceConfig, TrainConfig, TrialConfig
from tlrunner.train.trial import run_trial
result = run_trial(TrialConfig(
    data=DataConfig(uri={str(colour_folder)!r}, cache_dir={str(tmp_path)!r}, image_size=32),
    backbone=BackboneConfig(name="squeezenet1_1", weights="none"),
    train=TrainConfig(epochs=1),
    resources=ResourceConfig(gpus_per_worker=0),
))
assert result.state == "completed", result
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
