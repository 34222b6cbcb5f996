"""Where things lie in a run folder (the layout is part of what other tools rely on)."""

import json
from dataclasses import dataclass
from pathlib import Path

from stages.plan import Plan

LATENTS_AT = "latents-at.json"  # in the run folder, if its latents lie elsewhere: where
LATENT_PINS = "latents.json"  # in a stage's folder: which latents it uses
MEMBERS = "clips.arrow"  # beside it: which clips


@dataclass(frozen=True)
class RunFolder:
    """`<storage>/<plan>/`."""

    root: Path

    @classmethod
    def of(cls, storage: Path, plan: Plan) -> "RunFolder":
        """The folder of a plan's run."""
        return cls(storage.absolute() / plan.name)

    @property
    def record(self) -> Path:
        """The stages as they were when they started, and the versions that ran them."""
        return self.root / "run.json"

    @property
    def probes(self) -> Path:
        """What is known of each video file."""
        return self.root / "videos" / "probes.parquet"

    @property
    def latents(self) -> str:
        """The path or URL of the latent stores, which have their fingerprints for names."""
        note = self.root / LATENTS_AT
        if note.exists():
            return str(json.loads(note.read_text())["place"])
        return str(self.root / "latents")

    def stage(self, name: str) -> Path:
        """Everything of one stage."""
        return self.root / "stages" / name

    def samples(self, stage: str) -> Path:
        """What the finished stage made."""
        return self.root / "samples" / stage
