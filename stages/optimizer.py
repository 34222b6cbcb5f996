"""The optimizer and the average of its path, with every duration in samples seen."""

from pydantic import Field, model_validator

from models.record import Record


class AdamW(Record):
    """AdamW with gradient clipping; linear warm-up and linear decay to zero, both in samples."""

    lr: float = Field(gt=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    warmup: int = Field(default=0, ge=0)
    decay: int = Field(default=0, ge=0)
    max_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_betas(self) -> "AdamW":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: both must lie in [0, 1); try (0.9, 0.999)")
        return self


class Muon(AdamW):
    """Muon for the matrices (weights of linear and dense convolution layers), AdamW for the rest.

    A matrix moves by the nearest orthogonal matrix to its momentum (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon), at `matrix_lr`; `lr`, `betas`, `eps` are those of AdamW.
    `weight_decay` applies to both. For networks that are trained from scratch in few updates.
    """

    matrix_lr: float = Field(gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)


class Ema(Record):
    """Exponential average of the parameters; after `halflife` samples half of the weight is newer.

    The half-life grows with progress up to its value, `rampup` times the samples seen, so that
    the random start is forgotten (EDM2, arXiv 2312.02696, section 3.1, does the same by its
    power function).
    """

    halflife: int = Field(gt=0)
    rampup: float = Field(default=0.1, gt=0, allow_inf_nan=False)


def learning_rate(optimizer: AdamW, samples: int, budget: int) -> float:
    """Learning rate of the update that brings the count of samples seen to `samples`."""
    warm = min(1.0, samples / optimizer.warmup) if optimizer.warmup else 1.0
    cool = min(1.0, (budget - samples) / optimizer.decay) if optimizer.decay else 1.0
    # The last update would have rate 0 and be wasted: keep a hundredth of the peak.
    return optimizer.lr * warm * max(cool, 0.01)


def ema_beta(ema: Ema, samples: int, batch: int) -> float:
    """Weight of the old average in the update that makes it `samples` samples seen."""
    halflife = min(float(ema.halflife), ema.rampup * samples)
    return float(0.5 ** (batch / max(halflife, 1e-8)))
