"""The networks, by name: ours, one file a family, and the classifiers of torchvision as `torchvision:NAME`."""

import argparse
import difflib
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from models import densenet, identification, mobilenet, resnet, torchvision_networks, vgg, wide_resnet
from models.identification import Match, Shapes
from models.resnet import ResNet

__all__ = [
    "ARCHITECTURES", "NAMES", "Match", "ResNet", "arch", "build", "check_size", "empty", "identify", "outputs",
    "shapes", "state",
]  # fmt: skip

# From a number of classes to a network with fresh weights.
ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    **resnet.NETWORKS,
    **vgg.NETWORKS,
    **wide_resnet.NETWORKS,
    **mobilenet.NETWORKS,
    **densenet.NETWORKS,
}
NAMES = tuple(ARCHITECTURES)


def arch(text: str) -> str:
    """The name of a network, as an argparse type."""
    if text in NAMES or (text.startswith(torchvision_networks.PREFIX) and text in torchvision_networks.names()):
        return text
    known = [*NAMES, *torchvision_networks.names()]
    close = difflib.get_close_matches(text, known, 3, 0.5)
    close += [name for name in known if name.removeprefix(torchvision_networks.PREFIX) == text and name not in close]
    raise argparse.ArgumentTypeError(f"{text!r} is no known network{'; close to it: ' * bool(close)}{', '.join(close)}")


def build(arch: str, classes: int) -> nn.Module:
    """A network with fresh weights from torch's global generator: (N, 3, H, W) images -> (N, classes) logits.

    Raises KeyError on an unknown name.
    """
    if arch.startswith(torchvision_networks.PREFIX):
        return torchvision_networks.build(arch, classes)
    return ARCHITECTURES[arch](classes)


def empty(arch: str, classes: int) -> nn.Module:
    """A network on the meta device, where it has shapes but no values and takes no memory."""
    if arch.startswith(torchvision_networks.PREFIX):
        return torchvision_networks.empty(arch, classes)
    with torch.device("meta"):
        return build(arch, classes)


@cache
def state(arch: str, classes: int) -> dict[str, Tensor]:
    """The state_dict of a network on the meta device: names, shapes and types, no values."""
    return empty(arch, classes).state_dict()


@cache
def shapes(arch: str, classes: int) -> dict[str, torch.Size]:
    """The shape of each tensor of a network, by name, in the order of its state_dict."""
    return {name: value.shape for name, value in state(arch, classes).items()}


def outputs(arch: str, net: dict[str, Tensor]) -> int:
    """The number of classes of a state_dict of an architecture: the length of the last parameter."""
    return len(net[_last(arch)])


@cache
def _last(arch: str) -> str:
    return list(state(arch, 2))[-1]


def identify(file: Shapes) -> Match:
    """The network that has these tensors, under whatever names; `models.identification` says how they are compared.

    Raises ValueError when none fits, naming the closest and the first difference after renaming.
    """
    return identification.identify(file, NAMES, torchvision_networks.names, shapes)


def check_size(arch: str, classes: int, size: int, images: int = 2) -> None:
    """ValueError when a network cannot be trained on batches of so many images of `size` x `size` pixels.

    Nothing is computed but shapes. It takes a second for the largest networks.
    """
    network = empty(arch, classes).train()
    try:
        network(torch.empty(images, 3, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError, ArithmeticError, LookupError) as error:
        reason = " ".join(str(error).split())
        if "more than 1 value per channel" in reason:
            reason = "BatchNorm needs more than one value per channel, so choose another batch size"
        what = f"{images} image{'s' * (images != 1)} of {size}x{size} pixels"
        raise ValueError(f"{arch} cannot be trained on batches of {what}: {reason:.200}") from None
