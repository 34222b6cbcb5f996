"""`make demo`: the whole course on this machine, with a worker killed and a node that joins."""

import os
import signal
import time
from collections import Counter
from typing import Any

from cluster.local import LocalCluster
from elastic.cli import DONE
from elastic.course import Course, train_plan
from elastic.data.moving_shapes import COLOURS, DIRECTIONS, SHAPES, write_demo_videos
from elastic.drive import run_course, start_cluster
from elastic.film import contact_sheet, read_mp4
from elastic.folders import RunFolder
from elastic.journal import read_events
from elastic.report import print_table, summarise, write_report
from elastic.report_samples import last_films
from elastic.settings import Settings
from elastic.shape_reader import parse_caption, read_shape
from stages.plan import Plan
from stages.recipes.demo import course as demo_course
from stages.stage import DiffusionStage
from stages.videos import Videos

KILL_IN, GROW_IN = "hunyuan-dit", "dc-ae-dit"
MIN_STAY_S = 3.0
_AT = 0.3  # share of the stage after which it happens
_CHOICES = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS}
_KILL, _JOIN = "SIGKILL of one worker", "a node joins"


class Faults:
    """What happens to the demo while it runs: each once in the life of the run folder."""

    def __init__(self, plan: Plan, folder: RunFolder, cluster: LocalCluster) -> None:
        self._budgets = {stage.name: stage.budget for stage in plan.stages}
        self._cluster = cluster
        past = [event for event in read_events(folder.root) if event["kind"] == "fault_injected"]
        self._done = {event.get("what", "") for event in past}
        if _JOIN in self._done:
            cluster.add_node()  # it had joined before the driver was killed

    def __call__(self, course: Course, latest: dict[str, Any]) -> None:
        """Kill or join if it is time."""
        if self._is_time(latest, KILL_IN, _KILL) and latest["pids"]:
            # Told first: killed in between, the next driver must not do it again.
            self._tell(course, latest, _KILL)
            os.kill(latest["pids"][-1], signal.SIGKILL)
        if self._is_time(latest, GROW_IN, _JOIN):
            self._tell(course, latest, _JOIN)
            self._cluster.add_node()

    def _is_time(self, latest: dict[str, Any], stage: str, what: str) -> bool:
        position = latest.get("position")
        if what in self._done or latest.get("stage") != stage or position is None:
            return False
        return bool(position >= _AT * self._budgets[stage])

    def _tell(self, course: Course, latest: dict[str, Any], what: str) -> None:
        self._done.add(what)
        course.tracker.event("fault_injected", latest["stage"], latest["position"], what, what=what)


def run_demo(settings: Settings) -> int:
    """Write the videos, run the course, and say what came out of it."""
    began = time.monotonic()
    demo_set = write_demo_videos(settings.storage_path / "demo-videos")
    print(f"videos: {demo_set.good} good and {demo_set.odd} odd ones in {demo_set.folder}")
    videos = Videos(str(demo_set.table))
    plan = demo_course(videos)
    folder = RunFolder.of(settings.storage_path, plan)
    if "min_stay" not in settings.model_fields_set:
        settings = settings.model_copy(update={"min_stay": MIN_STAY_S})  # its stages are short
    # Two nodes of one CPU, whatever the machine has: the story is the same everywhere.
    cluster = start_cluster(settings, cpus=1)
    try:
        cluster.add_node()
        faults = Faults(plan, folder, cluster)
        run_course(plan, settings, train_plan, cluster, faults)
    finally:
        cluster.stop()
    print_outcome(plan, folder)
    print(f"this start took {time.monotonic() - began:.0f} s")
    return DONE


def print_outcome(plan: Plan, folder: RunFolder) -> None:
    """The closing table, what a reader of pixels sees in the samples, and where things lie."""
    report = write_report(folder.root)
    print_table(summarise(folder.root))
    rows = []
    for stage in plan.stages:
        if isinstance(stage, DiffusionStage):
            named, films = read_samples(folder, stage.name)
            rows += [(f"{stage.name}: {caption}", film) for caption, film in films[:6]]
            words = [
                f"{what} in {named[what]} (by chance {len(films) / len(choices):.1f})"
                for what, choices in _CHOICES.items()
            ]
            print(
                f"{stage.name}: of {len(films)} samples a reader of pixels names the captioned "
                f"{', '.join(words)}"
            )
    if rows:
        contact_sheet(folder.root / "contact-sheet.png", rows)
        print(f"contact sheet: {folder.root / 'contact-sheet.png'}")
    print(f"samples:       {folder.root / 'samples'}")
    print(f"report:        {report}\nAim:           python -m elastic dashboard {folder.root}")


def read_samples(folder: RunFolder, stage: str) -> tuple[Counter[str], list[tuple[str, Any]]]:
    """In how many of a stage's samples each word of the caption is seen, and the samples."""
    last = last_films(read_events(folder.root), stage)
    named: Counter[str] = Counter()
    films = []
    for caption, path, _ in last:
        frames_THWC = read_mp4(folder.root / path).frames_THWC
        seen = read_shape(frames_THWC)._asdict()
        named.update(what for what, word in parse_caption(caption).items() if seen[what] == word)
        films.append((caption, frames_THWC))
    return named, films
