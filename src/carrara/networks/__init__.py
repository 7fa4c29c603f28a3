"""Networks as `nn.Module`s, each made from a params dataclass that says everything about its shape."""

from carrara.networks.classifier import EncoderClassifier, EncoderClassifierParams
from carrara.networks.unet import UNet, UNetParams

__all__ = ["EncoderClassifier", "EncoderClassifierParams", "UNet", "UNetParams"]
