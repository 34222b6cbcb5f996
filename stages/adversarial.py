"""The adversarial part of an autoencoder stage: from when on a discriminator judges, and how."""

import torch
from pydantic import Field, model_validator

from models.discriminator import GROUP, VideoDiscriminator, smallest_side
from models.record import Record
from stages.schedule import Phase


class Adversarial(Record):
    """From `start` samples on a video discriminator judges the reconstruction (hinge loss).

    It is trained in the same updates by an AdamW of its own, at a constant rate, with the stage's
    `max_norm`; the reconstruction pays `weight` times minus its mean logit.
    """

    start: int = Field(ge=0)
    """Samples seen in the stage: 0, or where a phase other than the last one ends."""
    weight: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    lr: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.5, 0.9)
    width: int = Field(default=64, ge=GROUP, multiple_of=GROUP)
    """Channels of the first convolution; they double with each halving, up to eight times."""
    layers: int = Field(default=3, ge=1)
    """How often T, H and W are halved."""

    @model_validator(mode="after")
    def _check_betas(self) -> "Adversarial":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: both must lie in [0, 1); try (0.5, 0.9)")
        return self

    def check(self, schedule: tuple[Phase, ...]) -> None:
        """Raise ValueError, beginning with the field, if the schedule has no such start or side."""
        starts = [0, *(phase.until for phase in schedule[:-1])]
        if self.start not in starts:
            nearest = sorted(sorted(starts, key=lambda start: abs(start - self.start))[:2])
            raise ValueError(
                f"start {self.start}: must be 0 or the until of a phase that another one follows; "
                f"nearest is {' or '.join(map(str, nearest))}, or let a phase end there"
            )
        buckets = [b for p in schedule if p.until > self.start for b in p.buckets]
        side = min(min(bucket.height, bucket.width) for bucket in buckets)
        if side < smallest_side(self.layers):
            raise ValueError(
                f"layers {self.layers}: {self.layers} halvings need sides of "
                f"{smallest_side(self.layers)} px, and the smallest is {side} px; "
                f"at most {side.bit_length() - 1}"
            )

    def build(self, device: torch.device | str = "cpu") -> VideoDiscriminator:
        """The discriminator with the library's default values; on `meta`, with no values."""
        with torch.device(device):
            return VideoDiscriminator(self.width, self.layers)
