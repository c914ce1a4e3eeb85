"""VGG networks with BatchNorm for 32x32 images (Simonyan and Zisserman 2015; Ioffe and Szegedy 2015).

One linear layer follows the convolutions, in place of the three of the paper. The convolutions have biases, although
BatchNorm makes them superfluous: names and shapes are those of the pytorch-cifar networks, so checkpoints load both
ways.
"""

from functools import partial

from torch import Tensor, nn


class VGG(nn.Module):
    """(N, 3, H, W) float images, H and W of at least 32 -> (N, classes) logits.

    `depths` and `widths` are the convolutions and the channels of each stage; max pooling halves the resolution after
    each stage.
    """

    def __init__(self, depths: tuple[int, ...], widths: tuple[int, ...], classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for depth, width in zip(depths, widths):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


WIDTHS = (64, 128, 256, 512, 512)
NETWORKS = {
    "vgg11": partial(VGG, (1, 1, 2, 2, 2), WIDTHS),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3), WIDTHS),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4), WIDTHS),
}
