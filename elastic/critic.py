"""The discriminator of an autoencoder stage: it judges, and is trained in the same updates.

It is small, so every rank holds it whole. It starts from equal values everywhere and is moved by
equal gradients, and so stays the same on every rank.
"""

import torch
from torch import Tensor
from torch.func import functional_call

from elastic.data.order import updates_before
from elastic.exact import InOrder
from elastic.world import World
from models.discriminator import critic_loss_B, deception_loss_B
from models.fresh import fresh_parameters, named_generator
from stages.adversarial import Adversarial
from stages.stage import AutoencoderStage


class Critic:
    """A discriminator with fresh parameters from (seed, stage, name), and its optimizer."""

    def __init__(
        self, stage: AutoencoderStage, settings: Adversarial, device: torch.device
    ) -> None:
        self._stage = stage
        self._settings = settings
        self._module = settings.build().to(device)
        self._parameters = dict(self._module.named_parameters())
        self._sum = InOrder() if stage.exact else None  # else ranks add up once an update

        def generator(name: str) -> torch.Generator:
            return named_generator("critic", stage.seed, stage.name, name)

        with torch.no_grad():
            for name, value in fresh_parameters(self._module, generator):
                self._parameters[name].copy_(value)
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=0.0,
            fused=True,
        )
        for parameter in self._parameters.values():
            # Made here, as the names in a checkpoint do not depend on whether it has begun.
            self._optimizer.state[parameter] = {
                "exp_avg": torch.zeros_like(parameter.detach()),
                "exp_avg_sq": torch.zeros_like(parameter.detach()),
                "step": torch.zeros((), dtype=torch.float32, device=device),
            }

    def judges_at(self, position: int) -> bool:
        """Whether the update at this position is judged."""
        return position >= self._settings.start

    def deception_B(self, decoded_BCTHW: Tensor) -> Tensor:
        """What the reconstruction pays, weighted; no gradient reaches the discriminator."""
        frozen = {name: parameter.detach() for name, parameter in self._parameters.items()}
        logits_B1THW = functional_call(self._module, frozen, (decoded_BCTHW,))
        return self._settings.weight * deception_loss_B(logits_B1THW)

    def loss_B(self, real_BCTHW: Tensor, decoded_BCTHW: Tensor) -> Tensor:
        """What the discriminator minimises; no gradient reaches the reconstruction."""
        return critic_loss_B(self._module(real_BCTHW), self._module(decoded_BCTHW.detach()))

    @torch.no_grad()
    def end_round(self, position: int, world: World) -> None:
        """Called by every rank after each backward pass of an update."""
        if self._sum is not None and self.judges_at(position):
            self._sum.add_flat(self._take_gradient(), world)

    def _take_gradient(self) -> Tensor:
        parts = [parameter.grad for parameter in self._parameters.values()]
        self._optimizer.zero_grad(set_to_none=True)
        return torch.cat([part.flatten() for part in parts if part is not None])

    @torch.no_grad()
    def clip_gradients(self, position: int, world: World) -> dict[str, Tensor]:
        """Bring the gradients of all ranks together and clip them; their norm by name.

        Every rank calls it. Before the discriminator has begun there is nothing to clip.
        """
        if not self.judges_at(position):
            return {}
        sizes = [parameter.numel() for parameter in self._parameters.values()]
        if self._sum is not None:
            flat = self._sum.take_whole(sum(sizes), world)
        else:
            flat = world.sum(self._take_gradient()).div_(world.size)  # as FSDP does
        norm = torch.linalg.vector_norm(flat, dtype=torch.float64)
        flat.mul_((self._stage.optimizer.max_norm / (norm + 1e-6)).clamp(max=1.0).float())
        for parameter, part in zip(self._parameters.values(), flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        return {"critic_grad_norm": norm}

    def step(self) -> None:
        """Move by the gradients, if there are any, and drop them."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors by name, the same ones at every position; loading into them restores."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"critic/{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"critic_{moment}/{name}"] = self._optimizer.state[parameter][moment]
        return tensors

    def restored(self, position: int) -> None:
        """Take over the position of the tensors just loaded: the count of updates follows."""
        before = min(position, self._settings.start)
        updates = updates_before(self._stage, position) - updates_before(self._stage, before)
        for moments in self._optimizer.state.values():
            moments["step"].fill_(float(updates))
