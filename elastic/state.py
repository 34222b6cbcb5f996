"""What a checkpoint holds: parameters, their average, moments, a critic, the progress."""

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from elastic.critic import Critic
from elastic.data.order import EMPTY_DIGEST, updates_before, updates_carried
from elastic.ema import EmaWeights
from elastic.muon import MuonAdamW, is_matrix
from stages.stage import Stage


@dataclass
class Progress:
    """How far a stage has come: samples seen, and the digest of their order.

    `guard` has the lowest loss of each bucket and the log points that are far above it, `unjudged`
    the sum and the samples since the last log point (elastic.spike).
    """

    stage: str
    samples: int = 0
    order_digest: str = EMPTY_DIGEST
    guard: dict[str, list[float]] = field(default_factory=dict)
    unjudged: dict[str, list[float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The fields by name, for a manifest."""
        return asdict(self)


class TrainState:
    """Everything that survives a restart, as one flat dictionary of tensors and one record."""

    def __init__(
        self,
        stage: Stage,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        ema: EmaWeights,
        progress: Progress,
        critic: Critic | None = None,
    ) -> None:
        self.stage = stage
        self.model = model
        self.optimizer = optimizer
        self.ema = ema
        self.progress = progress
        self.critic = critic

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors by name; loading into them restores them."""
        tensors = {} if self.critic is None else self.critic.tensors()
        for name, parameter in self.model.named_parameters():
            tensors[f"model/{name}"] = parameter.detach()
            tensors[f"ema/{name}"] = self.ema.tensors[name]
            for moment, tensor in self._moments(parameter).items():
                if moment != "step":
                    tensors[f"{moment}/{name}"] = tensor
        return tensors

    def restored(self, progress: Progress) -> None:
        """Take over the progress that belongs to the tensors just loaded.

        The optimizer's count of updates is a function of the position, so it is not stored.
        """
        self.progress.samples = progress.samples
        self.progress.order_digest = progress.order_digest
        self.progress.guard = progress.guard
        self.progress.unjudged = progress.unjudged
        own = updates_before(self.stage, progress.samples)
        updates = float(updates_carried(self.stage) + own)
        for parameter in self.model.parameters():
            moments = self._moments(parameter)
            if "step" in moments:
                moments["step"].fill_(updates)
        if self.critic is not None:
            self.critic.restored(progress.samples)

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        moments = self.optimizer.state[parameter]
        if not moments:  # optimizers make them at their first step, and only if they are missing
            moments["exp_avg"] = torch.zeros_like(parameter.detach())
            if not self._moved_by_muon(parameter):
                moments["exp_avg_sq"] = torch.zeros_like(parameter.detach())
                moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return moments  # type: ignore[no-any-return]  # torch types optimizer state as Any

    def _moved_by_muon(self, parameter: Tensor) -> bool:
        return isinstance(self.optimizer, MuonAdamW) and is_matrix(parameter)
