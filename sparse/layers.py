"""A trained network as the list of its convolutions."""

from dataclasses import dataclass

import numpy as np

from compact import fold, remove_dead_channels
from models.resnet import ResNet


@dataclass
class Convolution:
    """One convolution, BatchNorm folded in. `source`, `target` and `residual` number the activations that it reads,
    writes and adds; 0 is the image."""

    weight: np.ndarray  # (out, in, k, k) float32
    bias: np.ndarray  # (out,) float32
    stride: int
    relu: bool
    source: int
    target: int
    residual: int | None


def convolutions(network: ResNet) -> list[Convolution]:
    """The convolutions of a network without its dead channels, in the order in which they run; the classifier
    averages what the last writes."""
    found: list[Convolution] = []

    def add(conv, relu: bool, source: int, residual: int | None = None) -> int:
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
            if len(block.shortcut):
                residual = add(block.shortcut[0], False, start)
            activation = add(last, True, activation, residual)
    return found
