"""Ray's job API: a plan is submitted to a cluster, followed, and stopped there."""

import asyncio
import os
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.token import advice, takes_jobs_from_anyone
from elastic.errors import InputError
from elastic.ray_package import pack

PLAN, RUN = "restage_plan", "restage_run"  # keys of a job's metadata
_LOOK_EVERY_S = 1.0
# What Ray says, and had started nothing, while the head's agent is still coming up.
_NO_AGENT, _AGENT_S = "No available agent", 60.0
_INTERRUPTED = 130
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray lets them win over what is asked for


class Submission(NamedTuple):
    """What is to run on the cluster."""

    plan: str
    run: str  # the run folder, as the cluster sees it
    folder: Path  # travels with the job
    command: tuple[str, ...]  # of our command line
    excludes: tuple[str, ...] = ()
    carries_us: bool = False


def connect(address: str) -> JobSubmissionClient:
    """A client of the job API at http(s)://HOST:PORT; InputError if it cannot be talked to."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            f"address {address!r}: write that of the job API, such as http://127.0.0.1:8265"
        )
    for name in _OVERRIDES:
        os.environ.pop(name, None)
    try:
        if takes_jobs_from_anyone(address):
            print(f"restage: warning: {advice(address)}", file=sys.stderr)
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise InputError(
            f"address {address!r}: the cluster asks for its token; give RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH=FILE with it"
        ) from None
    except (OSError, RuntimeError) as error:  # both libraries raise kinds of OSError
        raise InputError(
            f"address {address!r}: no job API answers ({error}); start the cluster with its "
            "dashboard, or give another --address"
        ) from None


def job_of(client: JobSubmissionClient, run: str) -> Any:  # Ray's JobDetails
    """The job that trains a run, named by its folder or its plan; None if there is none."""
    for job in client.list_jobs():
        names = [(job.metadata or {}).get(key) for key in (PLAN, RUN)]
        if run in names and not job.status.is_terminal():
            return job
    return None


def submit(client: JobSubmissionClient, what: Submission) -> str:
    """Start the job and return its id; InputError if the run is trained by another one."""
    other = job_of(client, what.run)
    if other is not None:
        raise InputError(
            f"run {what.run!r} is trained by job {other.submission_id}, which is "
            f"{other.status.value}; {_ways(client, other.submission_id, what.run)}"
        )
    with tempfile.TemporaryDirectory(prefix="restage-job-") as scratch:
        package = Path(scratch) / "job.zip"
        num = pack(what.folder, what.excludes, what.carries_us, package)
        print(f"sends {num:,} files, {package.stat().st_size / 2**20:.1f} MiB, of {what.folder}")
        return _start(client, what.plan, what.command, {"working_dir": str(package)}, {
            PLAN: what.plan, RUN: what.run,
        })  # fmt: skip


def stop_job(client: JobSubmissionClient, run: str, saves: bool) -> int:
    """Have the driver of a run stop, by a job beside it that sees its folder; an exit code."""
    job = job_of(client, run)
    if job is None:
        print(f"no job of this cluster trains {run!r}: there is nothing to stop")
        return 1
    carried = (job.runtime_env or {}).get("working_dir")
    command = ("stop", job.metadata[RUN], *(["--save"] if saves else []))
    stopper = _start(
        client, f"stop-{job.metadata[PLAN]}", command, {"working_dir": carried} if carried else {}
    )
    return follow(client, stopper)


def _start(
    client: JobSubmissionClient,
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
) -> str:
    deadline = time.monotonic() + _AGENT_S
    while True:
        try:
            started: str = client.submit_job(
                entrypoint=shlex.join(["python", "-m", "elastic", *command]),
                submission_id=f"restage-{name}-{uuid.uuid4().hex[:8]}",
                runtime_env=dict(environment),
                metadata=dict(metadata or {}),
            )
            return started
        except RuntimeError as error:
            if _NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_EVERY_S)


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print what a job says until it ends; its exit code."""
    try:
        asyncio.run(_print_log(client, job))
    except RuntimeError as error:  # the connection, not the job
        print(f"restage: the log cannot be followed further: {error}", file=sys.stderr)
    while not (found := client.get_job_info(job)).status.is_terminal():
        time.sleep(_LOOK_EVERY_S)
    if found.status is JobStatus.SUCCEEDED:
        return 0
    if found.status is JobStatus.STOPPED:
        print(f"restage: job {job} was stopped", file=sys.stderr)
        return _INTERRUPTED
    code = found.driver_exit_code
    if code is None:
        print(f"restage: job {job} failed: {found.message}", file=sys.stderr)
    return code if code in (1, 2, _INTERRUPTED) else 1


async def _print_log(client: JobSubmissionClient, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def submit_and_follow(client: JobSubmissionClient, what: Submission, detaches: bool) -> int:
    """Submit and follow; an interrupt asks what is to become of the job. An exit code."""
    job = submit(client, what)
    print(f"job {job}", flush=True)
    if detaches:
        print(_ways(client, job, what.run))
        return 0
    try:
        return follow(client, job)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        if sys.stdin.isatty() and _asks_to_stop():
            stop_job(client, what.run, saves=True)
        else:
            print(f"job {job} goes on; {_ways(client, job, what.run)}")
        return _INTERRUPTED


def _asks_to_stop() -> bool:
    try:
        return input("s: save and stop the job; anything else: leave it running ") == "s"
    except (EOFError, KeyboardInterrupt):
        return False


def _ways(client: JobSubmissionClient, job: str, run: str) -> str:
    address = client.get_address()
    return (
        f"follow it: ray job logs -f {job} --address {address}; "
        f"stop it: python -m elastic stop {shlex.quote(run)} --save --address {address}"
    )
