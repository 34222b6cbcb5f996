"""More than fifty real faults in the two stages of a plan, and what became of each.

Runs of one plan meet the faults one after another. Each has to end in continued training or in one
clear message with the state intact, after which the next driver goes on. At the end the order
digests of a run have to be those of a run without faults, and so, within 1e-5, has the loss path.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

# What lies beside this script is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import planned_faults
from elastic_driver import BATCH, CODEC, DIT, ROOT, Driver, DriverGone, Spec
from elastic_timeline import spread
from figure import record
from recovery_faults import HANG_S, Fault, Scene
from recovery_groups import GROUPS, Group

from cluster import faults
from elastic.data.moving_shapes import write_demo_videos
from elastic.journal import latest_values, read_events, read_metrics

TOLERANCE = 1e-5  # relative, on losses: another world takes the sums of a batch in another order
LEAST = 50
OVER_S = 150.0  # Ray gives up a lost head after a minute
DISK_BYTES = 160_000_000
MORE_UPDATES = 3  # new ones that count as going on
PLAN = Spec(
    storage="",
    table="",
    nodes=("a", "b"),
    codec_updates=160,
    save_updates=20,
    codec_save_updates=10,
    # Latents are kept in bf16: a codec that is 1e-5 apart would have some that are 4e-3 apart.
    exact_codec=True,
    width=48,  # 0.3 M parameters: the faults are the same, and the runs short
    settings={"hang_after": HANG_S, "min_stay": 1.0},
    environment={
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10",
        # Training goes on without the head until the driver gives it up: 60 s, all of a stage here.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    },
)
QUICK = ("processes",)
Row = dict[str, Any]


class Run:
    """One run of the plan that meets a group's faults; drivers follow one another if they end."""

    def __init__(self, spec: Spec, group: Group, disk: faults.SmallDisk | None) -> None:
        self.spec = spec
        self.group = group
        self.rows: list[Row] = []
        self.scene = Scene(
            driver=Driver(spec),
            stage=CODEC,
            planned=Path(spec.environment[planned_faults.FOLDER]),
            draw=random.Random(group.name),
            nodes=list(spec.nodes),
            disk=disk,
        )

    def play(self) -> None:
        """Meet every fault, then go on to the end of the plan."""
        stages = ((CODEC, self.group.codec, self.spec.codec_updates),
                  ("switch", self.group.switch, 0),
                  (DIT, self.group.dit, self.spec.dit_updates))  # fmt: skip
        for where, found, updates in stages:
            self.scene.stage = DIT if where == "switch" else where
            for number, fault in enumerate(found):
                # Evenly over the stage, each with a few updates of chance.
                due = updates * (number + 0.5) / len(found) + self.scene.draw.uniform(0, 4)
                self._reach(due * BATCH[self.scene.stage] if updates else 0)
                self._meet(where, fault)
        self._end()

    def _reach(self, position: float) -> None:
        stage, driver = self.scene.stage, self.scene.driver
        if position:
            driver.wait(lambda: driver.position(stage) >= position, f"{stage} {position}", OVER_S)

    def _meet(self, where: str, fault: Fault) -> None:
        scene, began = self.scene, time.time()
        scene.repair = None
        row: Row = {"group": self.group.name, "where": where, "fault": fault.name,
                    "position": scene.driver.position(scene.stage)}  # fmt: skip
        try:
            try:
                fault.do(scene)
                scene.driver.wait(self._is_over(fault, began), f"the end of {fault.name}", OVER_S)
                row |= {"outcome": "recovered"}
            except DriverGone:
                row |= self._ended(fault)
                self._next_driver()
        except TimeoutError as error:
            row |= {"outcome": "silent", "why": str(error)[-1500:]}
            self._next_driver()
        except (IndexError, ProcessLookupError) as error:
            row |= {"outcome": "not met", "why": f"there was no such process: {error!r}"}
        events = read_events(scene.driver.folder.root)
        row |= {
            "seconds": round(time.time() - began, 1),
            "told": dict(Counter(e["kind"] for e in events if e["wall"] >= began)),
            "reasons": [e["reason"][:160] for e in events if e["wall"] >= began
                        and e["kind"] in ("crash", "hang", "blocked", "save_failed",
                                          "damaged_checkpoint")][:6],
        }  # fmt: skip
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    def _is_over(self, fault: Fault, began: float) -> Any:
        """Whether what the fault has to be followed by has come: new updates, and more."""
        scene, stage, root = self.scene, self.scene.stage, self.scene.driver.folder.root
        goal = self._further(scene.driver.position(stage))

        def is_over() -> bool:
            events = [e for e in read_events(root) if e["wall"] > began and e["stage"] == stage]
            kinds = {event["kind"] for event in events}
            if fault.shows in ("attempt", "damage") and "start" not in kinds:
                return False
            if fault.shows == "damage" and "damaged_checkpoint" not in kinds:
                return False
            if fault.shows == "publish" and "publish" not in kinds:
                return False
            return scene.driver.position(stage) >= goal

        return is_over

    def _further(self, position: int) -> int:
        """Where a run is that has gone on from a position of the stage."""
        stage = self.scene.stage
        budget = {CODEC: self.spec.codec_updates, DIT: self.spec.dit_updates}[stage]
        return min(position + MORE_UPDATES * BATCH[stage], budget * BATCH[stage])

    def _ended(self, fault: Fault) -> Row:
        """How the driver ended: what it said, or that it was meant to die."""
        end = self.scene.driver.farewell()
        if fault.ends_driver:
            return {"outcome": "restarted", "why": str(end.get("why", ""))[-300:]}
        outcome = {"failed": "refused", "finished": "without effect"}.get(end["end"], "died")
        return {"outcome": outcome, "why": str(end.get("why", ""))[-600:]}

    def _next_driver(self) -> None:
        """What a person would do: put right what the message names, and start again."""
        scene = self.scene
        scene.driver.kill()
        if scene.repair is not None:
            scene.repair()
        scene.nodes = list(self.spec.nodes)
        scene.driver = Driver(self.spec)
        stage = scene.stage
        goal = self._further(scene.driver.position(stage))
        scene.driver.wait(lambda: scene.driver.position(stage) >= goal, "the next driver", OVER_S)

    def _end(self) -> None:
        end = self.scene.driver.finish(OVER_S + 2 * self.spec.dit_updates)
        if end["end"] != "finished":
            raise DriverGone(f"after all faults of {self.group.name}: {end}")


def path_of(root: Path) -> dict[tuple[str, int], tuple[str, float]]:
    """Order digest and loss at every position of every stage."""
    lines = [m for m in latest_values(read_metrics(root)) if not m["context"]]
    return {(m["stage"], m["position"]): (m["order_digest"], m["values"]["loss"]) for m in lines}


def compare(root: Path, reference: Path) -> Row:
    """Whether a run has trained each sample that the undisturbed one has, in the same order.

    A digest covers all samples up to its position, so a line that never reached the journal (its
    writer was frozen, and then ended) hides none: what counts is that the last one is there.
    """
    ours, theirs = path_of(root), path_of(reference)
    both = ours.keys() & theirs.keys()
    apart = [abs(ours[k][1] - theirs[k][1]) / max(abs(theirs[k][1]), 1e-12) for k in both]
    ends = {stage: max(p for s, p in theirs if s == stage) for stage, _ in theirs}
    return {
        "positions": len(theirs),
        "not_logged": len(theirs.keys() - ours.keys()),
        "unfinished": [stage for stage, end in ends.items() if (stage, end) not in ours],
        "unknown": sorted(map(str, ours.keys() - theirs.keys()))[:10],
        "other_order": sorted(str(k) for k in both if ours[k][0] != theirs[k][0])[:10],
        "loss_apart": max(apart, default=1.0),
    }


def is_same(found: Row) -> bool:
    """Whether no sample was lost or seen twice, and the losses are those of the other run."""
    wrong = found["unfinished"] or found["unknown"] or found["other_order"]
    return not wrong and found["loss_apart"] <= TOLERANCE


def undisturbed(spec: Spec) -> Path:
    """The root of a run that meets nothing."""
    driver = Driver(spec)
    try:
        end = driver.finish(OVER_S + spec.dit_updates)
        assert end["end"] == "finished", f"without any fault: {end}"
    finally:
        driver.kill()
    return driver.folder.root


def play(spec: Spec, group: Group, reference: Path) -> tuple[list[Row], Row]:
    """One run through a group's faults: a row for each, and how it compares."""
    planned = Path(spec.storage).with_name(f"{group.name}-planned")
    path = str(ROOT / "tests" / "planned") + f":{ROOT}:{ROOT / 'tests'}"
    spec = replace(spec, environment={
        **spec.environment, planned_faults.FOLDER: str(planned), "PYTHONPATH": path,
    })  # fmt: skip
    if group.small_disk:
        with faults.small_disk(Path(spec.storage), DISK_BYTES) as disk:
            return _play(Run(spec, group, disk), reference)
    return _play(Run(spec, group, None), reference)


def _play(run: Run, reference: Path) -> tuple[list[Row], Row]:
    problem = None
    try:
        run.play()
    except (DriverGone, TimeoutError) as error:
        problem = f"{type(error).__name__}: {error}"[-1500:]
    finally:
        run.scene.driver.kill()
    found = {"group": run.group.name, **compare(run.scene.driver.folder.root, reference)}
    found |= {"problem": problem, "met": len(run.rows), "planned": len(run.group.all)}
    print(json.dumps(found), file=sys.stderr, flush=True)
    return run.rows, found


def main() -> None:
    """Play, compare, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the faults of processes alone")
    parser.add_argument("--only", help="one group, or the one fault of this name in every group")
    parser.add_argument("--folder", type=Path, help="where runs are kept; a temporary one if not")
    options = parser.parse_args()
    groups = [g for g in GROUPS if not options.quick or g.name in QUICK]
    if options.only:
        named = [g for g in groups if g.name == options.only]
        groups = named or [g for g in (only(g, options.only) for g in groups) if g.all]
        if not groups:
            parser.error(f"--only {options.only!r}: no group and no fault has this name")
    rows: list[Row] = []
    runs: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="restage-bench-") as temporary:
        folder = options.folder or Path(temporary)
        videos = write_demo_videos(folder / "videos", clips=24)
        plan = replace(PLAN, table=str(videos.table))
        for group in groups:
            lasts = replace(plan, dit_updates=group.dit_updates)
            reference = replace(lasts, storage=str(folder / f"undisturbed-{group.dit_updates}"))
            if not Path(reference.storage).exists():
                undisturbed(reference)
            spec = replace(lasts, storage=str(folder / group.name))
            more, found = play(spec, group, reference.folder.root)
            rows += more
            runs.append(found)
    right = [row for row in rows if row["outcome"] in ("recovered", "refused", "restarted")]
    recovered = [row["seconds"] for row in rows if row["outcome"] == "recovered"]
    record(
        "recovery",
        figures={
            "faults": len(rows),
            "outcomes": dict(Counter(row["outcome"] for row in rows)),
            "recovered_s": spread(recovered) if recovered else None,
            "loss_apart": max((found["loss_apart"] for found in runs), default=None),
            "runs": runs,
            "rows": rows,
        },
        goal=(
            f"at least {LEAST} faults in two stages, each recovered from or refused with a "
            f"message; no sample lost or seen twice; losses within {TOLERANCE} of the "
            "undisturbed run's"
        ),
        holds=(
            len(rows) >= LEAST
            and len(right) == len(rows)
            and all(is_same(found) and found["problem"] is None for found in runs)
            and all(found["met"] == found["planned"] for found in runs)
        ),
        keep=not options.quick and not options.only,
    )


def only(group: Group, name: str) -> Group:
    """The group with the faults of this name alone."""
    kept = {where: tuple(f for f in getattr(group, where) if f.name == name)
            for where in ("codec", "switch", "dit")}  # fmt: skip
    return replace(group, **kept)


if __name__ == "__main__":
    main()
