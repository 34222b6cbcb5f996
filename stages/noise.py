"""How much noise a DiT is trained with."""

import difflib
import math
from typing import Literal, Self

from pydantic import field_validator, model_validator

from models.flow import Times, time_shift
from models.record import Record


class Noise(Record):
    """How times are drawn, from 0 (data) to 1 (noise); the default is Open-Sora 2.0's.

    SD3 (arXiv 2403.03206) found the logit-normal distribution, the sigmoid of a normal one, best
    of those it tried (section 3.1). It leaves out both ends, so a share may be uniform.
    """

    mean: float = 0.0
    """Of the logit: above 0 there is more noise, below 0 less."""
    std: float = 1.0
    """Of the logit: more brings both ends of the path, less its middle."""
    shift: Literal["tokens"] | float = "tokens"
    """The factor of the odds of noise, in training and in samples (section 5.3.2 of SD3).

    "tokens" lets it grow with the tokens of a frame and the latent frames of each bucket.
    """
    uniform: float = 0.0
    """Share of samples whose time is uniform instead, before the shift."""

    @field_validator("shift", mode="before")
    @classmethod
    def _check_shift(cls, shift: object) -> object:
        """One message instead of one for each branch of the union."""
        if isinstance(shift, float | int) and not isinstance(shift, bool) and 0 < shift < math.inf:
            return shift
        if shift == "tokens":
            return shift
        near = difflib.get_close_matches(str(shift), ["tokens"])
        raise ValueError(
            f"{shift!r}: write 'tokens', or the factor of the odds of noise, more than 0 (1.0 "
            "shifts nothing)" + (f"; did you mean {near[0]!r}?" if near else "")
        )

    @model_validator(mode="after")
    def _check_distribution(self) -> Self:
        if not math.isfinite(self.mean):
            raise ValueError(f"mean {self.mean}: must be a number; 0.0 is the middle of the path")
        if not 0 < self.std < math.inf:
            raise ValueError(f"std {self.std}: must be more than 0; 1.0 is the published one")
        if not 0 <= self.uniform <= 1:
            nearest = 1.0 if self.uniform > 1 else 0.0
            raise ValueError(f"uniform {self.uniform}: a share is 0 to 1; nearest is {nearest}")
        if self.uniform == 1 and (self.mean, self.std) != (0, 1):
            raise ValueError(
                f"uniform {self.uniform}: with mean {self.mean} and std {self.std}, by which no "
                "time would be drawn; leave both out, or give a share of less than 1"
            )
        return self

    def times(self, tokens_per_frame: int, latent_frames: int) -> Times:
        """How times are drawn for clips of this size."""
        alpha = self.shift
        if isinstance(alpha, str):
            alpha = time_shift(tokens_per_frame, latent_frames)
        return Times(alpha, self.mean, self.std, self.uniform)

    def text(self) -> str:
        """What `plan` says of it."""
        drawn = f"logit-normal, mean {self.mean:g}, std {self.std:g}"
        if self.uniform:
            drawn = f"{1 - self.uniform:g} {drawn}; {self.uniform:g} uniform"
        by = "by size" if isinstance(self.shift, str) else f"by {self.shift:g} in every bucket"
        return f"{drawn}; shifted {by}"
