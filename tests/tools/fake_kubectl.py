"""A kubectl of tests: it answers from a JSON file, and `forwards` to a port that is there."""

import json
import stat
import sys
from pathlib import Path

SCRIPT = """#!{python}
import json, sys, time
answers = json.load(open({answers!r}))
words = [word for word in sys.argv[1:] if not word.startswith("-")]
open({calls!r}, "a").write(json.dumps(sys.argv[1:]) + "\\n")
if "port-forward" in words:
    if not answers["port"]:
        sys.exit("error: unable to forward port because pod is not running")
    print(f"Forwarding from 127.0.0.1:{{answers['port']}} -> 8265", flush=True)
    time.sleep(600)
resource = next((word for word in answers if word in words), None)
if resource is None:
    sys.exit("Error from server (Forbidden): not for you")
print(json.dumps(answers[resource]))
"""


def install(folder: Path, answers: dict[str, object]) -> Path:
    """Write one into a folder that is to come first on PATH; gives the file of its calls."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.json").write_text(json.dumps(answers))
    program, calls = folder / "kubectl", folder / "calls"
    program.write_text(
        SCRIPT.format(python=sys.executable, answers=str(folder / "answers.json"), calls=str(calls))
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return calls


def cluster(name: str, **parts: object) -> dict[str, object]:
    """A RayCluster as the API server gives it."""
    return {"metadata": {"name": name}, "spec": {"authOptions": {"mode": "token"}}, **parts}
