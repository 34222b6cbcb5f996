"""Every kind of odd file is either shown right or quarantined with its reason."""

import csv
import re
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_videos import HEIGHT, KINDS, RATE, WIDTH, Odd, quarter_colours, wanted_colours

from elastic.data.decode import BadVideo, decode_clip
from elastic.data.decoders import Decoders, Wanted
from elastic.data.probe import probe
from elastic.data.probes import probe_all
from elastic.data.table import read_table
from stages.videos import Videos

GOOD = [kind for kind in KINDS if not kind.reason]
BAD = [kind for kind in KINDS if kind.reason]
_LONG_S = 20.0  # no odd file takes so long, on any machine


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: ascii(kind.name))
def test_a_file_that_can_be_shown_shows_the_source(kind: Odd, tmp_path: Path) -> None:
    path = tmp_path / kind.name
    kind.make(path)
    assert probe(str(path)).frames == kind.frames
    x_CTHW = decode_clip(str(path), kind.frames, Fraction(RATE), HEIGHT, WIDTH).numpy()
    away = np.abs(quarter_colours(x_CTHW) - wanted_colours(kind.frames))
    assert away.max() <= kind.off


def probe_and_decode(path: str, *wanted: Any) -> None:
    """What befalls a file: the probe may pass one that only breaks later."""
    probe(path)
    decode_clip(path, *wanted)


@pytest.mark.parametrize("kind", BAD, ids=lambda kind: ascii(kind.name))
def test_a_file_that_cannot_be_shown_says_why_at_once(kind: Odd, tmp_path: Path) -> None:
    path = tmp_path / kind.name
    kind.make(path)
    began = time.monotonic()
    for use in (probe_and_decode, decode_clip):
        with pytest.raises(BadVideo, match=kind.reason):
            use(str(path), 8, Fraction(RATE), HEIGHT, WIDTH)
    assert time.monotonic() - began < _LONG_S


def test_a_table_of_all_kinds_is_divided_into_good_and_quarantined(tmp_path: Path) -> None:
    for kind in KINDS:
        kind.make(tmp_path / kind.name)
    with open(tmp_path / "clips.csv", "w", newline="") as file:
        rows = [{"path": kind.name, "text": "four colours"} for kind in KINDS]
        writer = csv.DictWriter(file, ["path", "text"])
        writer.writeheader()
        writer.writerows(rows)
    clips = read_table(Videos(str(tmp_path / "clips.csv")))
    probed = probe_all(clips, tmp_path / "probes.parquet", workers=2)
    decoders = Decoders(2)
    wanted = [Wanted(str(tmp_path / kind.name), kind.frames, RATE, HEIGHT, WIDTH) for kind in KINDS]
    for kind, found in zip(KINDS, decoders.decode(wanted, ahead=9), strict=True):
        if kind.reason:
            assert isinstance(found, BadVideo), kind.name
            assert re.search(kind.reason, found.reason), kind.name
        else:
            assert not isinstance(found, BadVideo), f"{kind.name}: {found}"
    decoders.close()
    reasons = {Path(clip.path).name: reason for clip, reason in probed.quarantined()}
    found = {kind.name for kind in KINDS} - set(reasons)
    assert {kind.name for kind in GOOD} <= found
    for kind in BAD:  # one that only breaks in the middle may pass the probe; the decode finds it
        assert re.search(kind.reason, reasons.get(kind.name, "")) or kind.name.startswith("cut.")
