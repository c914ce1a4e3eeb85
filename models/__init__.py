"""The networks, by name."""

import torch
from torch import Tensor

from models.resnet import BasicBlock, Bottleneck, PaddedBlock, ResNet

# block, blocks of each stage, channels of each stage
ARCHITECTURES: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, ...], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": (BasicBlock, (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": (Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet20": (PaddedBlock, (3, 3, 3), (16, 32, 64)),
    "resnet20-projection": (BasicBlock, (3, 3, 3), (16, 32, 64)),
}


def build(arch: str, classes: int) -> ResNet:
    """A network with fresh weights from torch's global generator; KeyError on an unknown name."""
    return ResNet(*ARCHITECTURES[arch], classes)


def identify(state: dict[str, Tensor]) -> str:
    """The name of the architecture whose parameters have exactly the names and shapes of `state`.

    Raises ValueError when no architecture fits, naming the closest one and the first difference.
    """
    linear = state.get("linear.weight")
    classes = linear.shape[0] if linear is not None and linear.dim() == 2 else 10
    differences = {}
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            expected = {name: tuple(value.shape) for name, value in build(arch, classes).state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        # Files written before PyTorch 0.4.1 have no such counters, and nothing here uses them.
        missing = [f"{n} is missing" for n in expected if n not in found and not n.endswith("num_batches_tracked")]
        extra = [f"{n} is unknown" for n in found if n not in expected]
        shapes = [
            f"{n} has shape {found[n]}, not {expected[n]}" for n in expected if n in found and found[n] != expected[n]
        ]
        differences[arch] = missing + extra + shapes
        if not differences[arch]:
            return arch
    closest = min(differences, key=lambda arch: len(differences[arch]))
    first, others = differences[closest][0], len(differences[closest]) - 1
    raise ValueError(
        f"fits no known network; closest is {closest}, but {first}" + (f" (and {others} more)" if others else "")
    )
