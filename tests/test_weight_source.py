"""Weight files: every rank reads its own rows; wrong files are named before anything changes."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from worlds import run_world

from elastic import shard as sharding
from elastic import weight_source
from elastic.convert import in_layout, write_spans
from elastic.ema import local
from elastic.errors import InputError
from elastic.shard import own_slices, shard
from elastic.weight_source import fill, open_weights, own_weights
from elastic.world import World
from models.dit import DiT
from models.layouts import Widths, layout_of

SHAPE = DiT(depth=1, depth_single=1, width=24, heads=3, patch=2)
Tensors = dict[str, Tensor]


def whole() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    names = SHAPE.build(4, 12, 10, device="meta").state_dict()
    return {name: torch.randn(meta.shape, generator=generator) for name, meta in names.items()}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """A small DiT in Open-Sora's layout."""
    folder = tmp_path_factory.mktemp("whole")
    save_file(whole(), folder / "own.safetensors")
    source = own_weights(folder / "own.safetensors")
    spans = in_layout(source, layout_of("open-sora"), Widths.of(SHAPE))
    write_spans(source, spans, torch.float32, folder / "out.safetensors", {})
    return load_file(folder / "out.safetensors")


def in_shards(folder: Path, tensors: Tensors, index: dict[str, str] | None) -> Path:
    """Every second tensor in another file, with an index if there is one to write."""
    names = sorted(tensors)
    for number in range(2):
        part = {name: tensors[name] for name in names[number::2]}
        save_file(part, folder / f"model-{number}.safetensors")
    if index is not None:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    return folder


def right_index(tensors: Tensors) -> dict[str, str]:
    names = sorted(tensors)
    return {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}


def _wrongly_filled(world: World, path: str, at_once: int) -> list[str]:
    """Parameters that are not the whole when all ranks have filled them, or were read twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "SMALLEST_GROUP", 1)
        patch.setattr(weight_source, "CHUNK", at_once)
        return _wrong(world, path)


def _wrong(world: World, path: str) -> list[str]:
    model = shard(SHAPE.build(4, 12, 10, device="meta"), world)
    source = open_weights(Path(path), SHAPE)
    asked: list[tuple[str, int, int]] = []
    rows = source.rows

    def watched(name: str, first: int, last: int) -> Tensor:
        asked.append((name, first, last))
        return rows(name, first, last)

    source.rows = watched  # type: ignore[method-assign]
    expected, wrong = whole(), []
    assert source.shapes.keys() == expected.keys()
    for name, parameter in model.named_parameters():
        local(parameter.detach()).fill_(torch.nan)
        asked.clear()
        fill(parameter, source, name)
        own = own_slices(parameter)[0]
        read = sum(last - first for _, first, last in asked)
        filled = parameter.detach().full_tensor()  # type: ignore[attr-defined]  # a DTensor
        if read != own.stop - own.start or not torch.equal(filled, expected[name]):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(("size", "at_once"), [(1, 100), (2, 1 << 30), (3, 100)])
def test_every_rank_reads_its_rows_and_together_they_are_the_whole(
    size: int, at_once: int, tensors: Tensors, tmp_path: Path
) -> None:
    folder = in_shards(tmp_path, tensors, right_index(tensors))
    assert run_world(_wrongly_filled, size, str(folder), at_once) == [[]] * size


@pytest.mark.parametrize("has_index", [True, False])
def test_a_folder_of_shards_is_one_source(
    has_index: bool, tensors: Tensors, tmp_path: Path
) -> None:
    folder = in_shards(tmp_path, tensors, right_index(tensors) if has_index else None)
    source = open_weights(folder, SHAPE)
    expected = whole()
    assert source.shapes == {name: tuple(value.shape) for name, value in expected.items()}
    for name, value in expected.items():
        assert torch.equal(source.rows(name, 0, value.shape[0]), value)


def test_what_was_converted_and_where_from_can_be_said(tensors: Tensors, tmp_path: Path) -> None:
    extra = {"vae.scale": torch.zeros(1), "ids": torch.zeros(2, dtype=torch.int64)}
    path = tmp_path / "open.safetensors"
    save_file(tensors | extra, path)
    source = open_weights(path, None)
    assert list(source.leftover) == ["ids", "vae.scale"]
    assert source.is_converted("single_blocks.0.linear1.weight")
    assert source.is_converted("double_blocks.0.img_attn.norm.key_norm.scale")
    assert not source.is_converted("final_layer.linear.weight")
    said = source.source_of("double_blocks.0.txt_attn.qkv.bias")
    assert said.startswith("open.safetensors: double_blocks.0.txt_attn.q_proj.bias, ")
    assert said.endswith("(half-split rotary)")
    assert source.source_of("img_in.bias") == "open.safetensors: img_in.bias"


def test_leftover_keys_keep_the_prefix_that_the_file_has(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "wrapped.safetensors"
    more = tensors | {"extra": torch.zeros(1)}
    save_file({f"module.{name}": value for name, value in more.items()}, path)
    source = open_weights(path, SHAPE)
    assert list(source.leftover) == ["module.extra"]
    assert set(source.shapes) == set(whole())


def test_a_finished_autoencoder_is_read_under_its_own_names(tmp_path: Path) -> None:
    path = tmp_path / "codec.safetensors"
    save_file({"encoder.conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2)}, path)
    source = own_weights(path)
    assert torch.equal(source.rows("encoder.conv.weight", 1, 2).flatten(), torch.arange(12.0, 24.0))
    with pytest.raises(InputError, match=r"none of its 1 keys .* encoder.conv.weight"):
        open_weights(path, None)


def test_an_image_sized_parameter_of_another_codec_keeps_the_shape_of_the_file(
    tensors: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "open.safetensors"
    save_file(tensors, path)
    source = open_weights(path, SHAPE.replace(patch=1))
    assert source.shapes["img_in.weight"] == (24, 16)
    parameter = torch.full((24, 4), 7.0)
    with pytest.raises(InputError, match=r"img_in.weight: shape \(24, 16\).*\(24, 4\)"):
        fill(parameter, source, "img_in.weight")
    assert torch.equal(parameter, torch.full((24, 4), 7.0))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _truncated_data(folder: Path, tensors: Tensors) -> Path:
    (folder / "a.safetensors").write_bytes(save(tensors)[:-100])
    return folder / "a.safetensors"


def _truncated_header(folder: Path, tensors: Tensors) -> Path:
    (folder / "a.safetensors").write_bytes(save(tensors)[:500])
    return folder / "a.safetensors"


def _empty(folder: Path, tensors: Tensors) -> Path:
    (folder / "a.safetensors").write_bytes(b"")
    return folder / "a.safetensors"


def _lfs_pointer(folder: Path, tensors: Tensors) -> Path:
    (folder / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    return folder / "a.safetensors"


def _nested_header(folder: Path, tensors: Tensors) -> Path:
    return _with_header(folder, "[" * 100_000)


def _one_of_many(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, folder / "m-00001-of-00002.safetensors")
    return folder


def _longer(folder: Path, tensors: Tensors) -> Path:
    (folder / "a.safetensors").write_bytes(save(tensors) + b"more")
    return folder / "a.safetensors"


def _with_header(folder: Path, header: str, data: int = 8) -> Path:
    text = header.encode()
    (folder / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * data)
    return folder / "a.safetensors"


def _corrupt_header(folder: Path, tensors: Tensors) -> Path:
    return _with_header(folder, '{"a": {"dtype": "F32", "shape": [2}')


def _key_twice_in_a_header(folder: Path, tensors: Tensors) -> Path:
    one = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    return _with_header(folder, f"{{{one},{one}}}")


def _wrong_size(folder: Path, tensors: Tensors) -> Path:
    return _with_header(folder, '{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}')


def _shared_bytes(folder: Path, tensors: Tensors) -> Path:
    one = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    return _with_header(folder, f'{{"a":{one},"b":{one}}}')


def _missing_shard(folder: Path, tensors: Tensors) -> Path:
    in_shards(folder, tensors, right_index(tensors))
    (folder / "model-1.safetensors").unlink()
    return folder


def _broken_promise(folder: Path, tensors: Tensors) -> Path:
    return in_shards(folder, tensors, right_index(tensors) | {"lost.weight": "model-1.safetensors"})


def _shard_elsewhere(folder: Path, tensors: Tensors) -> Path:
    return in_shards(folder, tensors, right_index(tensors) | {"img_in.bias": "../x.safetensors"})


def _damaged_index(folder: Path, tensors: Tensors) -> Path:
    in_shards(folder, tensors, None)
    (folder / "model.safetensors.index.json").write_text("[]")
    return folder


def _two_indices(folder: Path, tensors: Tensors) -> Path:
    in_shards(folder, tensors, right_index(tensors))
    (folder / "a.safetensors.index.json").write_text("{}")
    return folder


def _key_twice(folder: Path, tensors: Tensors) -> Path:
    in_shards(folder, tensors, None)
    save_file({"img_in.bias": torch.zeros(24)}, folder / "old.safetensors")
    return folder


def _without_k(folder: Path, tensors: Tensors) -> Path:
    kept = {n: v for n, v in tensors.items() if n != "single_blocks.0.k_proj.weight"}
    save_file(kept, folder / "a.safetensors")
    return folder / "a.safetensors"


def _narrow_k(folder: Path, tensors: Tensors) -> Path:
    name = "single_blocks.0.k_proj.weight"
    save_file(tensors | {name: torch.zeros(24, 8)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def _short_k(folder: Path, tensors: Tensors) -> Path:
    name = "single_blocks.0.k_proj.weight"
    save_file(tensors | {name: torch.zeros(16, 24)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def _fp8(folder: Path, tensors: Tensors) -> Path:
    name = "img_in.weight"
    changed = tensors | {name: tensors[name].to(torch.float8_e4m3fn)}
    save_file(changed, folder / "a.safetensors")
    return folder / "a.safetensors"


def _pickled(folder: Path, tensors: Tensors) -> Path:
    torch.save(tensors, folder / "model.pt")
    return folder / "model.pt"


def _pickle_called_safetensors(folder: Path, tensors: Tensors) -> Path:
    torch.save(tensors, folder / "a.safetensors")
    return folder / "a.safetensors"


def _old_pickle_called_safetensors(folder: Path, tensors: Tensors) -> Path:
    (folder / "a.safetensors").write_bytes(pickle.dumps({"a": 1}))
    return folder / "a.safetensors"


def _folder_of_pickles(folder: Path, tensors: Tensors) -> Path:
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def _nothing(folder: Path, tensors: Tensors) -> Path:
    return folder / "gone.safetensors"


def _no_weights(folder: Path, tensors: Tensors) -> Path:
    (folder / "README.md").write_text("")
    return folder


WRONG: list[tuple[Callable[[Path, Tensors], Path], str]] = [
    (_nothing, r"gone.safetensors: no such file"),
    (_no_weights, r"holds no .safetensors file"),
    (_truncated_data, r"a.safetensors: cut off: it has [\d,]+ bytes, its header says [\d,]+"),
    (_longer, r"a.safetensors: too long"),
    (_truncated_header, r"a.safetensors: its header is damaged"),
    (_empty, r"a.safetensors: empty"),
    (_lfs_pointer, r"a.safetensors: a Git LFS pointer"),
    (_nested_header, r"a.safetensors: its header is damaged"),
    (_one_of_many, r"m-00001-of-00002.safetensors: one of 2 shards, and m-00002-of-00002"),
    (_corrupt_header, r"a.safetensors: its header is damaged"),
    (_key_twice_in_a_header, r"'a' is there twice"),
    (_wrong_size, r"'a' is F32 \(3,\) in 8 bytes"),
    (_shared_bytes, r"leave out or share bytes at 0"),
    (_missing_shard, r"index.json names model-1.safetensors, which is not there"),
    (_broken_promise, r"lost.weight is in model-1.safetensors, where it is not"),
    (_shard_elsewhere, r"names '../x.safetensors'; a shard lies beside its index"),
    (_damaged_index, r"index.json: cannot be read"),
    (_two_indices, r"2 indices, a.safetensors.index.json and model.safetensors.index.json"),
    (_key_twice, r"img_in.bias is in model-\d.safetensors and in old.safetensors"),
    (_without_k, r"has single_blocks.0.q_proj.weight but not single_blocks.0.k_proj.weight"),
    (_narrow_k, r"k_proj.weight \(24, 8\), .* differ in width"),
    (_short_k, r"k_proj.weight has 16 rows, a model of this shape 24"),
    (_fp8, r"img_in.weight is F8_E4M3; read are F32, BF16, F16"),
    (_pickled, r"model.pt: a pickle.*not read; convert it: python -c .*weights_only=True"),
    (_pickle_called_safetensors, r"a.safetensors: a pickle"),
    (_old_pickle_called_safetensors, r"a.safetensors: a pickle"),
    (_folder_of_pickles, r"pytorch_model.bin: a pickle"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[make.__name__ for make, _ in WRONG])
def test_a_wrong_file_is_named_before_a_value_is_read(
    make: Callable[[Path, Tensors], Path],
    message: str,
    tensors: Tensors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("values were read")

    monkeypatch.setattr(weight_source, "read_rows", refuse)
    path = make(tmp_path, tensors)
    before = files_of(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        open_weights(path, SHAPE)
    assert "\n" not in str(raised.value)
    assert files_of(tmp_path) == before


def test_another_layout_than_the_keys_say_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"layout 'bfl', but its keys are those of 'open-sora'"):
        open_weights(tmp_path / "a.safetensors", SHAPE, "bfl")


def test_a_model_of_other_heads_is_refused_rather_than_permuted_wrongly(
    tensors: Tensors, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"norm.\w+_norm.scale has 8 rows, a model .* 12"):
        open_weights(tmp_path / "a.safetensors", SHAPE.replace(heads=2))


def test_what_is_no_parameter_is_left_over_in_a_codecs_own_file(tmp_path: Path) -> None:
    tensors = {"conv.weight": torch.ones(2, 3), "ids": torch.arange(4), "step": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "codec.safetensors")
    source = own_weights(tmp_path / "codec.safetensors")
    assert list(source.shapes) == ["conv.weight"]
    assert list(source.leftover) == ["ids", "step"]


def test_an_index_may_be_named_instead_of_its_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / "m-00001-of-00001.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-00001-of-00001.safetensors"}}))
    assert open_weights(index, None, "own").shapes == {"a": (2, 3)}


def test_files_that_differ_have_another_identity(tmp_path: Path) -> None:
    for name, rows in (("a", 2), ("b", 3)):
        save_file({"x": torch.ones(rows, 3)}, tmp_path / f"{name}.safetensors")
    a, b = (own_weights(tmp_path / f"{name}.safetensors") for name in "ab")
    assert a.identity() == own_weights(tmp_path / "a.safetensors").identity()
    assert a.identity() != b.identity()
