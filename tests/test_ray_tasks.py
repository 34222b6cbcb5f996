"""Tasks that training comes before: ended for it, lost, and done again, on a real cluster."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray_work import Somebody, alive, alone, fails

from cluster.faults import when
from cluster.local import LocalCluster
from elastic.ray_ahead import Stopped, Tasks

pytestmark = pytest.mark.ray

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def two_cpus() -> Iterator[None]:
    """One cluster for all of them: each leaves nothing there that runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE)]))
        cluster = LocalCluster(cpus=2)
        try:
            cluster.connect()
            yield
        finally:
            ray.shutdown()
            cluster.stop()


def test_a_task_gives_way_at_once_and_is_done_when_there_is_a_place_again(tmp_path: Path) -> None:
    tasks, found = Tasks(most=1, gpus=0.0, stop=threading.Event()), []

    def run() -> None:
        found.extend(tasks.all(alone, [(str(tmp_path), 0)]))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert when(lambda: len(list(tmp_path.iterdir())) == 1, 60), "the task did not begin"
    (first,) = (int(path.name.split("-")[1]) for path in tmp_path.iterdir())
    other = Somebody.remote()
    assert ray.get(other.ready.remote(), timeout=60)
    assert when(lambda: not Path(f"/proc/{first}").exists(), 60), "the task did not give way"
    assert not found
    ray.kill(other)
    thread.join(60)
    assert found == [0]
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_runs_where_training_may_take_all_and_a_stop_is_obeyed(tmp_path: Path) -> None:
    stop = threading.Event()
    tasks = Tasks(most=2, gpus=0.0, stop=stop)
    timer = threading.Timer(5.0, stop.set)  # several looks
    timer.start()
    with pytest.raises(Stopped):
        tasks.one(alone, str(tmp_path), 0)
    assert list(tmp_path.iterdir()) == []


def test_a_lost_task_is_done_again_and_one_that_fails_is_raised(tmp_path: Path) -> None:
    tasks = Tasks(most=1, gpus=0.0, stop=threading.Event())
    found = tasks.all(alive, [(str(tmp_path), number) for number in range(3)])
    assert sorted(found) == [0, 1, 2]
    with pytest.raises(OSError, match="1 cannot be read"):
        tasks.one(fails, str(tmp_path), 1)
