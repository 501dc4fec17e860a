"""Models that the recipes train, and how a study names one: ``package.module:callable``."""

from fedl2p.models.registry import Builder, build, is_ours, load
from fedl2p.models.resnet import ResNet18
from fedl2p.models.small import (
    ResidualBlock,
    SmallConv,
    SmallMel,
    SmallResNet,
    SmallStrided,
    resnet18_cifar,
    resnet18_cifar_coarse,
    resnet18_imagenet,
    resnet18_imagenet_coarse,
    resnet18_speech,
    resnet18_speech_coarse,
    small_conv,
    small_mel,
    small_resnet,
    small_strided,
)

__all__ = [
    "Builder",
    "ResNet18",
    "ResidualBlock",
    "SmallConv",
    "SmallMel",
    "SmallResNet",
    "SmallStrided",
    "build",
    "is_ours",
    "load",
    "resnet18_cifar",
    "resnet18_cifar_coarse",
    "resnet18_imagenet",
    "resnet18_imagenet_coarse",
    "resnet18_speech",
    "resnet18_speech_coarse",
    "small_conv",
    "small_mel",
    "small_resnet",
    "small_strided",
]
