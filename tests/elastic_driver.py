"""A small plan on a cluster of named nodes, driven from outside: what the elastic benches watch.

A bench makes a `Spec`, starts `Driver(spec)` (this file again, as a process of its own, which owns
the cluster) and tells it line by line to add, drain or kill nodes; what then happens is read from
the run folder's events and metrics. SIGKILL of the process leaves nothing behind.
"""

import json
import logging
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

# What lies beside this script is run, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster import faults
from cluster.local import LocalCluster
from elastic.course import Course, train_one
from elastic.drive import run_course
from elastic.folders import RunFolder
from elastic.journal import EVENTS, METRICS, read_events, read_metrics
from elastic.settings import Settings
from elastic.weights import finished
from models import DiT, HunyuanVAE, WordHash
from stages import (
    AdamW,
    AutoencoderStage,
    Bucket,
    DiffusionStage,
    Ema,
    Fresh,
    Phase,
    Plan,
    Videos,
)

ROOT = Path(__file__).resolve().parents[1]
CODEC, DIT = "codec", "dit"
_START_S = 180.0  # for a driver on a busy machine to have its cluster up
_ANSWER_S = 90.0
# Ray's own defaults, where `ENVIRONMENT` sets something else: what vanilla is measured with.
RAY_DEFAULTS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "5",
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "3000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "5",
}


@dataclass(frozen=True)
class Spec:
    """A run: the plan in updates, who trains it, and the nodes that are there at the start."""

    storage: str
    table: str
    nodes: tuple[str, ...] = ("a", "b")
    system: Literal["ours", "vanilla"] = "ours"
    codec_updates: int = 8
    dit_updates: int = 400
    save_updates: int = 40
    codec_save_updates: int = 4
    width: int = 96
    """Of the DiT: 96 is 1.0 M parameters and 45 ms an update on one core, 192 is 4.0 M and 88."""
    workers: tuple[int, int] = (1, 4)
    lr: float = 1e-4
    exact_codec: bool = False
    """Whether the codec has the same bits whatever happens, and so the DiT the same latents."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of Settings by name."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> RunFolder:
        """Where the run is kept."""
        return RunFolder(Path(self.storage).absolute() / "elastic")


BATCH = {CODEC: 4, DIT: 8}


def make_plan(spec: Spec) -> Plan:
    """A codec on tiny videos, and a DiT on its latents; one line of metrics an update."""
    videos = Videos(spec.table)
    codec = AutoencoderStage(
        name=CODEC,
        data=videos,
        vae=HunyuanVAE(widths=(4, 4, 8, 8), layers=1, norm_groups=2, channels=4),
        init=Fresh(seed=0),
        rate=8.0,
        schedule=[_phase(spec.codec_updates, BATCH[CODEC])],
        optimizer=AdamW(lr=spec.lr),
        ema=Ema(halflife=16),
        workers=spec.workers,
        save_every=spec.codec_save_updates * BATCH[CODEC],
        log_every=BATCH[CODEC],
        evaluate_every=spec.codec_updates * BATCH[CODEC],
        exact=spec.exact_codec,
        held_out=2,
    )
    dit = DiffusionStage(
        name=DIT,
        data=videos,
        vae=codec,
        model=DiT(depth=2, depth_single=2, width=spec.width, heads=8, patch=2),
        text=WordHash(width=16),
        init=Fresh(seed=1),
        rate=8.0,
        schedule=[_phase(spec.dit_updates, BATCH[DIT])],
        optimizer=AdamW(lr=spec.lr),
        ema=Ema(halflife=100),
        workers=spec.workers,
        save_every=spec.save_updates * BATCH[DIT],
        log_every=BATCH[DIT],
        evaluate_every=spec.dit_updates * BATCH[DIT],
        held_out=2,
    )
    return Plan("elastic", [codec, dit])


def _phase(updates: int, batch: int) -> Phase:
    # Four micro-batches: a world of 3 has one that deals unevenly.
    bucket = Bucket("32px", frames=5, batch=batch, micro=batch // 4)
    return Phase(until=updates * batch, buckets=[bucket])


def settings_of(spec: Spec) -> Settings:
    """The settings of a run; those that this version does not have are left out."""
    known = {k: v for k, v in spec.settings.items() if k in Settings.model_fields}
    return Settings(storage=spec.storage, aim=False, **known)


class DriverGone(RuntimeError):
    """The driver ended before it answered; its log is in the message."""


class Driver:
    """The parent's side: starts the driver of a spec, commands it, and reads the run folder."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.folder = spec.folder
        Path(spec.storage).mkdir(parents=True, exist_ok=True)
        self.log = Path(spec.storage) / "driver.log"
        self.end: dict[str, Any] | None = None  # how it ended, as the driver said
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue()
        defaults = RAY_DEFAULTS if spec.system == "vanilla" else {}
        path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        extra = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), json.dumps(asdict(spec))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **extra, **defaults, **spec.environment},
                cwd=spec.storage,
            )
        threading.Thread(target=self._listen, daemon=True).start()
        up = self._next(_START_S)
        self.temp_dir = Path(up["temp_dir"])

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            if "end" in message:
                self.end = message
            else:
                self._messages.put(message)
        self._messages.put({"gone": True})

    def _next(self, within_s: float) -> dict[str, Any]:
        message = self._messages.get(timeout=within_s)
        if "gone" in message:
            self._messages.put(message)
            raise DriverGone(f"{self.end or 'without a word'}; {self.log}: {self.log_tail()}")
        return message

    def tell(self, do: str, **more: Any) -> dict[str, Any]:
        """Have the driver do something and wait for its answer, which has the wall time."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise DriverGone(f"{self.log}: {self.log_tail()}") from None
        answer = self._next(_ANSWER_S)
        if "error" in answer:
            raise RuntimeError(f"driver, {do} {more}: {answer['error']}")
        return answer

    def pids(self) -> list[int]:
        """The training processes of the newest attempt."""
        starts = [e for e in read_events(self.folder.root) if e["kind"] == "start"]
        return starts[-1]["pids"] if starts else []

    def roles(self) -> dict[str, list[int]]:
        """Processes of the cluster by what they do."""
        return faults.by_role(self.temp_dir)

    def position(self, stage: str = DIT) -> int:
        """The highest position that a stage has reached; 0 before its first update."""
        lines = read_metrics(self.folder.root)
        return max((m["position"] for m in lines if m["stage"] == stage), default=0)

    def wait(self, true: Callable[[], bool], what: str, within_s: float) -> None:
        """Wait for something; TimeoutError says what, DriverGone if the driver ended first."""
        end = time.monotonic() + within_s
        while not true():
            if self._has_ended() and not true():
                raise DriverGone(f"waiting for {what}: {self.end}; {self.log_tail()}")
            if time.monotonic() > end:
                raise TimeoutError(f"{within_s:.0f} s for {what}; {self.log}: {self.log_tail()}")
            time.sleep(0.05)

    def log_tail(self) -> str:
        """The last lines that the driver wrote."""
        return self.log.read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        """SIGKILL, and an end to Ray's agents, which look for their dead head for a minute."""
        self.process.kill()
        self.process.wait()
        faults.end_cluster(self.temp_dir)

    def finish(self, within_s: float) -> dict[str, Any]:
        """Wait for the end of the course: {"end": "finished"} or {"end": "failed", "why": ...}."""
        over = faults.when(self._has_ended, within_s)
        if not over:
            raise TimeoutError(f"{within_s:.0f} s for the end; {self.log}: {self.log_tail()}")
        return self.farewell()

    def farewell(self) -> dict[str, Any]:
        """How a driver that has ended, or is about to, did so: as it said, or without a word."""
        faults.when(lambda: self.end is not None, 5)
        return self.end or {"end": "died", "why": self.log_tail()}

    def _has_ended(self) -> bool:
        # What it says comes first: its cluster takes a while to end.
        return self.end is not None or self.process.poll() is not None


def prepare(spec: Spec, storage: Path) -> Path:
    """A storage in which the spec's codec is trained and its latents sealed, to copy from."""
    driver = Driver(replace(spec, system="ours", storage=str(storage)))
    try:
        driver.wait(lambda: _is_told(driver, "encode_end"), "the latents", 180)
    finally:
        driver.kill()
    root = driver.folder.root
    for path in (root / EVENTS, root / METRICS, root / ".ray", root / "stages" / DIT / "init.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return storage


def copied(base: Path, spec: Spec) -> Spec:
    """The spec, with what was prepared in `base` put into its storage."""
    shutil.copytree(base / "elastic", spec.folder.root)
    return spec


def _is_told(driver: Driver, kind: str) -> bool:
    return any(event["kind"] == kind for event in read_events(driver.folder.root))


class _Commands:
    """The driver's side: reads commands; what starts processes waits for the main thread."""

    def __init__(self, cluster: LocalCluster, spec: Spec, out: Any) -> None:
        self._cluster = cluster
        self._out = out
        self._nodes = {name: cluster.add_node() for name in spec.nodes}
        self._wanted: queue.Queue[str] = queue.Queue()
        self.say(temp_dir=str(cluster.temp_dir), up=sorted(self._nodes))
        threading.Thread(target=self._read, daemon=True).start()

    def say(self, **fields: Any) -> None:
        """Send one line to the parent."""
        self._out.write(json.dumps({"wall": time.time(), **fields}) + "\n")
        self._out.flush()

    def _read(self) -> None:
        for line in sys.stdin:
            command = json.loads(line)
            try:
                self._obey(command)
            except Exception as error:  # told to the parent, which raises it
                self.say(error=f"{type(error).__name__}: {error}")
        os._exit(3)  # the parent is gone; the kernel ends the cluster with this process

    def _obey(self, command: dict[str, Any]) -> None:
        name = command.get("node", "")
        if command["do"] == "add":
            self._wanted.put(name)
        elif command["do"] == "drain":
            node, notice_s = self._nodes.pop(name), command["seconds"]
            self._cluster.drain(node, notice_s)
            # As a cloud does: at the deadline the machine is gone, whatever runs there.
            timer = threading.Timer(notice_s, faults.kill_tree, [_raylet(node)])
            timer.daemon = True
            timer.start()
            self.say(drained=name)
        elif command["do"] == "kill_node":
            self.say(killed=name, processes=faults.kill_tree(_raylet(self._nodes.pop(name))))
        else:
            raise ValueError(f"do {command['do']!r}: it is add, drain or kill_node")

    def serve(self, *_: object) -> None:
        """In the main thread, now and then: nodes end with the thread that starts them."""
        while not self._wanted.empty():
            name = self._wanted.get()
            self._nodes[name] = self._cluster.add_node()
            self.say(added=name)


def _raylet(node: Any) -> int:  # Any: Ray's node record
    return int(node.all_processes["raylet"][0].process.pid)


def _train(course: Course) -> None:
    """The plan without its sample videos, which no bench looks at."""
    for stage in course.plan.stages:
        if finished(course.folder.stage(stage.name)) is None:
            train_one(course, stage)


def drive(spec: Spec, out: Any) -> int:
    """Run the course of a spec until it ends, obeying the parent meanwhile."""
    plan, settings = make_plan(spec), settings_of(spec)
    cluster = LocalCluster(cpus=0)
    try:
        commands = _Commands(cluster, spec, out)
        try:
            if spec.system == "vanilla":
                import elastic_vanilla  # not at the top: ours must not pay for it

                elastic_vanilla.fit(plan.stages[-1], spec.folder, cluster, commands.serve)
            else:
                run_course(plan, settings, _train, cluster, commands.serve)
        except Exception as error:  # the course's own end, told to the parent
            logging.exception("the course failed")
            commands.say(end="failed", why=f"{type(error).__name__}: {error}")
            return 1
        commands.say(end="finished")
        return 0
    finally:
        cluster.stop()


def main() -> None:
    """Drive the spec of the command line; answers go to what was standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed belongs into the log
    spec = Spec(**json.loads(sys.argv[1]))
    sys.exit(drive(spec, out))


if __name__ == "__main__":
    main()
