"""MobileNetV2 for 32x32 images (Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018).

As in the pytorch-cifar script, whose names and shapes it has, so that checkpoints load both ways: the stem and the
second stage keep the resolution, activations are ReLU in place of ReLU6, and every block of stride 1 has a shortcut,
with a projection where the channels change.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet import projection

# expansion, channels, blocks, stride
STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


class InvertedBlock(nn.Module):
    """1x1, depthwise 3x3, 1x1 convolutions; (N, in, H, W) -> (N, width, H / stride, W / stride)."""

    def __init__(self, channels: int, width: int, expansion: int, stride: int):
        super().__init__()
        inner = expansion * channels
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.stride = stride
        self.shortcut = projection(channels, width, 1) if stride == 1 and channels != width else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


class MobileNetV2(nn.Module):
    """(N, 3, H, W) float images, H and W of at least 16 -> (N, classes) logits."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, width, depth, stride in STAGES:
            for index in range(depth):
                blocks.append(InvertedBlock(channels, width, expansion, stride if index == 0 else 1))
                channels = width
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.relu(self.bn2(self.conv2(out))).mean((2, 3)))


NETWORKS = {"mobilenetv2": MobileNetV2}
