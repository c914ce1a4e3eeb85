"""Networks for the tests of deployment."""

import pytest
import torch
from PIL import Image

import models
from models.resnet import BasicBlock, Bottleneck, PaddedBlock, ResNet

# Every kind of block and shortcut, small enough to compute in milliseconds.
TINY = {
    "basic": (BasicBlock, (2, 2), (12, 24)),
    "padded": (PaddedBlock, (2, 2, 1), (12, 24, 31)),
    "bottleneck": (Bottleneck, (2, 1), (12, 24)),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """PyTorch computes these small networks faster without threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pruned(arch: str, density: float, classes: int = 10) -> ResNet:
    """A network with random weights, BatchNorm statistics and zeros. Its logits are of the order of 1."""
    torch.manual_seed(1)
    network = ResNet(*TINY[arch], classes) if arch in TINY else models.build(arch, classes)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.mul_(torch.rand_like(module.weight) < density).div_(max(density, 0.1) ** 0.5)
    return random_batchnorm(network)


@torch.no_grad()
def random_batchnorm(network: torch.nn.Module) -> torch.nn.Module:
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@torch.no_grad()
def randomize(network: torch.nn.Module, density: float) -> torch.nn.Module:
    """Any network with random weights (of He's variance), biases, BatchNorm statistics and zeros, for evaluation."""
    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            fan_in = density * module.weight[0].numel()
            module.weight.normal_(0, (2 / fan_in) ** 0.5).mul_(torch.rand_like(module.weight) < density)
            if module.bias is not None:
                module.bias.normal_(0, 0.2)
    return random_batchnorm(network)


def resize(image: Image.Image, width: int, height: int | None = None) -> Image.Image:
    """Pillow's bilinear, along rows first. Since version 13 it begins with the columns of some images, which changes
    pixels by one level."""
    rows = image.resize((width, image.height), Image.Resampling.BILINEAR)
    return rows.resize((width, height or width), Image.Resampling.BILINEAR)
