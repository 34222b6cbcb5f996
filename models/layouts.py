"""Where published files keep the DiT's parameters: names, splits and the order of rotary rows.

Each of our parameters is a concatenation, along its first dimension, of pieces of a file's tensors.

bfl: Black Forest Labs' FLUX, which is ours. diffusers: `FluxTransformer2DModel`, with split
projections, and scale before shift in `norm_out`. open-sora: Open-Sora v2 with `fused_qkv=False`
(opensora/models/mmdit/layers.py). Half-split rotary, Open-Sora's `use_liger_rope=True`, keeps the
two channels of rotary pair p of a head at p and p + E/2; interleaved rotary at 2p and 2p + 1.
"""

# A attention head, E channel of a head, P rotary pair of a head

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from einops import rearrange
from torch import Tensor

from models.dit import DiT

LayoutName = Literal["bfl", "diffusers", "open-sora"]
RotaryName = Literal["interleaved", "half-split"]
PREFIXES = ("model.diffusion_model.", "model.", "module.", "transformer.")

_TOP = (
    *("img_in", "cond_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"),
    *(f"{part}_in.{layer}_layer" for part in ("time", "vector", "guidance")
      for layer in ("in", "out")),
)  # fmt: skip
_DOUBLE = tuple(
    f"{stream}_{part}"
    for stream in ("img", "txt")
    for part in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2",
                 "attn.norm.query_norm", "attn.norm.key_norm")
)  # fmt: skip
_SINGLE = ("modulation.lin", "linear1", "linear2", "norm.query_norm", "norm.key_norm")

# One word: the module under another name. Several: each holds the sections that are listed.
_Place = str | dict[str, tuple[int, ...]]
_OPEN_SORA: dict[str, _Place] = {
    **{
        f"{stream}_attn.qkv": {
            f"{stream}_attn.q_proj": (0,),
            f"{stream}_attn.k_proj": (1,),
            f"{stream}_attn.v_proj": (2,),
        }
        for stream in ("img", "txt")
    },
    "linear1": {"q_proj": (0,), "k_proj": (1,), "v_mlp": (2, 3)},
}
_DIFFUSERS: dict[str, _Place] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": {"norm_out.linear": (1, 0)},
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": {"attn.to_q": (0,), "attn.to_k": (1,), "attn.to_v": (2,)},
    "txt_attn.qkv": {"attn.add_q_proj": (0,), "attn.add_k_proj": (1,), "attn.add_v_proj": (2,)},
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "modulation.lin": "norm.linear",
    "linear1": {"attn.to_q": (0,), "attn.to_k": (1,), "attn.to_v": (2,), "proj_mlp": (3,)},
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_PLACES: dict[LayoutName, dict[str, _Place]] = {
    "bfl": {},
    "open-sora": _OPEN_SORA,
    "diffusers": _DIFFUSERS,
}
_HAS_NO_PLACE = {"diffusers": ("cond_in",), "bfl": (), "open-sora": ()}
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_INDEX = re.compile(r"(double_blocks|transformer_blocks|single_blocks|single_transformer_blocks)"
                    r"\.(\d+)\.")  # fmt: skip
_SIGNS: dict[LayoutName, re.Pattern[str]] = {
    "bfl": re.compile(r"(double_blocks\.\d+\.\w+_attn\.qkv|single_blocks\.\d+\.linear1)\.weight"),
    "open-sora": re.compile(
        r"(double_blocks\.\d+\.\w+_attn|single_blocks\.\d+)\.[qk]_proj\.weight"
    ),
    "diffusers": re.compile(r"(single_)?transformer_blocks\.\d+\.attn\.to_[qk]\.weight"),
}
# The tensor of a single block that ends with the MLP's rows, and how often the width comes before.
_SINGLE_PROJECTION: dict[LayoutName, tuple[re.Pattern[str], int]] = {
    "bfl": (re.compile(r"single_blocks\.\d+\.linear1\.weight"), 3),
    "open-sora": (re.compile(r"single_blocks\.\d+\.v_mlp\.weight"), 1),
    "diffusers": (re.compile(r"single_transformer_blocks\.\d+\.proj_mlp\.weight"), 0),
}


@dataclass(frozen=True)
class Piece:
    """Rows of one file tensor that are rows of one of our parameters."""

    key: str
    first: int = 0
    rows: int | None = None  # None: all that the tensor has
    head: int = 0  # rows of a head whose two halves are to be interleaved; 0: rows as they are


@dataclass(frozen=True)
class Widths:
    """What splits and rotary orders depend on."""

    width: int
    head: int
    mlp: int

    @classmethod
    def of(cls, shape: DiT) -> "Widths":
        """The widths of a DiT."""
        return cls(shape.width, shape.head_width, shape.mlp_width)


@dataclass(frozen=True)
class Layout:
    """One way of keeping the parameters."""

    name: LayoutName
    rotary: RotaryName


def layout_of(name: LayoutName, rotary: RotaryName | None = None) -> Layout:
    """The layout with the rotary order given, or else with the one of its published files."""
    return Layout(name, rotary or ("half-split" if name == "open-sora" else "interleaved"))


def shared_prefix(keys: Iterable[str]) -> str:
    """What wrappers have put before every key, `model.` or `module.transformer.` for example."""
    remaining, prefix = list(keys), ""
    while remaining:
        common = next((p for p in PREFIXES if all(k.startswith(p) for k in remaining)), "")
        if not common:
            break
        prefix += common
        remaining = [key.removeprefix(common) for key in remaining]
    return prefix


def detect_layout(keys: Collection[str]) -> LayoutName:
    """The layout of a file's keys, prefix stripped; ValueError where none fits, or two do."""
    found = {
        name: key for name, sign in _SIGNS.items() for key in sorted(keys) if sign.fullmatch(key)
    }
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise ValueError(f"keys of more than one layout: {', '.join(found.values())}")
    few = ", ".join(sorted(keys)[:3]) or "none"
    raise ValueError(
        f"none of its {len(keys)} keys is a projection of a DiT in one of the layouts "
        f"{', '.join(_SIGNS)}; it has, for example: {few}"
    )


def our_names(keys: Iterable[str]) -> list[str]:
    """Names of every parameter, optional ones too, of a DiT with the blocks that the keys have."""
    double, single = set[int](), set[int]()
    for match in filter(None, map(_INDEX.match, keys)):
        (single if match[1].startswith("single") else double).add(int(match[2]))
    return [
        f"{module}.{leaf}"
        for module in (
            *_TOP,
            *(f"double_blocks.{i}.{part}" for i in sorted(double) for part in _DOUBLE),
            *(f"single_blocks.{i}.{part}" for i in sorted(single) for part in _SINGLE),
        )
        for leaf in (("scale",) if module.endswith("_norm") else ("weight", "bias"))
    ]


def pieces(name: str, layout: Layout, widths: Widths) -> tuple[Piece, ...]:
    """The pieces that make up our parameter, in order; LookupError where the layout has no place.

    Pieces that lie side by side in a file are one piece.
    """
    path, _, leaf = name.rpartition(".")
    block, module = _split(path)
    if module in _HAS_NO_PLACE[layout.name]:
        raise LookupError(f"{name}: the layout {layout.name} has no place for it")
    if layout.name == "diffusers":
        block = block and f"{_BLOCKS[block.split('.')[0]]}.{block.split('.')[1]}."
        leaf = "weight" if leaf == "scale" else leaf
    place = _PLACES[layout.name].get(module, module)
    sections = _sections(module, widths)
    if not sections:
        assert isinstance(place, str), f"{module} has no sections"
        return (Piece(f"{block}{place}.{leaf}"),)
    if isinstance(place, str):
        place = {place: tuple(range(len(sections)))}
    by_section: dict[int, Piece] = {}
    for file_module, held in place.items():
        first = 0
        for number in held:
            rows, has_rotary = sections[number]
            head = widths.head if has_rotary and layout.rotary == "half-split" else 0
            by_section[number] = Piece(f"{block}{file_module}.{leaf}", first, rows, head)
            first += rows
    return _joined([by_section[number] for number in range(len(sections))])


def _split(path: str) -> tuple[str, str]:
    """("double_blocks.3.", "img_mod.lin"), or ("", "img_in")."""
    match = _INDEX.match(path)
    return ("", path) if match is None else (match[0], path[match.end() :])


def _sections(module: str, widths: Widths) -> list[tuple[int, bool]]:
    """(rows, whether rotary acts on them) of each part that has a place of its own somewhere."""
    qkv = [(widths.width, True), (widths.width, True), (widths.width, False)]
    if module.endswith("attn.qkv"):
        return qkv
    if module == "linear1":
        return [*qkv, (widths.mlp, False)]
    if module.endswith(("query_norm", "key_norm")):
        return [(widths.head, True)]
    if module == "final_layer.adaLN_modulation.1":
        return [(widths.width, False), (widths.width, False)]
    return []


def _joined(parts: list[Piece]) -> tuple[Piece, ...]:
    joined = parts[:1]
    for part in parts[1:]:
        last = joined[-1]
        assert last.rows is not None, f"{last.key}: a part without end has a neighbour"
        assert part.rows is not None, f"{part.key}: a part without end has a neighbour"
        if (last.key, last.head, last.first + last.rows) == (part.key, part.head, part.first):
            joined[-1] = replace(last, rows=last.rows + part.rows)
        else:
            joined.append(part)
    return tuple(joined)


def interleaved(rows: Tensor, head: int) -> Tensor:
    """Rows of whole heads from half-split into interleaved order; `half_split` undoes it."""
    return rearrange(rows, "(a two p) ... -> (a p two) ...", two=2, p=head // 2)


def half_split(rows: Tensor, head: int) -> Tensor:
    """Rows of whole heads from interleaved into half-split order."""
    return rearrange(rows, "(a p two) ... -> (a two p) ...", two=2, p=head // 2)


def implied_widths(name: LayoutName, shapes: Mapping[str, tuple[int, ...]]) -> Widths:
    """The widths of the DiT that a file's shapes are of; LookupError where they do not tell."""
    width = _first(shapes, _SIGNS[name], dims=2)[1]
    head = _first(shapes, re.compile(r".*(query_norm\.scale|\.norm_q\.weight)"), dims=1)[0]
    if not any(_SINGLE_PROJECTION[name][0].fullmatch(key) for key in shapes):
        return Widths(width, head, 0)
    last, num_others = _SINGLE_PROJECTION[name]
    return Widths(width, head, _first(shapes, last, dims=2)[0] - num_others * width)


def _first(
    shapes: Mapping[str, tuple[int, ...]], pattern: re.Pattern[str], dims: int
) -> tuple[int, ...]:
    for key, shape in shapes.items():
        if pattern.fullmatch(key) and len(shape) == dims:
            return shape
    raise LookupError(f"no key fits {pattern.pattern}, which would tell the width of the model")
