"""What a job carries and is told, and what is refused before anything is sent."""

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from elastic import ray_jobs
from elastic.cli import main, make_parser, read_plan_file
from elastic.errors import InputError
from elastic.job_verbs import passed_on, relative_paths
from elastic.ray_jobs import PLAN, RUN, Submission, job_of, stop_job, submit, submit_and_follow
from elastic.ray_package import files_of, pack
from elastic.settings import Settings, read_settings

TINY = Path(__file__).with_name("tiny_plan.py")


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def test_a_job_carries_what_lies_beside_the_stage_file_and_neither_runs_nor_secrets(
    tmp_path: Path,
) -> None:
    carried = ["my_plan.py", "parts/model.py", "parts/table.csv", ".gitignore"]
    left = [".git/HEAD", "runs/demo/run.json", ".venv/bin/python", "venv/x", "videos/a.mp4"]
    left += ["clip.mp4", ".env", ".env.local", "parts/__pycache__/model.pyc", ".mypy_cache/x"]
    left += ["scratch/of-gitignore", "notes/asked"]
    tree(tmp_path, *carried, *left)
    (tmp_path / ".gitignore").write_text("scratch\n")
    found = {path.relative_to(tmp_path).as_posix() for path in files_of(tmp_path, ["notes"])}
    assert found == set(carried)


def test_a_job_carries_our_packages_when_they_are_asked_for(tmp_path: Path) -> None:
    tree(tmp_path / "own", "my_plan.py")
    num = pack(tmp_path / "own", (), True, tmp_path / "job.zip")
    names = zipfile.ZipFile(tmp_path / "job.zip").namelist()
    assert len(names) == num
    assert {"my_plan.py", "elastic/cli.py", "elastic/report_page.html"} < {*names}
    assert {name.split("/")[0] for name in names} == {
        *("my_plan.py", "models", "stages", "cluster", "elastic")
    }


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "own", "my_plan.py")
    for name, size in (("weights.bin", 99 << 20), ("more.bin", 3 << 20)):
        with (tmp_path / "own" / name).open("wb") as file:
            file.truncate(size)  # takes no room
    with pytest.raises(InputError) as refused:
        pack(tmp_path / "own", (), False, tmp_path / "job.zip")
    message = str(refused.value)
    assert "3 files hold 102.0 MiB, and a job may carry 100 MiB" in message
    assert message.index("weights.bin (99.0 MiB)") < message.index("more.bin (3.0 MiB)")
    assert not (tmp_path / "job.zip").exists()
    assert pack(tmp_path / "own", ["weights.bin"], False, tmp_path / "job.zip") == 2


class Client:
    """The job API of a cluster that runs nothing, in place of Ray's client."""

    def __init__(self, *jobs: tuple[str, str, JobStatus]) -> None:
        self.jobs = [
            SimpleNamespace(
                submission_id=f"job-{number}",
                metadata={PLAN: plan, RUN: run},
                status=status,
                runtime_env={"working_dir": "gcs://carried.zip"},
                driver_exit_code=None,
                message="",
            )
            for number, (plan, run, status) in enumerate(jobs)
        ]
        self.submitted: list[dict[str, Any]] = []
        self.code: int | None = 0

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def get_address(self) -> str:
        return "http://head:8265"

    def submit_job(self, **job: Any) -> str:
        self.submitted.append(job)
        return str(job["submission_id"])

    def get_job_info(self, job: str) -> Any:
        status = JobStatus.FAILED if self.code else JobStatus.SUCCEEDED
        return SimpleNamespace(status=status, driver_exit_code=self.code, message="")

    async def tail_job_logs(self, job: str) -> Any:
        yield f"of {job}\n"


def submission(folder: Path) -> Submission:
    return Submission("tiny", "/mounted/runs/tiny", folder, ("train", "a b.py"))


def test_a_run_is_trained_by_one_job_at_a_time_and_another_follows_when_that_has_ended(
    tmp_path: Path,
) -> None:
    what = submission(tree(tmp_path, "a b.py"))
    for status in (JobStatus.RUNNING, JobStatus.PENDING):
        client = Client(("tiny", "/mounted/runs/tiny", status))
        with pytest.raises(InputError, match="is trained by job job-0"):
            submit(client, what)  # type: ignore[arg-type]
        assert client.submitted == []
    others = [("tiny", what.run, JobStatus.FAILED), ("other", "/mounted/runs/other", "RUNNING")]
    client = Client(*[(plan, run, JobStatus(status)) for plan, run, status in others])
    submit(client, what)  # type: ignore[arg-type]
    (job,) = client.submitted
    assert job["entrypoint"] == "python -m elastic train 'a b.py'"
    assert job["metadata"] == {PLAN: "tiny", RUN: "/mounted/runs/tiny"}
    assert set(job["runtime_env"]) == {"working_dir"}, "no variable of this shell goes along"


def test_a_head_that_is_still_starting_is_waited_for_and_no_other_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "_LOOK_EVERY_S", 0.0)
    says = ["status code 500: No available agent to submit job.", "status code 500: disk full"]
    tries: list[str] = []

    def refuses(**job: Any) -> str:
        tries.append(job["submission_id"])
        raise RuntimeError(says[len(tries) - 1])

    client = Client()
    monkeypatch.setattr(client, "submit_job", refuses)
    with pytest.raises(RuntimeError, match="disk full"):
        submit(client, submission(tree(tmp_path, "a b.py")))  # type: ignore[arg-type]
    assert len(tries) == 2


@pytest.mark.parametrize("name", ["tiny", "/mounted/runs/tiny"])
def test_a_job_is_stopped_by_another_beside_it_with_the_same_files(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client(("tiny", "/mounted/runs/tiny", JobStatus.RUNNING))
    assert stop_job(client, name, saves=True) == 0  # type: ignore[arg-type]
    (job,) = client.submitted
    assert job["entrypoint"] == "python -m elastic stop /mounted/runs/tiny --save"
    assert job["runtime_env"] == {"working_dir": "gcs://carried.zip"}
    assert job_of(client, "tiny").submission_id == "job-0", "the stopping job is not the run's"  # type: ignore[arg-type]
    assert f"of {job['submission_id']}" in capsys.readouterr().out


def test_where_no_job_trains_the_run_there_is_nothing_to_stop(
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = Client(("tiny", "/mounted/runs/tiny", JobStatus.SUCCEEDED))
    assert stop_job(client, "tiny", saves=True) == 1  # type: ignore[arg-type]
    assert "nothing to stop" in capsys.readouterr().out
    assert client.submitted == []


@pytest.mark.parametrize(("code", "ours"), [(0, 0), (1, 1), (2, 2), (130, 130), (139, 1)])
def test_submit_ends_with_the_code_of_the_job(tmp_path: Path, code: int, ours: int) -> None:
    client = Client()
    client.code = code
    what = submission(tree(tmp_path, "a b.py"))
    assert submit_and_follow(client, what, detaches=False) == ours  # type: ignore[arg-type]


@pytest.mark.parametrize(("answer", "num_jobs"), [("s", 2), ("", 1), (None, 1)])
def test_an_interrupt_asks_what_becomes_of_the_job_and_leaves_it_where_nobody_answers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str | None,
    num_jobs: int,
) -> None:
    client, followed = Client(), list[str]()

    def interrupted(client: Any, job: str) -> int:
        followed.append(job)
        if len(followed) == 1:
            client.jobs = Client(("tiny", "/mounted/runs/tiny", JobStatus.RUNNING)).jobs
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(ray_jobs, "follow", interrupted)
    monkeypatch.setattr(ray_jobs.sys, "stdin", SimpleNamespace(isatty=lambda: answer is not None))
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    what = submission(tree(tmp_path, "a b.py"))
    assert submit_and_follow(client, what, detaches=False) == 130  # type: ignore[arg-type]
    assert len(client.submitted) == num_jobs
    told = capsys.readouterr().out
    assert (f"job {followed[0]} goes on; follow it: ray job logs -f" in told) == (num_jobs == 1)


def test_the_job_is_given_what_is_set_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTAGE_MIN_STAY", "7")
    monkeypatch.setenv("RESTAGE_CPUS", "3")
    words = ["submit", "p.py", "--storage", "/mounted/runs", "--no-aim", "--pack-latents"]
    words += ["--videos", "/clips", "--captions", "/clips/table.csv", "--keep-last", "4"]
    flags = make_parser().parse_args(words)
    settings = read_settings(**{n: getattr(flags, n, None) for n in Settings.model_fields})
    given = passed_on(flags, settings)
    assert given == [
        *("--videos", "/clips", "--captions", "/clips/table.csv"),
        *("--no-aim", "--keep-last", "4", "--min-stay", "7.0", "--pack-latents"),
    ]
    make_parser().parse_args(["train", "p.py", "--storage", "/mounted/runs", *given])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", *words]) == 2
    return capsys.readouterr().err


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stage file of a user, which imports another one beside it."""
    (tmp_path / "own_parts_of_submit.py").write_text(TINY.read_text())
    (tmp_path / "my_plan.py").write_text("from own_parts_of_submit import plan\n")
    monkeypatch.setenv("TINY_VIDEOS", "/clips/table.csv")
    monkeypatch.delitem(__import__("sys").modules, "own_parts_of_submit", raising=False)
    return str(tmp_path / "my_plan.py")


def test_a_run_that_would_lie_in_the_copy_of_the_job_is_refused(
    plan: str, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ("--address", "http://127.0.0.1:1")
    assert "needs --storage: a folder that all machines" in refused(capsys, plan, *at)
    assert "storage 'runs': relative" in refused(capsys, plan, *at, "--storage", "runs")


def test_a_table_that_would_lie_in_the_copy_of_the_job_is_refused(
    plan: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--storage", "/mounted/runs", "--videos", "clips", "--captions", "s3://b/t.csv")
    message = refused(capsys, plan, *words)
    assert "stage 'hunyuan-vae': data.folder 'clips'" in message
    assert "t.csv" not in message
    flags = make_parser().parse_args(["submit", plan])
    assert list(relative_paths(read_plan_file(flags))) == []


def test_an_address_that_is_none_or_does_not_answer_is_refused(
    plan: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    storage = ("--storage", "/mounted/runs")
    assert "needs --address" in refused(capsys, plan, *storage)
    assert "write that of the job API" in refused(capsys, plan, *storage, "--address", "head:6379")
    message = refused(capsys, plan, *storage, "--address", "http://127.0.0.1:1")
    assert "no job API answers" in message
