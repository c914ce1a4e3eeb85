"""Residual networks for small images (He et al., Deep Residual Learning for Image Recognition, 2016).

The stem is one 3x3 convolution without pooling, so a 32x32 image keeps its resolution in the first stage. Parameter
names are those of the widely used pytorch-cifar networks: checkpoints load both ways.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """The shortcut without parameters, option A of the paper: (N, in, H, W) -> (N, out, H / stride, W / stride).

    It takes every `stride`-th pixel and adds channels of zeros, `before` in front and `after` behind.
    """

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.before = (width - channels) // 2
        self.after = width - channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def projection(channels: int, width: int, stride: int) -> nn.Module:
    """The shortcut with parameters, option B of the paper: a 1x1 convolution with BatchNorm."""
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; (N, in, H, W) -> (N, width, H / stride, W / stride)."""

    expansion = 1
    make_shortcut = staticmethod(projection)

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        same = stride == 1 and channels == width
        self.shortcut = nn.Sequential() if same else self.make_shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class PaddedBlock(BasicBlock):
    """A BasicBlock whose shortcut has no parameters."""

    make_shortcut = staticmethod(PadShortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; (N, in, H, W) -> (N, 4 * width, H / stride, W / stride)."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, self.expansion * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.expansion * width)
        same = stride == 1 and channels == self.expansion * width
        self.shortcut = nn.Sequential() if same else projection(channels, self.expansion * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """(N, 3, H, W) float images, H and W of at least 16 -> (N, classes) logits.

    One stage per entry of `widths`, of `depths[i]` blocks; every stage but the first halves the resolution.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], widths: tuple[int, ...], classes: int
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = [f"layer{number}" for number in range(1, len(widths) + 1)]
        channels = widths[0]
        for stage, depth, width in zip(self.stages, depths, widths):
            blocks = []
            for index in range(depth):
                stride = 2 if index == 0 and stage != "layer1" else 1
                blocks.append(block(channels, width, stride))
                channels = width * block.expansion
            self.add_module(stage, nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            out = getattr(self, stage)(out)
        # A mean, not adaptive_avg_pool2d: the same pooling, but its backward is deterministic on CUDA too.
        return self.linear(out.mean((2, 3)))


NETWORKS = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512)),
}
# The paper's networks for CIFAR-10 have 6 n + 2 layers and shortcuts without parameters.
for suffix, block in ("", PaddedBlock), ("-projection", BasicBlock):
    for depth in 20, 32, 44, 56, 110:
        NETWORKS[f"resnet{depth}{suffix}"] = partial(ResNet, block, ((depth - 2) // 6,) * 3, (16, 32, 64))
