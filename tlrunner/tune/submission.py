"""Jobs on a Ray cluster, seen from outside: submitted, followed, and how they ended."""

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from requests.exceptions import RequestException

from tlrunner.errors import ConfigError, InterruptedRun, ResourceError

AGAIN_SECONDS = 2.0  # until a broken way to the cluster is tried again
LOST_SECONDS = 300.0  # for which it may be broken
HELD_SECONDS = 5.0  # that a way held which was not broken from the beginning
START_SECONDS = 60.0  # that a head has until it takes jobs
UNKNOWN_CODE = 70  # of a job that failed before its program could
ADDRESS = "RAY_API_SERVER_ADDRESS"
FORGOTTEN = "the cluster does not know it any more, as after a restart of its head"
UNREACHED = (ConnectionError, RequestException, ClientError, RuntimeError, OSError)


@dataclass(frozen=True)
class Door:
    """How a cluster is reached.

    Args:
        way: gives the dashboard's address inside a block; a new one each time it is entered.
        token: that it asks for, if it asks for one.
    """

    way: Callable[[], AbstractContextManager[str]]
    token: str | None = field(repr=False)

    @contextmanager
    def client(self) -> Iterator[JobSubmissionClient]:
        """A client of the cluster.

        Raises:
            ResourceError: it cannot be reached, or refuses the token.
        """
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else None
        with self.way() as address:
            try:
                yield _client_of(address, headers)
            except AuthenticationError as err:
                found = "refuses the token" if self.token else "asks for a token"
                raise ResourceError(
                    f"the Ray cluster at {address} {found}",
                    "its own, in RAY_AUTH_TOKEN or ~/.ray/auth_token",
                    "with --context it is read from the cluster's Secret",
                ) from err
            except (ConnectionError, RequestException) as err:
                raise _no_cluster(address) from err


def _client_of(address: str, headers: dict[str, str] | None) -> JobSubmissionClient:
    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = address  # which Ray would take before what it is given
    try:
        return JobSubmissionClient(address, headers=headers)
    except (RuntimeError, ValueError, KeyError) as err:  # something else answers there
        raise _no_cluster(address) from err
    finally:
        os.environ.pop(ADDRESS)
        if before is not None:
            os.environ[ADDRESS] = before


def _no_cluster(address: str) -> ResourceError:
    return ResourceError(f"no Ray cluster answers at {address}", "", "check --address or --context")


@dataclass(frozen=True)
class Ended:
    """How a job ended. `exit_code`: its own; 75 if it was stopped, 70 if it never started."""

    exit_code: int
    message: str


def submit(door: Door, entrypoint: str, directory: Path, job_id: str) -> None:
    """Start a command in a copy of a directory, as the job of an id.

    A head that is still starting is waited for.

    Raises:
        ConfigError: there is a job of that id.
        ResourceError: the cluster cannot be reached, or refuses the job.
    """
    deadline = time.monotonic() + START_SECONDS
    with door.client() as client:
        while True:
            try:
                client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env={"working_dir": str(directory)},
                )
                return
            except RuntimeError as err:
                if "already exists" in str(err):
                    raise ConfigError(
                        f"there is a job '{job_id}' on the cluster already",
                        "",
                        "choose another --id",
                    ) from err
                if "No available agent" not in str(err) or time.monotonic() > deadline:
                    said = str(err).strip().splitlines()[-1][:300]
                    raise ResourceError(f"the cluster refuses the job: {said}") from err
            time.sleep(AGAIN_SECONDS)


def follow(door: Door, job_id: str, show: Callable[[str], object]) -> Ended:
    """Show a job's log as it is written, each character once, until the job has ended.

    A way that breaks, as a forwarded port does, is made anew.

    Raises:
        ResourceError: the cluster cannot be reached any more.
    """
    log, seen_at = _Log(show), time.monotonic()
    while True:
        tailed_from, num_shown = math.inf, log.num_shown
        try:
            with door.client() as client:
                info = _info(client, job_id)
                if info is None:
                    return Ended(InterruptedRun.exit_code, FORGOTTEN)
                if info.status.is_terminal():
                    with suppress(RuntimeError):  # its log is gone with the node that it ran on
                        log.show_from(0, client.get_job_logs(job_id))
                    return _ended(info)
                tailed_from = time.monotonic()
                asyncio.run(_tail(client, job_id, log))
                seen_at = time.monotonic()
        except _UnshownError as err:
            raise err.cause from None
        except (ResourceError, *UNREACHED) as err:
            # The head may answer although the job's log, and the job, went with another node.
            if log.num_shown > num_shown or time.monotonic() - tailed_from > HELD_SECONDS:
                seen_at = time.monotonic()
            if time.monotonic() - seen_at > LOST_SECONDS:
                raise ResourceError(
                    f"the cluster has not answered for {LOST_SECONDS:.0f} s",
                    "",
                    f"job {job_id} may go on: ray job logs --follow {job_id}",
                ) from err
        time.sleep(AGAIN_SECONDS)


class _UnshownError(Exception):
    """Nobody reads what is shown, or it finds no room: no fault of the way to the cluster."""

    def __init__(self, cause: OSError) -> None:
        self.cause = cause


@dataclass
class _Log:
    """A log that comes from its beginning again each time it is asked for."""

    show: Callable[[str], object]
    num_shown: int = 0

    def show_from(self, position: int, text: str) -> None:
        """Show what of `text`, which begins at a position of the log, was not shown yet."""
        if rest := text[max(0, self.num_shown - position) :]:
            try:
                self.show(rest)
            except OSError as err:
                raise _UnshownError(err) from err
            self.num_shown += len(rest)


async def _tail(client: JobSubmissionClient, job_id: str, log: _Log) -> None:
    position = 0
    async for text in client.tail_job_logs(job_id):
        log.show_from(position, text)
        position += len(text)


def _info(client: JobSubmissionClient, job_id: str) -> JobDetails | None:
    """What the cluster says of a job; None if it does not know it."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as err:
        if "status code 404" in str(err):
            return None
        raise


def _ended(info: JobDetails) -> Ended:
    message = str(info.message or "")
    if info.status == JobStatus.STOPPED:
        return Ended(InterruptedRun.exit_code, message)
    if info.status == JobStatus.SUCCEEDED:
        return Ended(0, message)
    code = info.driver_exit_code
    if not code:
        return Ended(UNKNOWN_CODE, message)
    # Ended by a signal, a program has the code that a shell would give it.
    return Ended(code if code > 0 else 128 - code, message)
