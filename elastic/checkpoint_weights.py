"""The averaged weights in a checkpoint as a file, for who looks at a stage in the midst of it.

One process reads it, without a group and without holding the model: file by file, and verified
first, as when a stage is restored.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from elastic.branch import checkpoints_of, require_checkpoint, shown
from elastic.checkpoint_manifest import Damaged, fault, read_manifest
from elastic.checkpoint_place import storage_of
from elastic.checkpoint_read import Part, Parts, Source, raise_first, unfit, verify_stored
from elastic.errors import InputError
from elastic.tensor_file import TensorWriter
from elastic.weights import WEIGHTS, finished
from stages.stage import Stage

_AVERAGE = "ema/"
_PIECE = 16 * 2**20  # bytes read at a time


@contextmanager
def weights_of(folder: Path, stage: Stage, at: int | None, scratch: Path) -> Iterator[Path]:
    """A file of the averaged weights of a stage that lives in a folder, while the block runs.

    Those of its end, or those `at` one of its checkpoints: they are written below `scratch` for
    this. InputError where the stage is not finished and no position is given, with those that are
    there; where there is no checkpoint at the position; where it is damaged.
    """
    if at is None:
        require_finished(folder, stage)
        yield folder / WEIGHTS
        return
    require_checkpoint(folder, at, f"--at {at}")
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".weights-", dir=scratch) as aside:
        path = Path(aside) / WEIGHTS
        try:
            _write(folder, stage, at, path)
        except (Damaged, OSError) as error:
            raise InputError(
                f"checkpoint {at} of stage {stage.name!r} in {storage_of(folder).where}: "
                f"{fault(error)}; give another position"
            ) from None
        yield path


def progress_of(folder: Path, at: int | None) -> dict[str, Any]:  # Any: JSON
    """How far a stage had come where its weights are those of `weights_of`."""
    if at is not None:
        return read_manifest(storage_of(folder), at).progress.as_json()
    mark = finished(folder)
    assert mark is not None, f"{folder.name} is not finished"
    return dict(mark["progress"])


def require_finished(folder: Path, stage: Stage) -> None:
    """InputError, with the positions that there are, unless the stage is finished."""
    if finished(folder) is not None:
        return
    there = checkpoints_of(folder)
    advice = (
        f"look at one of its checkpoints with --at: {shown(there)}"
        if there
        else "and it has no checkpoint yet; go on with python -m elastic train FILE"
    )
    raise InputError(f"stage {stage.name!r} is not finished; {advice}")


def _write(folder: Path, stage: Stage, at: int, path: Path) -> None:
    """Write the average in a checkpoint to a file; Damaged, OSError, InputError without room."""
    storage = storage_of(folder)
    manifest = read_manifest(storage, at)
    source = Source(storage, at, manifest.files, None)
    headers, errors = verify_stored(source, sorted(manifest.files))
    raise_first(errors)
    parts = {(key, p.offsets): p for file in headers.values() for key, p in file}
    model = stage.build()
    extra = model.state_dict().keys() - dict(model.named_parameters()).keys()
    assert not extra, f"{sorted(extra)} are weights that no checkpoint holds"
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wanted = {f"{_AVERAGE}{n}": torch.empty(s, device="meta") for n, s in shapes.items()}
    faults = unfit(parts, wanted)
    if faults:
        raise Damaged("; ".join(faults))
    progress = {"progress": json.dumps(manifest.progress.as_json())}
    writer = TensorWriter(path, shapes, torch.float32, progress)
    blocked = writer.missing_space()
    if blocked is not None:
        raise InputError(blocked)
    writer.open()
    try:
        for name in writer.names:
            _append(writer, source, parts, f"{_AVERAGE}{name}")
        writer.publish()
    except BaseException:
        writer.discard()
        raise


def _append(writer: TensorWriter, source: Source, parts: Parts, key: str) -> None:
    """Add the rows of a tensor in order; those that two files hold are taken once."""
    done, held = 0, (part for (name, _), part in parts.items() if name == key)
    for part in sorted(held, key=lambda part: part.offsets):
        first = part.offsets[0] if part.shape else 0
        num_rows = part.shape[0] if part.shape else 1
        for values in _rows(source, part, max(0, done - first), num_rows):
            writer.append(values)
        done = max(done, first + num_rows)


def _rows(source: Source, part: Part, first: int, last: int) -> Iterator[torch.Tensor]:
    """Rows of a part, some at a time."""
    row = math.prod(part.shape[1:])
    row_bytes = row * part.dtype.itemsize
    at_once = max(1, _PIECE // max(1, row_bytes))
    read = source.stored(part.file)
    for start in range(first, last, at_once):
        rows = torch.empty((min(at_once, last - start), row), dtype=part.dtype)
        read(part.begin + start * row_bytes, rows.flatten().view(torch.uint8).numpy().data)
        yield rows
