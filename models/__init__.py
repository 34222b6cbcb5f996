"""What is computed: autoencoders, the diffusion transformer, text."""

from models.codec import Codec
from models.dc_ae import DCAE
from models.dit import DiT
from models.hunyuan_vae import HunyuanVAE
from models.t5_clip import T5Clip
from models.text import WordHash

__all__ = ["DCAE", "Codec", "DiT", "HunyuanVAE", "T5Clip", "WordHash"]
