"""Magnitude pruning: what to zero, how to keep it zero, how much is zero. Knows nothing of training.

Only the `weight` of each Conv2d and Linear layer is pruned. A mask is a boolean tensor of the weight's
shape, False where the weight is pruned. Masks live beside the network, never in it, so the network that is
trained, copied and saved always has its ordinary parameters.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

Masks = dict[str, Tensor]


def prunable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that pruning may zero, by parameter name, in the order of the network's modules."""
    return {
        f"{name}.weight": module.weight
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


def levels(weights: int, sparsity: float, step: float) -> list[int]:
    """How many of `weights` weights are zero after each step of iterative pruning (Han et al. 2015).

    Every step prunes the fraction `step` of the weights that are left; the last one is clipped, so the
    schedule ends on exactly round(sparsity * weights). 0.5 / 0.75 / 0.9 in steps of 0.11 take 6 / 12 / 20.
    """
    target = round(sparsity * weights)
    zeros, schedule = 0, []
    while zeros < target:
        zeros = min(target, zeros + max(1, round(step * (weights - zeros))))
        schedule.append(zeros)
    return schedule or [target]


def choose(network: nn.Module, zeros: int, masks: Masks | None = None) -> Masks:
    """Masks that zero exactly the `zeros` weights of smallest magnitude, over all layers together.

    What `masks` prunes stays pruned and counts. Ties fall the same way on every run. Raises ValueError when
    `zeros` is less than `masks` prunes already, or more than there are weights.
    """
    weights = prunable(network)
    masks = masks or {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
    more = zeros - sum(int((~mask).sum()) for mask in masks.values())
    if more < 0 or zeros > sum(mask.numel() for mask in masks.values()):
        raise ValueError(f"cannot have {zeros} zeros")
    # The library prunes modules in place and leaves hooks on them; it gets stand-ins, which are thrown away.
    # Contiguous, because it fails on channels_last weights (pytorch#96743); on the CPU, because every device
    # should choose the same weights. The amount is a count: a fraction would be one of what is left.
    layers = []
    for name, weight in weights.items():
        layer = nn.Module()
        layer.weight = nn.Parameter(weight.detach().cpu().contiguous())
        prune.custom_from_mask(layer, "weight", masks[name])
        layers.append(layer)
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=more)
    return {name: layer.weight_mask.bool() for name, layer in zip(weights, layers)}


@torch.no_grad()
def apply(network: nn.Module, masks: Masks) -> None:
    """Set every pruned weight to +0.0, in place."""
    for name, weight in prunable(network).items():
        weight.masked_fill_(~masks[name].to(weight.device), 0.0)


def keeper(network: nn.Module, masks: Masks) -> Callable[[], None]:
    """A function that zeroes the pruned weights again: called after each step of the optimizer, it undoes
    what gradient, momentum and weight decay did to them. It may leave -0.0; `apply` ends on +0.0."""
    weights = prunable(network)
    # Floats in each weight's own memory layout, so that all layers are one call.
    factors = [torch.empty_like(weight).copy_(masks[name]) for name, weight in weights.items()]
    parameters = list(weights.values())

    @torch.no_grad()
    def keep() -> None:
        torch._foreach_mul_(parameters, factors)

    return keep


def count(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Zeros and weights of each prunable layer, by parameter name."""
    return {name: (int((weight == 0).sum()), weight.numel()) for name, weight in prunable(network).items()}


def sparsity(network: nn.Module) -> float:
    """Zeros over weights of all prunable layers, a fraction."""
    layers = count(network).values()
    return sum(zeros for zeros, _ in layers) / sum(weights for _, weights in layers)
