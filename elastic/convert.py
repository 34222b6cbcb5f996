"""Finished weights as a file that other programs read: the verb `export`."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elastic.checkpoint_weights import progress_of, weights_of
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.tensor_file import TensorWriter
from elastic.weight_source import CHUNK, WeightSource, own_weights
from models import layouts
from models.layouts import Layout, LayoutName, Widths
from stages.stage import DiffusionStage, Stage


@dataclass(frozen=True)
class Span:
    """Rows of one of our parameters that follow each other in a file's tensor."""

    name: str
    first: int
    rows: int
    head: int


def export_stage(
    folder: RunFolder, stage: Stage, layout: LayoutName | None, dtype: torch.dtype, out: Path,
    at: int | None = None,
) -> str:  # fmt: skip
    """Write averaged weights of a stage to a file that is not there; its SHA-256.

    Those of its end, or those `at` one of its checkpoints (`weights_of`).
    """
    if out.exists():
        raise InputError(f"--out {str(out)!r}: is there already; name another file, or remove it")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {str(out)!r}: its folder is not there; make it, or name another")
    with weights_of(folder.stage(stage.name), stage, at, out.absolute().parent) as weights:
        source, progress = own_weights(weights), progress_of(folder.stage(stage.name), at)
        # Readers of published files ask for this format word.
        metadata = {"format": "pt", "progress": json.dumps(progress)}
        return write_spans(source, _spans(source, stage, layout), dtype, out, metadata)


def _spans(source: WeightSource, stage: Stage, layout: LayoutName | None) -> dict[str, list[Span]]:
    """The rows that make up each tensor of the file; InputError where the layout has no place."""
    if isinstance(stage, DiffusionStage):
        chosen = layouts.layout_of(layout or "bfl")
        try:
            return in_layout(source, chosen, Widths.of(stage.model))
        except LookupError as error:
            raise InputError(f"stage {stage.name!r}: {error.args[0]}; take another") from None
    if layout is not None:
        raise InputError(
            f"--layout {layout}: stage {stage.name!r} trains an autoencoder, whose names are the "
            "published ones already; leave --layout out"
        )
    return {name: [Span(name, 0, shape[0], 0)] for name, shape in source.shapes.items()}


def in_layout(source: WeightSource, layout: Layout, widths: Widths) -> dict[str, list[Span]]:
    """The rows that make up each tensor of the layout; LookupError as in `pieces`."""
    found: dict[str, list[tuple[int, Span]]] = defaultdict(list)
    for name, shape in source.shapes.items():
        before = 0
        for piece in layouts.pieces(name, layout, widths):
            rows = shape[0] if piece.rows is None else piece.rows
            found[piece.key].append((piece.first, Span(name, before, rows, piece.head)))
            before += rows
        assert before == shape[0], f"{name} has {shape[0]} rows, its pieces have {before}"
    return {
        key: [span for _, span in sorted(placed, key=lambda each: each[0])]
        for key, placed in found.items()
    }


def write_spans(
    source: WeightSource, spans: dict[str, list[Span]], dtype: torch.dtype, out: Path,
    metadata: dict[str, str],
) -> str:  # fmt: skip
    """Write the tensors one after another, a few rows at a time; the file's SHA-256."""
    shapes = {
        key: (sum(span.rows for span in held), *source.shapes[held[0].name][1:])
        for key, held in spans.items()
    }
    writer = TensorWriter(out, shapes, dtype, metadata)
    blocked = writer.missing_space()
    if blocked is not None:
        raise InputError(blocked)
    writer.open()
    try:
        for key in writer.names:
            for span in spans[key]:
                for rows in _rows(source, span):
                    writer.append(rows.to(dtype))
        return writer.publish()
    except BaseException:
        writer.discard()
        raise


def _rows(source: WeightSource, span: Span) -> Iterator[Tensor]:
    width = torch.Size(source.shapes[span.name][1:]).numel()
    whole = span.head or 1  # the order changes inside a head, so heads stay whole
    at_once = max(1, CHUNK // max(1, width) // whole) * whole
    for first in range(0, span.rows, at_once):
        last = min(first + at_once, span.rows)
        rows = source.rows(span.name, span.first + first, span.first + last)
        yield layouts.half_split(rows, span.head) if span.head else rows
