"""What is computed: autoencoders, the diffusion transformer, text."""

from models.codec import Codec
from models.dc_ae import DCAE
from models.dit import DiT
from models.hunyuan_vae import HunyuanVAE
from models.perceptual import Lpips, Pyramid
from models.published import LTXVAE, HunyuanVAE15, ImageDCAE, Wan21VAE, Wan22VAE
from models.t5_clip import T5Clip
from models.text import WordHash
from models.tiling import Tiling

__all__ = [
    "DCAE",
    "LTXVAE",
    "Codec",
    "DiT",
    "HunyuanVAE",
    "HunyuanVAE15",
    "ImageDCAE",
    "Lpips",
    "Pyramid",
    "T5Clip",
    "Tiling",
    "Wan21VAE",
    "Wan22VAE",
    "WordHash",
]
