"""`tlrunner submit`: a job file to a Ray cluster, its log back, and its exit code."""

import argparse
import os
import re
import secrets
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.console import Console

from tlrunner.errors import ConfigError
from tlrunner.jobconfig import NAME_PATTERN
from tlrunner.signals import interrupted
from tlrunner.tools.bundle import Bundle, bundle_of
from tlrunner.tools.kube import DASHBOARD_PORT, NAMESPACE, Kubectl, find_cluster

if TYPE_CHECKING:
    from tlrunner.tune.submission import Door

HELP = "run a job file on a Ray cluster: tlrunner submit jobs/tune_flowers.py -- FLAGS"
DESCRIPTION = f"""Run a job file of this repository on a Ray cluster, show its log, and end as it
ends. The cluster is that at --address; or the one RayCluster in a Kubernetes namespace, if
--context, --namespace or --cluster is given, reached by a forwarded port unless --address is given
too, with the token of its Secret; or else that of RAY_API_SERVER_ADDRESS, of RAY_ADDRESS, or
http://127.0.0.1:{DASHBOARD_PORT}. Ctrl-C ends the following, not the job."""
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
LEFT_CODE = 130  # as of any command that Ctrl-C ends


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.usage = "tlrunner submit [options] JOB.py [-- FLAGS OF THE JOB]"
    parser.add_argument("--address", metavar="URL", help="of the dashboard, e.g. http://HEAD:8265")
    parser.add_argument("--context", metavar="NAME", help="of kubectl; default: its current one")
    parser.add_argument("--namespace", metavar="NAME", help=f"default: {NAMESPACE}")
    parser.add_argument("--cluster", metavar="NAME", help="which RayCluster, where there are more")
    parser.add_argument(
        "--id", type=_id, metavar="NAME", help="of the job on the cluster; default: made up"
    )
    parser.add_argument("--no-wait", action="store_true", help="do not follow the job")
    parser.add_argument("job", type=Path, metavar="JOB.py")


def _id(text: str) -> str:
    if not re.fullmatch(NAME_PATTERN, text):
        raise argparse.ArgumentTypeError(f"'{text}', valid: small letters, digits, . _ -")
    return text


def run(flags: argparse.Namespace, out: Console) -> int:
    """Submit, follow, and give the job's exit code.

    Raises:
        ConfigError: what is to be submitted, or where, cannot be told.
        ResourceError: the cluster cannot be reached, or refuses.
    """
    bundle = bundle_of(flags.job)
    flags_of_job = _portable(flags.after, bundle)
    door = _door(flags)

    from tlrunner.tune.submission import follow, submit

    job = flags.job.resolve().relative_to(bundle.root)
    entrypoint = shlex.join(["python", job.as_posix(), *flags_of_job])
    job_id = flags.id or f"{job.stem.replace('_', '-')}-{secrets.token_hex(4)}"
    try:
        with TemporaryDirectory(prefix="tlrunner-submit-") as directory, _ended_by_hangup():
            bundle.copy_to(Path(directory))
            submit(door, entrypoint, Path(directory), job_id)
    except KeyboardInterrupt:
        out.print(
            f"job {job_id} may have been submitted: ray job status {job_id} says so, and with "
            f"--id {job_id} it is not submitted twice",
            soft_wrap=True,
        )
        return LEFT_CODE
    new = f", {len(bundle.new)} of them not committed yet" if bundle.new else ""
    size = f"{len(bundle.files)} files{new}, {bundle.num_bytes / 2**20:.1f} MiB"
    out.print(f"job {job_id}: {entrypoint} ({size})", soft_wrap=True)
    if flags.no_wait:
        return 0
    try:
        with _ended_by_hangup():
            ended = follow(door, job_id, _show)
    except KeyboardInterrupt:
        out.print(
            f"job {job_id} goes on; ray job logs --follow {job_id} shows more of it, "
            f"ray job stop {job_id} ends it",
            soft_wrap=True,
        )
        return LEFT_CODE
    out.print(f"job {job_id} ended with {ended.exit_code}: {ended.message}", soft_wrap=True)
    return ended.exit_code


@contextmanager
def _ended_by_hangup() -> Iterator[None]:
    """Inside, a terminal that closes is as Ctrl-C, so that a forwarded port is closed with it."""
    before = signal.getsignal(signal.SIGHUP)
    if before is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _portable(flags: Sequence[str], bundle: Bundle) -> list[str]:
    """The flags of a job as they mean the same on the cluster, where the bundle is.

    Raises:
        ConfigError: a config file of this machine is not in it.
    """
    found = list(flags)
    for place, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name != "--config" or not (equals or flags[place + 1 :]):
            continue
        given = Path(value if equals else flags[place + 1]).resolve()
        if (
            not given.is_relative_to(bundle.root)
            or given.relative_to(bundle.root) not in bundle.files
        ):
            raise ConfigError(
                f"--config {given} is not sent to the cluster",
                "a file of the repository",
                f"put it into {bundle.root / 'jobs'}",
            )
        sent = given.relative_to(bundle.root).as_posix()
        found[place if equals else place + 1] = f"--config={sent}" if equals else sent
    return found


def _door(flags: argparse.Namespace) -> "Door":
    """The way to the cluster that the flags mean, and its token."""
    cluster = None
    if flags.context or flags.namespace or flags.cluster:
        kubectl = Kubectl(flags.context, flags.namespace or NAMESPACE)
        cluster = find_cluster(kubectl, flags.cluster)
    token = cluster.token() if cluster else _own_token()

    from tlrunner.tune.submission import Door

    if cluster and not flags.address:
        return Door(cluster.forwarded, token)
    default = f"http://127.0.0.1:{DASHBOARD_PORT}"
    address = next(filter(None, map(os.environ.get, ADDRESSES)), default)
    if flags.address:  # without a scheme it would be, to Ray, one of its own ports
        address = flags.address if "://" in flags.address else f"http://{flags.address}"
    return Door(lambda: nullcontext(address), token)


def _own_token() -> str | None:
    """The token of this machine's user, from where Ray itself takes it."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip() or None
    except OSError as err:
        if named:
            raise ConfigError(
                f"RAY_AUTH_TOKEN_PATH {named} cannot be read: {err.strerror}"
            ) from err
        return None
