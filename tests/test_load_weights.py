"""Weight files: whole, of the right keys and shapes, or one clear error and nothing loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elastic.errors import InputError
from elastic.weights import load_weights
from models import LTXVAE


class _Model(nn.Module):
    """Two layers and a kept buffer; a second buffer that is no part of any file."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def _values() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn_like(value) for name, value in _Model().state_dict().items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(_values(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def _refused(path: Path, match: str) -> None:
    model = _Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=match):
        load_weights(model, path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was loaded"


def test_parameters_and_buffers_are_loaded(path: Path) -> None:
    model = _Model()
    assert load_weights(model, path) is model
    for name, value in _values().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_half_precision_is_widened(path: Path) -> None:
    save_file({name: value.bfloat16() for name, value in _values().items()}, path)
    loaded = load_weights(_Model(), path).state_dict()
    for name, value in _values().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], value.bfloat16().float())


def test_every_wrong_key_and_shape_is_named_and_nothing_is_loaded(path: Path) -> None:
    values = _values()
    save_file({name: values[name] for name in values if name != "back.bias"}, path)
    _refused(path, r"weights.safetensors: .* _Model: missing 'back.bias', not in the model none")
    save_file({**values, "ema": torch.zeros(1), "table": torch.zeros(3)}, path)
    _refused(path, "missing none, not in the model 'ema', 'table'")
    save_file({f"vae.{name}": value for name, value in values.items()}, path)
    _refused(path, r"missing 'back.bias', 'back.weight', 'mean' and 2 more, not in the model 'vae")
    save_file({**values, "wide.weight": torch.zeros(4, 5), "mean": torch.zeros(3)}, path)
    _refused(
        path, r"'\w+.*' is \(.*\) in the file and \(.*\) in the model, 2 of 5 differ; the file"
    )


@pytest.mark.parametrize("kept", [0, 3, 20, 150, -1])
def test_a_file_that_is_cut_off_is_named(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    _refused(path, r"weights.safetensors: (empty|cut off|its header is damaged or it is no)")


@pytest.mark.parametrize("name", ["model.pth", "model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_is_never_read(tmp_path: Path, name: str, is_zip: bool) -> None:
    torch.save(_values(), tmp_path / name, _use_new_zipfile_serialization=is_zip)
    _refused(tmp_path / name, f"{name}: a pickle, which can run any program .* convert it")


def test_other_files_and_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>not found</html>")
    _refused(tmp_path / "page.safetensors", "it is no safetensors file .* get it again")
    _refused(tmp_path / "gone.safetensors", "gone.safetensors: cannot be read .No such file")
    _refused(tmp_path, "cannot be read .Is a directory")


def test_a_published_file_with_its_statistics_as_buffers_is_loaded(tmp_path: Path) -> None:
    codec = LTXVAE(
        channels=8,
        widths=(8, 8, 8, 8),
        layers=(1, 1, 1, 1, 1),
        weights=str(tmp_path / "ltx.safetensors"),
    )
    values = {**codec.build().state_dict(), "latents_std": torch.full((8,), 3.0)}
    save_file(values, tmp_path / "ltx.safetensors")
    module = load_weights(codec.build(), tmp_path / "ltx.safetensors")
    assert module.get_buffer("latents_std").tolist() == [3.0] * 8
    assert load_file(tmp_path / "ltx.safetensors").keys() == module.state_dict().keys()
