"""What is trained, in what order."""

from stages.adversarial import Adversarial
from stages.given import Given
from stages.init import Align, Continue, Fresh, FromFile, KeepTrunk
from stages.noise import Noise
from stages.optimizer import AdamW, Ema, Muon
from stages.plan import Plan, PlanError, load_plan
from stages.schedule import Bucket, Phase, Windows
from stages.stage import AutoencoderStage, DiffusionStage, Stage
from stages.videos import Mix, Videos

__all__ = [
    "AdamW",
    "Adversarial",
    "Align",
    "AutoencoderStage",
    "Bucket",
    "Continue",
    "DiffusionStage",
    "Ema",
    "Fresh",
    "FromFile",
    "Given",
    "KeepTrunk",
    "Mix",
    "Muon",
    "Noise",
    "Phase",
    "Plan",
    "PlanError",
    "Stage",
    "Videos",
    "Windows",
    "load_plan",
]
