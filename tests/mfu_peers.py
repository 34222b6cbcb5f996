"""The FLUX transformers of torchtitan and diffusers, set up for training as each sets itself up.

Peers of tests/bench/mfu.py: same shape, same inputs, same FSDP2 precision (fp32 kept and reduced,
bf16 computed). Only called, never copied: the packages must be importable. Build them inside a
process group; `Peer.step_loss` is one forward pass, and the rest of the loop is the caller's.
"""

# B sample, N video token, C channels of a token, L text token, D width of the text or pooled vector

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed.fsdp as fsdp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

Grid = tuple[int, int, int]
Axes = tuple[int, int, int]
TIME_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is compared: an MMDiT of the FLUX shape over tokens that need no patching."""

    width: int
    heads: int
    depth: int
    depth_single: int
    channels: int
    text_width: int
    pooled_width: int

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def axes(self) -> Axes:
        """Rotary channels of a head along T, H and W: 16:56:56 of 128."""
        spatial = self.head_width // 2 * 7 // 16 * 2
        return self.head_width - 2 * spatial, spatial, spatial


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a peer is to train."""

    device: torch.device
    compiled: bool
    recompute: Literal["none", "full"]
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A sharded model with random parameters; `predict` takes (tokens, t, text, pooled, grid)."""

    name: str
    version: str
    module: nn.Module
    predict: Callable[[Tensor, Tensor, Tensor, Tensor, Grid], Tensor]

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the optimizer steps: fp32 DTensors."""
        return self.module.parameters()

    def step_loss(
        self,
        tokens_BNC: Tensor,
        t_B: Tensor,
        text_BLD: Tensor,
        pooled_BD: Tensor,
        target_BNC: Tensor,
        grid: Grid,
    ) -> Tensor:
        """Mean squared error of a forward pass over the tokens of `grid` (T, H, W), t in [0, 1]."""
        out_BNC = self.predict(tokens_BNC, t_B, text_BLD, pooled_BD, grid)
        return functional.mse_loss(out_BNC.float(), target_BNC.float())


def torchtitan(shape: Shape, setup: Setup) -> Peer:
    """torchtitan's `FluxModel`, after its own apply_ac, apply_compile and apply_fsdp in turn."""
    parallelize = _torchtitan("parallelize")
    with torch.device("meta"):
        model = _titan_config(shape).build()
    if setup.recompute == "full":
        parallelize.apply_ac(model)
    if setup.compiled:
        configs = importlib.import_module("torchtitan.config")
        parallelize.apply_compile(model, configs.CompileConfig(enable=True))
    parallelize.apply_fsdp(model, _mesh(setup), torch.bfloat16, torch.float32)
    _materialise(model, setup)

    def predict(
        tokens_BNC: Tensor, t_B: Tensor, text_BLD: Tensor, pooled_BD: Tensor, grid: Grid
    ) -> Tensor:
        batch, length = text_BLD.shape[0], text_BLD.shape[1]
        out_BNC: Tensor = model(
            img=tokens_BNC,
            img_ids=_places(grid, tokens_BNC.device).expand(batch, -1, -1),
            txt=text_BLD,
            txt_ids=_nowhere(length, text_BLD.device).expand(batch, -1, -1),
            timesteps=t_B,
            y=pooled_BD,
        )
        return out_BNC

    version = importlib.metadata.version("torchtitan")
    return Peer(name="torchtitan", version=version, module=model, predict=predict)


def diffusers(shape: Shape, setup: Setup) -> Peer:
    """diffusers' `FluxTransformer2DModel`, by its own switches and with its default attention."""
    flux = _peer_module("diffusers.models.transformers.transformer_flux", "diffusers")
    with torch.device("meta"):
        model = flux.FluxTransformer2DModel(
            patch_size=1,
            in_channels=shape.channels,
            num_layers=shape.depth,
            num_single_layers=shape.depth_single,
            attention_head_dim=shape.head_width,
            num_attention_heads=shape.heads,
            joint_attention_dim=shape.text_width,
            pooled_projection_dim=shape.pooled_width,
            axes_dims_rope=shape.axes,
        )
    model.train()
    if setup.recompute == "full":
        model.enable_gradient_checkpointing()
    if setup.compiled:
        model.compile_repeated_blocks(fullgraph=True)
    _shard(model, (*model.transformer_blocks, *model.single_transformer_blocks), _mesh(setup))
    _materialise(model, setup)

    def predict(
        tokens_BNC: Tensor, t_B: Tensor, text_BLD: Tensor, pooled_BD: Tensor, grid: Grid
    ) -> Tensor:
        out_BNC: Tensor = model(
            hidden_states=tokens_BNC,
            encoder_hidden_states=text_BLD,
            pooled_projections=pooled_BD,
            timestep=t_B,
            img_ids=_places(grid, tokens_BNC.device),
            txt_ids=_nowhere(text_BLD.shape[1], text_BLD.device),
            return_dict=False,
        )[0]
        return out_BNC

    version = importlib.metadata.version("diffusers")
    return Peer(name="diffusers", version=version, module=model, predict=predict)


PEERS: dict[str, Callable[[Shape, Setup], Peer]] = {
    "torchtitan": torchtitan,
    "diffusers": diffusers,
}


def _titan_config(shape: Shape) -> Any:  # Any: torchtitan is no dependency, so mypy cannot see it
    model, layers = _torchtitan("model.model"), _torchtitan("model.layers")
    embedder = _torchtitan("model.hf_embedder").FluxEmbedder.Config(version="")  # never built
    linear = importlib.import_module("torchtitan.models.common.linear").Linear.Config
    norm = importlib.import_module("torchtitan.models.common.nn_modules").RMSNorm.Config
    width, heads, hidden = shape.width, shape.heads, 4 * shape.width

    def line(width_in: int, width_out: int) -> Any:  # Any: as above
        return linear(in_features=width_in, out_features=width_out, bias=True)

    def two_lines(width_in: int) -> Any:  # Any: as above
        return layers.MLPEmbedder.Config(
            in_layer=line(width_in, width),
            out_layer=line(width, width),
            in_dim=width_in,
            hidden_dim=width,
        )

    def modulation(double: bool) -> Any:  # Any: as above
        return layers.Modulation.Config(
            lin=line(width, (6 if double else 3) * width), double=double
        )

    head_norm = norm(normalized_shape=shape.head_width)
    qk_norm = layers.QKNorm.Config(query_norm=head_norm, key_norm=head_norm)
    attention = layers.SelfAttention.Config(
        qkv=line(width, 3 * width),
        proj=line(width, width),
        norm=qk_norm,
        num_heads=heads,
        qkv_bias=True,
    )
    double_block = layers.DoubleStreamBlock.Config(
        hidden_size=width,
        num_heads=heads,
        img_mod=modulation(double=True),
        txt_mod=modulation(double=True),
        img_attn=attention,
        txt_attn=attention,
        img_mlp_in=line(width, hidden),
        img_mlp_out=line(hidden, width),
        txt_mlp_in=line(width, hidden),
        txt_mlp_out=line(hidden, width),
        qkv_bias=True,
    )
    single_block = layers.SingleStreamBlock.Config(
        hidden_size=width,
        num_heads=heads,
        linear1=line(width, 3 * width + hidden),
        linear2=line(width + hidden, width),
        modulation=modulation(double=False),
        norm=qk_norm,
    )
    return model.FluxModel.Config(
        img_in=line(shape.channels, width),
        txt_in=line(shape.text_width, width),
        in_channels=shape.channels,
        out_channels=shape.channels,
        vec_in_dim=shape.pooled_width,
        context_in_dim=shape.text_width,
        hidden_size=width,
        num_heads=heads,
        depth=shape.depth,
        depth_single_blocks=shape.depth_single,
        axes_dim=shape.axes,
        clip_encoder=embedder,
        t5_encoder=embedder,
        pe_config=layers.EmbedND.Config(dim=shape.head_width, theta=10_000, axes_dim=shape.axes),
        time_in_config=two_lines(TIME_WIDTH),
        vector_in_config=two_lines(shape.pooled_width),
        final_layer_config=layers.LastLayer.Config(
            linear=line(width, shape.channels),
            adaln_linear=line(width, 2 * width),
            hidden_size=width,
            patch_size=1,
            out_channels=shape.channels,
        ),
        double_blocks=[double_block] * shape.depth,
        single_blocks=[single_block] * shape.depth_single,
    )


def _torchtitan(name: str) -> ModuleType:
    """A module of torchtitan's FLUX folder, without what its package file imports for data.

    That file (`torchtitan.models.flux`) asks for datasets, torchdata, wandb and more, none of which
    the model uses; an empty package with the same path stands in for it.
    """
    package = "torchtitan.models.flux"
    if package not in sys.modules:
        spec = importlib.util.find_spec("torchtitan")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(_missing("torchtitan"))
        version = importlib.metadata.version("torchtitan")
        if not version.startswith("0.3."):
            # 0.2.2 is another API, compiles no FLUX block, and attends causally.
            raise ImportError(
                f"torchtitan {version}: the bench calls the API of 0.3; install 0.3.0"
            )
        bare = ModuleType(package)
        bare.__path__ = [f"{place}/models/flux" for place in spec.submodule_search_locations]
        sys.modules[package] = bare
    # Newer than torch 2.11. torchtitan names it in annotations; one mesh axis never makes one.
    vars(fsdp).setdefault("DataParallelMeshDims", type("DataParallelMeshDims", (), {}))
    return _peer_module(f"{package}.{name}", "torchtitan")


def _peer_module(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{_missing(package)} ({error})") from error


def _missing(package: str) -> str:
    return f"{package} cannot be imported: install it and what it needs, or leave this peer out"


def _mesh(setup: Setup) -> DeviceMesh:
    world = torch.distributed.get_world_size()
    return init_device_mesh(setup.device.type, (world,), mesh_dim_names=("fsdp",))


def _shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # The root casts what is computed with. A block would cast only its rotary tables, and in torch
    # 2.11 not when it runs again under a checkpoint, which then finds other tensors than it saved.
    uncast = replace(policy, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=uncast)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _materialise(model: nn.Module, setup: Setup) -> None:
    """Give the sharded meta parameters memory and values: ones for norms, else normal, std 0.02."""
    left = [name for name, _ in model.named_buffers()]
    assert not left, f"buffers {left} would stay empty"
    model.to_empty(device=setup.device)
    generator = torch.Generator(setup.device).manual_seed(setup.seed)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.RMSNorm) for p in m.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if id(parameter) in norms:
                local.fill_(1.0)
            else:
                local.normal_(std=0.02, generator=generator)


@functools.cache
def _places(grid: Grid, device: torch.device) -> Tensor:
    """Position along T, H and W of every video token, (N, 3), on the device once and for all."""
    axes = [torch.arange(side, dtype=torch.float32, device=device) for side in grid]
    return torch.cartesian_prod(*axes)


@functools.cache
def _nowhere(length: int, device: torch.device) -> Tensor:
    """Position zero of every text token, (L, 3)."""
    return torch.zeros(length, 3, device=device)
