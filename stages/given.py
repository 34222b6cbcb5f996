"""Which frames of a clip a DiT is given beside its text."""

from typing import Literal, Self

from pydantic import Field, model_validator

from models.record import Record

Choice = Literal["none", "head", "loop", "tail"]


class Given(Record):
    """Weights of giving nothing, the first frame, the first and the last, or the last frame.

    The default is Open-Sora 2.0's: one sample in eight is trained as text to video.
    """

    none: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    head: float = Field(default=5.0, ge=0, allow_inf_nan=False)
    loop: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    tail: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _something_is_given(self) -> Self:
        if not self.head + self.loop + self.tail > 0:
            raise ValueError(
                "head, loop and tail are 0, so nothing is ever given: give one of them more, or "
                "leave `given` and the model's image_condition out"
            )
        return self

    def choose(self, draw: float) -> Choice:
        """What to give for a uniform value in [0, 1)."""
        weights = {choice: weight for choice, weight in self._weights().items() if weight}
        left = draw * sum(weights.values())
        for choice, weight in weights.items():
            if left < weight:
                return choice
            left -= weight
        return choice  # a draw so near 1 that the sum's rounding decides

    def _weights(self) -> dict[Choice, float]:
        return {"none": self.none, "head": self.head, "loop": self.loop, "tail": self.tail}
