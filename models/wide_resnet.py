"""Wide residual networks for small images (Zagoruyko and Komodakis, Wide Residual Networks, 2016), without dropout.

BatchNorm and ReLU come before each convolution. Parameter names are those of the widely used WideResNet-pytorch script:
checkpoints load both ways.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


class WideBlock(nn.Module):
    """Two 3x3 convolutions; (N, in, H, W) -> (N, width, H / stride, W / stride)."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.convShortcut = None if channels == width else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class Stage(nn.Module):
    """`depth` blocks, the first of which has the stride."""

    def __init__(self, channels: int, width: int, stride: int, depth: int):
        super().__init__()
        first = WideBlock(channels, width, stride)
        self.layer = nn.Sequential(first, *(WideBlock(width, width, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """(N, 3, H, W) float images, H and W of at least 16 -> (N, classes) logits.

    `depth` is 6 n + 4, with n blocks in each of three stages of 16, 32 and 64 times `factor` channels.
    """

    def __init__(self, depth: int, factor: int, classes: int):
        super().__init__()
        widths = [width * factor for width in (16, 32, 64)]
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = Stage(16, widths[0], 1, (depth - 4) // 6)
        self.block2 = Stage(widths[0], widths[1], 2, (depth - 4) // 6)
        self.block3 = Stage(widths[1], widths[2], 2, (depth - 4) // 6)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(out)).mean((2, 3)))


NETWORKS = {"wrn-16-4": partial(WideResNet, 16, 4), "wrn-28-10": partial(WideResNet, 28, 10)}
