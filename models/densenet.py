"""DenseNet-BC for small images (Huang et al., Densely Connected Convolutional Networks, 2017), without dropout.

Parameter names are those of the pytorch-classification script, and a layer appends its channels behind its input's, as
there and in the authors' code.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """1x1 and 3x3 convolutions; (N, in, H, W) -> (N, in + growth, H, W): the input, and `growth` channels more."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(out)))], 1)


class Transition(nn.Module):
    """Half the channels at half the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class DenseNet(nn.Module):
    """(N, 3, H, W) float images, H and W of at least 16 -> (N, classes) logits.

    `depth` is 6 n + 4, with n layers in each of three dense blocks.
    """

    def __init__(self, depth: int, growth: int, classes: int):
        super().__init__()
        layers = (depth - 4) // 6
        channels = 2 * growth

        def dense() -> nn.Sequential:
            return nn.Sequential(*(DenseLayer(channels + index * growth, growth) for index in range(layers)))

        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.dense1 = dense()
        channels += layers * growth
        self.trans1 = Transition(channels)
        channels //= 2
        self.dense2 = dense()
        channels += layers * growth
        self.trans2 = Transition(channels)
        channels //= 2
        self.dense3 = dense()
        channels += layers * growth
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.trans1(self.dense1(self.conv1(x)))
        out = self.dense3(self.trans2(self.dense2(out)))
        return self.fc(F.relu(self.bn(out)).mean((2, 3)))


NETWORKS = {"densenet-bc-100-12": partial(DenseNet, 100, 12)}
