import html.parser
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from written_run import HOSTILE, T0, Machines, write_run

from elastic.report import print_table, summarise, write_report
from elastic.report_samples import MOST_POSITIONS, Film, spread
from elastic.summary import poor_codec, read_history, table_text
from elastic.timeline import ACTIVITIES


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_run(tmp_path)
    return tmp_path


def test_the_summary_counts_what_each_stage_lost(run_dir: Path) -> None:
    vae, dit, dc_ae, dit_dc = summarise(run_dir)
    assert [one.stage for one in (vae, dit, dc_ae, dit_dc)] == [
        "hunyuan-vae", "dit-hunyuan", "dc-ae", "dit-dc-ae",
    ]  # fmt: skip
    assert [one.samples for one in (vae, dit, dc_ae, dit_dc)] == [400, 400, 200, 400]
    assert (vae.samples_lost, dit.samples_lost, dc_ae.samples_lost, dit_dc.samples_lost) == (
        0, 60, 0, 0,
    )  # fmt: skip
    assert (dit.crashes, dit.resizes, dit_dc.crashes, dit_dc.resizes) == (1, 0, 0, 1)
    assert all(one.is_finished for one in (vae, dit, dc_ae, dit_dc))
    # Half a second to the fault, half to the crash, six to the new group.
    assert dit.longest_gap == pytest.approx(7.0)
    # One to the request, one to publish, five to the new group.
    assert dit_dc.longest_gap == pytest.approx(7.0)
    assert vae.longest_gap == 0
    assert vae.psnr == pytest.approx(30 - 10 * (0.2 + 3 * math.exp(-400 / 150)))
    assert vae.ssim == pytest.approx(1 - (0.2 + 3 * math.exp(-400 / 150)))
    assert dit.psnr is dit.ssim is None
    assert vae.loss_first == pytest.approx(0.2 + 3 * math.exp(-20 / 150))
    assert vae.loss_last == pytest.approx(0.2 + 3 * math.exp(-400 / 150))
    assert vae.held_out_first == pytest.approx(1.1 * (0.2 + 3 * math.exp(-100 / 150)))


def test_a_codec_that_gives_clips_back_badly_is_told_before_a_dit_learns_on_it() -> None:
    def measured(position: int, psnr: float) -> Any:
        about = {"wall": T0 + position, "stage": "vae", "attempt": 1, "position": position}
        values = {"psnr": psnr}
        return {**about, "world": 1, "context": {"subset": "held_out"}, "values": values}

    told = poor_codec([measured(8, 25.0), measured(16, 12.42)], "vae")
    assert told is not None
    assert "'vae'" in told
    assert "12.4 dB" in told
    assert poor_codec([measured(8, 12.4), measured(16, 25.0)], "vae") is None
    assert poor_codec([measured(8, 12.4)], "another") is None


def test_restarts_say_where_they_left_and_where_they_went_on(run_dir: Path) -> None:
    crash, resize = read_history(run_dir).restarts
    assert (crash.cause, crash.position_before, crash.position_after) == ("crash", 260, 200)
    assert crash.reason == "worker 1 died: signal 9"
    assert (resize.cause, resize.position_before, resize.position_after) == ("resize", 100, 100)
    assert (resize.world_before, resize.world_after) == (2, 3)


def test_every_second_of_the_run_is_accounted_for_once(run_dir: Path) -> None:
    history = read_history(run_dir)
    account = history.account
    whole = history.events[-1]["wall"] - history.events[0]["wall"]
    assert account.seconds() == pytest.approx(whole)
    seconds = {name: account.seconds(name, "dit-hunyuan") for name in ACTIVITIES}
    assert seconds["encoding"] == pytest.approx(20)
    assert seconds["saving"] == pytest.approx(1 + 2)
    # The 60 samples beyond the save at 200, and the second until the crash was noticed.
    assert seconds["lost work"] == pytest.approx(60 / 8 + 0.5 + 0.5)
    # 400 samples were kept, at 8 a second, a tenth of it waiting.
    assert seconds["waiting for data"] == pytest.approx(400 / 8 / 10)
    assert seconds["training"] == pytest.approx(400 / 8 * 0.9)
    # To the start after encoding, and from the crash to the next start.
    assert seconds["starting"] == pytest.approx(4 + 6)
    assert seconds["sampling"] == pytest.approx(5)
    assert account.goodput("dit-hunyuan") == pytest.approx(45 / sum(seconds.values()))


def test_a_second_crash_does_not_count_the_first_loss_again(tmp_path: Path) -> None:
    m = Machines(tmp_path)
    m.event("run_start")
    m.event("stage_start", stage="a")
    for begin, end in ((0, 100), (60, 80), (60, 120)):
        m.start("a", begin, 1)
        m.steps("a", begin, end, 1, 1.0, psnr=False)
        m.event("crash", stage="a")
    (one,) = summarise(tmp_path)
    assert one.samples_lost == (100 - 60) + (80 - 60)
    assert (one.crashes, one.samples, one.is_finished) == (3, 120, False)


def test_the_time_in_which_a_killed_driver_was_gone_is_not_counted(tmp_path: Path) -> None:
    m = Machines(tmp_path)
    m.event("run_start", 0.0)
    m.event("stage_start", stage="a")
    m.start("a", 0, 1)
    m.steps("a", 0, 100, 1, 1.0, psnr=False)
    alive = m.now - T0
    m.event("run_start", 3600.0)
    m.event("stage_start", 1.0, stage="a")
    m.start("a", 80, 1, after=4.0)
    m.steps("a", 80, 100, 1, 1.0, psnr=False)
    history = read_history(tmp_path)
    account = history.account
    assert account.seconds("down") == pytest.approx(3600)
    assert account.seconds() - account.seconds("down") == pytest.approx(alive + 1 + 4 + 5)
    # What lay beyond 80 went with the driver; a tenth of all steps was waiting for data.
    assert account.seconds("lost work") == pytest.approx(5)
    assert account.goodput() == pytest.approx((20 + 5) * 0.9 / (alive + 1 + 4 + 5))
    (restart,) = history.restarts
    assert (restart.cause, restart.samples_lost) == ("run restarted", 20)
    (one,) = summarise(tmp_path)
    assert (one.samples, one.crashes) == (100, 0)


class Page(html.parser.HTMLParser):
    """Collects what a browser would see as elements, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.lasttag != "script":
            self.text += data


def test_the_report_holds_everything_and_asks_no_network(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path.read_text("utf-8"))
    assert page.tags.count("video") == 16
    assert page.tags.count("script") == 2
    assert page.tags.count("img") == 4, "two captions, sampled twice before the end"
    kinds = ("data:video/mp4;base64,", "data:image/webp;base64,")
    assert all(source.startswith(kinds) for source in page.sources)
    assert len(page.sources) == 16 + 4
    for text in ("dit-hunyuan", "worker 1 died: signal 9", "a red circle", "2 -> 3", "torch"):
        assert text in page.text
    figures = figures_of(path)
    assert set(figures) == {
        "loss-0", "psnr-0", "ssim-0", "loss-1", "loss-2", "psnr-2", "ssim-2", "loss-3",
        "levels-1", "trained-1", "levels-3", "trained-3", "timeline", "time",
    }  # fmt: skip
    raw = path.read_text("utf-8")
    assert all(f'id="{name}"' in raw for name in figures)


def figures_of(path: Path) -> dict[str, Any]:
    text = path.read_text("utf-8")
    begin = text.index("const FIGURES = ") + len("const FIGURES = ")
    figures, _ = json.JSONDecoder().raw_decode(text, begin)
    return {figure["id"]: figure for figure in figures}


def test_the_plots_show_the_last_truth_of_every_position(run_dir: Path) -> None:
    figures = figures_of(write_report(run_dir))
    names = [trace["name"] for trace in figures["loss-1"]["data"]]
    assert names == ["train 64px-17f", "train 64px-1f", "held-out"]
    assert figures["loss-1"]["data"][0]["x"] == list(range(20, 401, 20))
    world = {t["name"]: t["y"] for t in figures["timeline"]["data"] if t.get("fill")}
    assert world["dit-hunyuan"] == [0, 2, 0, 0, 2, 0]
    assert world["dit-dc-ae"] == [0, 2, 0, 0, 3, 0]
    marks = {t["name"] for t in figures["timeline"]["data"] if t.get("mode") == "markers"}
    assert marks == {"crash", "fault injected", "resize", "capacity"}


def test_a_diffusion_stage_has_a_line_for_each_level_of_noise(run_dir: Path) -> None:
    figures = figures_of(write_report(run_dir))
    held_out, trained = figures["levels-1"]["data"], figures["trained-1"]["data"]
    assert [trace["name"] for trace in held_out] == [f"t {t:.4f}" for t in np.arange(1, 16, 2) / 16]
    assert [trace["name"] for trace in trained] == [trace["name"] for trace in held_out]
    assert held_out[0]["x"] == [100, 200, 300, 400]
    assert trained[0]["x"] == list(range(20, 401, 20))
    loss = 0.2 + math.exp(-400 / 150)
    for level, trace in enumerate(held_out):
        assert trace["y"][-1] == pytest.approx(loss * (8 - level) / 4)
    assert len({trace["line"]["color"] for trace in held_out}) == 8


def test_the_strip_below_the_worlds_leaves_no_minute_out(run_dir: Path) -> None:
    history = read_history(run_dir)
    bars = [t for t in figures_of(write_report(run_dir))["timeline"]["data"] if "base" in t]
    assert {"training", "lost work", "saving", "starting", "encoding"} <= {t["name"] for t in bars}
    pairs = sorted(pair for t in bars for pair in zip(t["base"], t["x"], strict=True))
    for (base, width), (following, _) in itertools.pairwise(pairs):
        assert base + width == pytest.approx(following, abs=2e-4)
    assert sum(width for _, width in pairs) * 60 == pytest.approx(history.account.seconds(), 1e-3)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    write_run(tmp_path, second=HOSTILE, captions=[HOSTILE, "b"])
    path = write_report(tmp_path)
    page = Page(path.read_text("utf-8"))
    assert page.tags.count("script") == 2
    assert page.text.count(HOSTILE) > 5
    figures = figures_of(path)
    for figure in figures.values():
        assert "<script" not in json.dumps(figure), figure["id"]
    table = table_text(summarise(tmp_path))
    assert HOSTILE in table


def test_a_run_that_has_not_begun_has_a_report(tmp_path: Path) -> None:
    text = Page(write_report(tmp_path).read_text("utf-8")).text
    assert "has not begun" in text
    assert "No stage has begun" in text
    assert summarise(tmp_path) == []


def test_missing_and_unknown_samples_are_named(run_dir: Path) -> None:
    m = Machines(run_dir)
    m.now = T0 + 9000
    (run_dir / "notes.txt").write_text("text")
    m.event(
        "sample",
        stage="dit-dc-ae",
        position=500,
        paths=["gone.mp4", "notes.txt"],
        captions=["first", "second"],
    )
    page = Page(write_report(run_dir).read_text("utf-8"))
    assert "gone.mp4 is missing" in page.text
    assert "notes.txt: 4 bytes, not put into this page" in page.text
    assert page.tags.count("video") == 12 + 2, "of two captions the last before the end plays"


def test_the_table_lines_up(run_dir: Path) -> None:
    out = io.StringIO()
    print_table(summarise(run_dir), out)
    lines = out.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[0].split()[:2] == ["stage", "samples"]
    ends = {line.rindex("-") if set(line) <= {"-", " "} else len(line) - 1 for line in lines}
    assert ends == {len(lines[1]) - 1}
    crash = next(line for line in lines if line.startswith("dit-hunyuan"))
    assert crash.split()[1] == "400"
    assert crash.split()[-6:] == ["-", "98", "60", "0", "1", "7.0"]


def _previewed(m: Machines, positions: range) -> None:
    m.event("stage_start", stage="dit")
    for position in positions:
        m.preview("dit", position, ["a red circle"], "red")


def test_a_caption_has_its_course_in_a_row_and_the_last_film_plays(tmp_path: Path) -> None:
    m = Machines(tmp_path)
    _previewed(m, range(100, 400, 100))
    m.preview("dit", 350, ["a red circle"], "blue")
    m.event("preview", stage="dit", position=350, captions=["a red circle"],
            paths=["samples/dit/350/00.mp4"], reason="made before")  # fmt: skip
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert (page.tags.count("img"), page.tags.count("video")) == (3, 1)
    assert "a red circle100200300350" in "".join(page.text.split("\n"))
    m.finish("dit", 400, ["a red circle", "a blue square"], "red")
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert (page.tags.count("img"), page.tags.count("video")) == (4, 2), "the end's plays instead"


def test_a_stage_that_is_sampled_often_is_shown_at_a_few_positions(tmp_path: Path) -> None:
    m = Machines(tmp_path)
    _previewed(m, range(10, 510, 10))
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert page.tags.count("img") + page.tags.count("video") == MOST_POSITIONS


@given(num=st.integers(1, 500))
def test_what_is_shown_of_a_course_begins_and_ends_with_it_and_lies_evenly(num: int) -> None:
    films = [Film("caption", f"{position}.mp4", position) for position in range(num)]
    chosen = [film.position for film in spread(films)]
    assert len(chosen) == min(num, MOST_POSITIONS)
    assert (chosen[0], chosen[-1]) == (0, num - 1)
    steps = [after - before for before, after in itertools.pairwise(chosen)]
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)
