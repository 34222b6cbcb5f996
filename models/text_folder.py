"""Whether a folder holds a text encoder in Hugging Face's layout, found without loading a model.

Small files are read whole; of safetensors, which are large, the headers. An error says the field,
the folder, the value, the rule and what to do.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

_INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "spiece.model", "vocab.json")  # one of them is needed
SMALL = (
    *("config.json", _INDEX, "merges.txt", *TOKENIZERS),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
WEIGHTS = "*.safetensors"


class Kind(NamedTuple):
    """One of the two encoders: how its files name what is looked at."""

    name: str
    model_types: tuple[str, ...]  # of config.json
    sizes: dict[str, int]  # fields of config.json, with what transformers takes where it is silent
    tensors: tuple[str, ...]  # the names that a tensor of known shape has in one file or another
    shape: tuple[str | None, str | None]  # its rows and columns, as fields of config.json


T5 = Kind(
    name="a T5 encoder",
    model_types=("t5",),
    sizes={"d_model": 512},
    tensors=("encoder.block.0.layer.0.SelfAttention.q.weight",),
    shape=(None, "d_model"),
)
CLIP = Kind(
    name="a CLIP text model",
    model_types=("clip_text_model", "clip"),
    sizes={"hidden_size": 512, "max_position_embeddings": 77},
    tensors=(
        "text_model.embeddings.position_embedding.weight",
        "embeddings.position_embedding.weight",
    ),
    shape=("max_position_embeddings", "hidden_size"),
)


def check_folder(where: str, folder: Path, kind: Kind) -> dict[str, int]:
    """The model's sizes as config.json has them; ValueError, which begins with `where`."""
    if not folder.is_dir():
        raise ValueError(f"{where}: no such folder; give that of the downloaded encoder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{where}: config.json is missing; copy it from the published one")
    sizes = _sizes(where, folder, kind)
    _check_weights(where, folder, kind, sizes)
    _check_tokenizer(where, folder)
    return sizes


def _sizes(where: str, folder: Path, kind: Kind) -> dict[str, int]:
    config = _read_json(where, folder / "config.json")
    found = config.get("model_type")
    if found not in kind.model_types:
        raise ValueError(
            f"{where}: config.json says model_type {found!r}, and {kind.name} has "
            f"{' or '.join(map(repr, kind.model_types))}; give the right folder: are t5 and clip "
            "swapped?"
        )
    if isinstance(config.get("text_config"), dict):  # a whole CLIP has its text model in here
        config = config["text_config"]
    sizes = {name: config.get(name, default) for name, default in kind.sizes.items()}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(
                f"{where}: config.json says {name} {size!r}, which must be a whole number, 1 or "
                "more; copy the published config.json"
            )
    return sizes


def _check_weights(where: str, folder: Path, kind: Kind, sizes: dict[str, int]) -> None:
    shapes: list[tuple[str, list[int]]] = []
    for path in _weight_files(where, folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys()) & set(kind.tensors)
                shapes += [(name, file.get_slice(name).get_shape()) for name in names]
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{where}: {path.name} ({path.stat().st_size:,} bytes) is no whole safetensors "
                f"file ({error}); copy it again"
            ) from None
    if not shapes:
        raise ValueError(
            f"{where}: the weights have no tensor {kind.tensors[0]!r}, which {kind.name} has; give "
            "the right folder: are the files those of another model?"
        )
    for name, shape in shapes:
        needed = [None if field is None else sizes[field] for field in kind.shape]
        if len(shape) != 2 or any(n not in (None, s) for n, s in zip(needed, shape, strict=True)):
            fields = ", ".join(f"{field} {size}" for field, size in sizes.items())
            raise ValueError(
                f"{where}: the weights' {name} has the shape {shape}, and config.json says "
                f"{fields}; copy both from the same model"
            )


def _weight_files(where: str, folder: Path) -> list[Path]:
    """The files that transformers reads."""
    found = sorted(path.name for path in folder.glob(WEIGHTS))
    if not found:
        raise ValueError(
            f"{where}: no {WEIGHTS} file; other formats are not read, since loading them may run "
            "code: convert the weights to safetensors"
        )
    if "model.safetensors" in found:
        return [folder / "model.safetensors"]
    if not (folder / _INDEX).is_file():
        raise ValueError(
            f"{where}: {found[0]!r} is not read; the weights are called 'model.safetensors', or "
            f"{_INDEX!r} lists them: rename the file, or copy the index"
        )
    listed = _read_json(where, folder / _INDEX).get("weight_map")
    names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
    missing = [name for name in names if name not in found]
    if missing or not names:
        raise ValueError(
            f"{where}: {_INDEX} lists {len(names)} files, and {', '.join(missing[:3]) or 'none'} "
            f"({len(missing)} in all) is missing; copy all of them"
        )
    return [folder / name for name in names]


def _check_tokenizer(where: str, folder: Path) -> None:
    kinds = [name for name in TOKENIZERS if (folder / name).is_file()]
    if not kinds:
        raise ValueError(
            f"{where}: no tokenizer, which is one of {', '.join(TOKENIZERS)}; copy the "
            "tokenizer's files into the same folder"
        )
    for name in SMALL:
        # tokenizer.json is a large one, and read below.
        if name.endswith(".json") and name != "tokenizer.json" and (folder / name).is_file():
            _read_json(where, folder / name)
    path = folder / kinds[0]
    state = path.stat()
    try:
        fault = _tokenizer_fault(path, state.st_size, state.st_mtime_ns)
    except ImportError as error:
        raise ValueError(
            f'{where}: {path.name} needs {error.name}: pip install "restage[text]"'
        ) from None
    if fault is not None:
        raise ValueError(
            f"{where}: the tokenizer {path.name} ({state.st_size:,} bytes) cannot be read "
            f"({fault}); copy it again"
        )


@functools.lru_cache(maxsize=16)
def _tokenizer_fault(path: Path, size: int, changed_ns: int) -> str | None:
    """What is wrong with a tokenizer; size and time of change make another content another call."""
    # Late: both come with the optional dependency.
    try:
        if path.name == "tokenizer.json":
            from tokenizers import Tokenizer

            Tokenizer.from_file(str(path))
        if path.name == "spiece.model":
            from sentencepiece import SentencePieceProcessor

            SentencePieceProcessor(model_file=str(path))
    except ImportError:
        raise
    # tokenizers raises Exception itself, and all of it is about the file.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _read_json(where: str, path: Path) -> dict[str, Any]:  # Any: JSON
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{where}: {path.name} cannot be read ({error}); copy the published one"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{where}: {path.name} holds a {type(found).__name__}, and must hold an object; copy "
            "the published one"
        )
    return found
