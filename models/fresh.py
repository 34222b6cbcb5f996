"""Fresh parameters by name: the same start on any number of machines, one tensor at a time."""

import hashlib
import math
from collections.abc import Callable, Container, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

_FAN_IN_MODULES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_NORM_MODULES = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)


@runtime_checkable
class DrawsItsOwn(Protocol):
    """A module whose parameters follow a rule of its own."""

    def fresh(self, leaf: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The fresh fp32 CPU value of the parameter `leaf`, drawn from `generator` only."""
        ...


def named_seed(*parts: str | int) -> int:
    """A 63-bit seed from a list of names and numbers; different lists give different seeds.

    Every part goes in with its kind and length, so ("a", "b") and ("ab",), or 1 and "1", differ.
    """
    if not parts:
        raise ValueError("named_seed() got no part; a seed needs at least one name or number")
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        body = str(part).encode(errors="surrogatepass")
        kind = b"s" if isinstance(part, str) else b"i"
        digest.update(kind + len(body).to_bytes(8, "big") + body)
    return int.from_bytes(digest.digest(), "big") >> 1


def named_generator(*parts: str | int) -> torch.Generator:
    """A CPU generator that starts at `named_seed(*parts)`."""
    return torch.Generator().manual_seed(named_seed(*parts))


def fresh_tensor(
    module: nn.Module, leaf: str, shape: torch.Size, generator: torch.Generator
) -> Tensor:
    """A fresh fp32 CPU value for parameter `leaf` of `module`; LookupError where no rule covers it.

    Linear and convolution: PyTorch's default, uniform within 1/sqrt(fan in) for weight and bias;
    norms: ones and zeros; embeddings: unit normal; `zero_init = True` on the module: zeros; a
    method `fresh` on the module comes before all of these.
    """
    if isinstance(module, DrawsItsOwn):
        return module.fresh(leaf, shape, generator)
    if getattr(module, "zero_init", False):
        return torch.zeros(shape)
    if isinstance(module, _FAN_IN_MODULES) and leaf in ("weight", "bias"):
        bound = 1 / math.sqrt(module.weight.shape[1:].numel())
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if isinstance(module, _NORM_MODULES) and leaf in ("weight", "bias"):
        return torch.ones(shape) if leaf == "weight" else torch.zeros(shape)
    if isinstance(module, nn.Embedding) and leaf == "weight":
        return _embedding(module, shape, generator)
    raise LookupError(
        f"parameter {leaf!r} of a {type(module).__name__}: no rule says how it starts; give the "
        f"class a method fresh(leaf, shape, generator) or set zero_init = True"
    )


def fresh_parameters(
    model: nn.Module,
    generator_for: Callable[[str], torch.Generator],
    only: Container[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(Full name, full fp32 CPU value) of every parameter, or of `only` these, one at a time.

    The model only lends names and shapes, so it may be on meta or sharded (DTensors report their
    full shape); a parameter shared by two modules comes once, under its first name. Buffers are
    not covered: a model that is started with `to_empty` must compute its tables in forward.
    """
    done: set[int] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            name = f"{prefix}.{leaf}" if prefix else leaf
            if only is not None and name not in only:
                continue
            yield name, _drawn(module, name, parameter.shape, generator_for(name))


def _drawn(module: nn.Module, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    leaf = name.rpartition(".")[2]
    try:
        value = fresh_tensor(module, leaf, shape, generator)
    except LookupError as error:
        raise LookupError(f"{name}: {error}") from error
    if value.shape != shape or value.dtype != torch.float32 or value.device.type != "cpu":
        raise ValueError(
            f"{name}: {type(module).__name__}.fresh returned {tuple(value.shape)} {value.dtype} on "
            f"{value.device}; the rule is {tuple(shape)} torch.float32 on cpu"
        )
    return value


def _embedding(module: nn.Embedding, shape: torch.Size, generator: torch.Generator) -> Tensor:
    rows = torch.empty(shape).normal_(generator=generator)
    if module.padding_idx is not None:
        rows[module.padding_idx] = 0
    return rows
