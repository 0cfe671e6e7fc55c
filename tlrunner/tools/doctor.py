"""`tlrunner doctor`: whether this machine, a cluster and a place for runs are fit for a job."""

import argparse
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from rich.console import Console

from tlrunner.config import CACHE_DIR
from tlrunner.errors import StorageError
from tlrunner.files import write_text
from tlrunner.tools.checkup import (
    Check,
    Facts,
    check_alike,
    check_machine,
    check_packages,
    facts_of_this_machine,
)

HELP = "check this machine, and the cluster and the place for runs if given: a line each"
PROBE = "probe"
OPEN = "anyone who reaches it can run code: turn tokens on (RAY_AUTH_MODE=token) on its head"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="URI", help="where runs go, and --out will point to")
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="each node of the Ray cluster that this machine belongs to, or RAY_ADDRESS names",
    )


def run(flags: argparse.Namespace, out: Console) -> int:
    """Print a line for each check; 0 if all is well, else the code of the first that is not."""
    exit_code = 0
    for check in _checks(flags.out, flags.cluster):
        out.print(str(check), soft_wrap=True)
        if check.remedy and not exit_code:
            exit_code = check.exit_code
    return exit_code


def _checks(uri: str | None, has_cluster: bool) -> Iterator[Check]:
    yield from check_packages()
    here = facts_of_this_machine()
    yield from check_machine(here)
    if uri:
        yield check_place(uri)
    if has_cluster:
        yield from check_cluster(here, uri)


def check_place(uri: str) -> Check:
    """Write, write on condition, read and delete under a name that nobody has."""
    from tlrunner.report.lease import honours_conditions
    from tlrunner.train.place import place_at

    what, rights = f"place {uri}", "read, write, list and delete are needed there"
    try:
        place = place_at(uri, CACHE_DIR)
        probe = place.below(f".tlrunner-doctor-{secrets.token_hex(8)}")
        with _left_as_it_was(place.path):
            write_text(probe.path / PROBE, PROBE)
            probe.save(probe.path / PROBE)
            keeps_apart = honours_conditions(probe) if probe.uri else True
            read = probe.store.read(PROBE)
            num_listed = len(probe.store.list())
            probe.drop(probe.path / PROBE)
            shutil.rmtree(probe.path)
    except (StorageError, OSError) as err:
        return Check(what, str(err), rights, StorageError.exit_code)
    if read != PROBE.encode() or num_listed != 1:
        remedy = "use a place that gives back what was written"
    else:
        remedy = "" if keeps_apart else "start each run once: it ignores If-None-Match"
    return Check(what, "written, read, listed, deleted", remedy, StorageError.exit_code)


@contextmanager
def _left_as_it_was(directory: Path) -> Iterator[None]:
    """A directory that was not there is not there behind the block, unless others use it."""
    is_new = not directory.exists()
    yield
    if is_new:
        with suppress(OSError):
            directory.rmdir()


def check_place_from_nodes(uri: str) -> Iterator[Check]:
    """The same from each node of the connected cluster, all of them at once."""
    from tlrunner.train.place import place_at
    from tlrunner.tune.survey import ask_nodes

    try:
        shared = place_at(uri, CACHE_DIR).path
    except StorageError:
        return  # no place at all, as was said already
    with _left_as_it_was(shared):  # which none of them can tell, beside the others
        with suppress(OSError):  # which they will say
            shared.mkdir(parents=True, exist_ok=True)
        for reached in ask_nodes(partial(check_place, uri)):
            yield _of_node(reached.node, reached.value or _no_answer(uri, reached.fault))


def check_cluster(here: Facts, uri: str | None) -> Iterator[Check]:
    """Each node, its versions against this machine's, and whether the dashboard asks for a token.

    Raises:
        ResourceError: there is no cluster.
    """
    from tlrunner.tune.cluster import connected_to_ray
    from tlrunner.tune.survey import ask_nodes, dashboard_without_token

    os.environ.setdefault("RAY_ADDRESS", "auto")  # no cluster of our own, if there is none
    with connected_to_ray("info"):
        for answer in ask_nodes(facts_of_this_machine):
            if (found := answer.value) is None:
                yield _no_answer(f"node {answer.node}", answer.fault)
                continue
            for check in (check_alike(here, found), *check_machine(found)):
                yield _of_node(answer.node, check)
        yield from check_place_from_nodes(uri) if uri else ()
        address, status = dashboard_without_token()
        is_open = status is not None and status < 400
        said = {None: "does not answer from here", 401: "asks for a token"}.get(status, str(status))
        yield Check("dashboard", f"{address} {said}", OPEN if is_open else "")


def _no_answer(what: str, fault: str) -> Check:
    return Check(what, fault, "have tlrunner and its packages there, as in its image")


def _of_node(node: str, check: Check) -> Check:
    return Check(f"node {node}, {check.what}", check.found, check.remedy, check.exit_code)
