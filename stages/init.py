"""Init policies: from which parameters a stage starts."""

from pydantic import Field

from models.record import Record


class Fresh(Record):
    """Every parameter new; optimizer, average and position at zero.

    Each parameter is a function of (seed, stage name, parameter name) on its full shape, so a
    start on 3 workers and one on 8 are the same start. This is the published configuration of
    Open-Sora 2.0's switch (configs/diffusion/train/high_compression.py, `from_pretrained=None`).
    """

    seed: int = Field(default=0, ge=0)
