"""A trained network as a list of convolutions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from deployment.simplification import fold, remove_dead_channels
from models.resnet import PadShortcut, ResNet


@dataclass
class Convolution:
    """One convolution with BatchNorm folded in. `source`, `target` and `residual` are the numbers of the activations
    that it reads, writes and adds; number 0 is the image."""

    weight: np.ndarray  # (out, in, k, k) float32
    bias: np.ndarray  # (out,) float32
    stride: int
    relu: bool
    source: int
    target: int
    residual: int | None


def convolutions(network: ResNet) -> list[Convolution]:
    """The convolutions of a network without its dead channels, in execution order.

    The classifier averages the activation that the last one writes.
    """
    found: list[Convolution] = []

    def add(conv: nn.Conv2d, relu: bool, source: int, residual: int | None = None) -> int:
        weight, bias = (value.detach().numpy() for value in (conv.weight, conv.bias))
        found.append(Convolution(weight, bias, conv.stride[0], relu, source, len(found) + 1, residual))
        return len(found)

    network = fold(remove_dead_channels(network))
    activation = add(network.conv1, True, 0)
    for stage in network.stages:
        for block in getattr(network, stage):
            *inner, last = [conv for name, conv in block.named_children() if name.startswith("conv")]
            residual = start = activation
            for conv in inner:
                activation = add(conv, True, activation)
            if isinstance(block.shortcut, PadShortcut):
                residual = add(as_convolution(block.shortcut, block.conv1.in_channels), False, start)
            elif len(block.shortcut):
                residual = add(block.shortcut[0], False, start)
            activation = add(last, True, activation, residual)
    return found


@torch.no_grad()
def as_convolution(shortcut: PadShortcut, channels: int) -> nn.Conv2d:
    """The same function of `channels` channels as a 1x1 convolution with one nonzero weight, 1, a channel.

    The engine skips its zeros, so it costs one multiply-add for each pixel and channel.
    """
    width = shortcut.before + channels + shortcut.after
    conv = nn.Conv2d(channels, width, 1, shortcut.stride)
    conv.bias.zero_()
    conv.weight.zero_()
    conv.weight[shortcut.before : shortcut.before + channels, :, 0, 0] = torch.eye(channels)
    return conv
