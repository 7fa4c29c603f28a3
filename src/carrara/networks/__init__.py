"""Networks as `nn.Module`s, each made from a params dataclass that specifies everything about its shape."""

from carrara.networks.classifier import EncoderClassifier, EncoderClassifierParams
from carrara.networks.dit import DiT, DiTParams
from carrara.networks.network import Network, build, config, create, kinds, params_class, register
from carrara.networks.unet import UNet, UNetParams

register("unet", UNet, UNetParams)
register("dit", DiT, DiTParams)
register("encoder_classifier", EncoderClassifier, EncoderClassifierParams)

__all__ = [
    "DiT",
    "DiTParams",
    "EncoderClassifier",
    "EncoderClassifierParams",
    "Network",
    "UNet",
    "UNetParams",
    "build",
    "config",
    "create",
    "kinds",
    "params_class",
    "register",
]
