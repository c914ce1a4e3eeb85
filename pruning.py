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
ALLOCATIONS = ("global", "uniform", "erk", "lamp")


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


def choose(network: nn.Module, zeros: int, masks: Masks | None = None, allocation: str = "global") -> Masks:
    """Masks that zero exactly `zeros` weights over all layers together. How many of each layer, `allocation` says:

    global   as many as are below one threshold of magnitude
    uniform  the same share of every layer, but none of the first and the last, which stay dense (Gale et al. 2019)
    erk      Erdos-Renyi-kernel: a layer's density is proportional to the sum of its dimensions over their product,
             at most 1 (Mocanu et al. 2018; Evci et al. 2020)
    lamp     as many as are below one threshold of w^2 / sum of v^2, the sum over the weights v of the layer with
             |v| >= |w| (Lee et al. 2021)

    Within a layer it is always the smallest magnitudes. All but global leave each layer a weight. What `masks` prunes
    stays pruned and counts. Ties fall the same way on every run. Raises ValueError when `zeros` is less than `masks`
    prunes already, or more than `most_zeros`.
    """
    weights = prunable(network)
    masks = masks or {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
    more = zeros - sum(int((~mask).sum()) for mask in masks.values())
    if more < 0 or zeros > most_zeros(network, allocation):
        raise ValueError(f"cannot have {zeros} zeros")
    if allocation == "global":
        return _choose_global(weights, more, masks)
    # -1 comes before every magnitude: what is pruned is the first to be.
    magnitudes = [
        torch.where(masks[name], weight.detach().cpu().abs(), -1.0).flatten() for name, weight in weights.items()
    ]
    if allocation == "lamp":
        kept = _keep_largest(torch.cat([_lamp_scores(layer) for layer in magnitudes]), zeros)
        kept = kept.split([layer.numel() for layer in magnitudes])
    else:
        pruned = [int((layer < 0).sum()) for layer in magnitudes]
        budgets = _layer_zeros(weights, zeros, pruned, allocation)
        kept = [_keep_largest(layer, budget) for layer, budget in zip(magnitudes, budgets)]
    return {name: layer.view(weight.shape) for (name, weight), layer in zip(weights.items(), kept)}


def most_zeros(network: nn.Module, allocation: str) -> int:
    """How many weights `choose` can zero."""
    sizes = [weight.numel() for weight in prunable(network).values()]
    if allocation == "global":
        return sum(sizes)
    return sum(size - 1 for size in (sizes[1:-1] if allocation == "uniform" else sizes))


def _choose_global(weights: dict[str, nn.Parameter], more: int, masks: Masks) -> Masks:
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


def _keep_largest(scores: Tensor, zeros: int) -> Tensor:
    """(n,) scores -> (n,) bool with `zeros` False, at the smallest."""
    kept = torch.ones(len(scores), dtype=torch.bool)
    kept[scores.argsort(stable=True)[:zeros]] = False
    return kept


def _lamp_scores(magnitudes: Tensor) -> Tensor:
    """(n,) magnitudes -> (n,) float64 scores in magnitude order; -1 where pruned, 1 for the largest magnitude."""
    descending, order = magnitudes.double().sort(descending=True, stable=True)
    squares = descending.clamp(min=0).square()
    scores = squares / squares.cumsum(0)
    scores[squares == 0] = 0.0
    scores[0] = 1.0  # of a layer of zeros, too: a layer keeps a weight
    return torch.empty_like(scores).scatter_(0, order, torch.where(descending < 0, -1.0, scores))


def _layer_zeros(weights: dict[str, nn.Parameter], zeros: int, pruned: list[int], allocation: str) -> list[int]:
    """How many weights of each layer are to be zero, in whole numbers that sum to `zeros`: the exact shares, rounded
    by the largest remainder, but at least `pruned` and fewer than the layer has."""
    sizes = [weight.numel() for weight in weights.values()]
    density = [1.0 if allocation == "uniform" else sum(w.shape) / w.numel() for w in weights.values()]
    dense = {0, len(sizes) - 1} if allocation == "uniform" else set()
    # A layer whose share is more than it has is dense, and the others share the rest.
    while True:
        rest = [layer for layer in range(len(sizes)) if layer not in dense]
        left = sum(sizes) - zeros - sum(sizes[layer] for layer in dense)
        unit = left / sum(density[layer] * sizes[layer] for layer in rest) if rest else 0.0
        full = {layer for layer in rest if unit * density[layer] >= 1}
        if not full:
            break
        dense |= full
    exact = [0.0 if layer in dense else size * (1 - unit * density[layer]) for layer, size in enumerate(sizes)]
    most = [size - 1 for size in sizes]
    if allocation == "uniform":
        most[0] = most[-1] = 0
    budgets = [max(low, min(int(share), high)) for low, share, high in zip(pruned, exact, most)]
    while missing := zeros - sum(budgets):
        step = 1 if missing > 0 else -1
        free = [i for i, b in enumerate(budgets) if (b < most[i] if step > 0 else b > pruned[i])]
        budgets[max(free, key=lambda i: step * (exact[i] - budgets[i]))] += step
    return budgets


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


def change(network: nn.Module, masks: Masks) -> float:
    """What `apply` would take away: the norm of the weights that it zeroes over that of all prunable weights."""
    weights = prunable(network)
    lost = sum(float(weight.detach().cpu()[~masks[name]].double().square().sum()) for name, weight in weights.items())
    return (
        lost / max(sum(float(weight.detach().double().square().sum()) for weight in weights.values()), 1e-300)
    ) ** 0.5


def count(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Zeros and weights of each prunable layer, by parameter name."""
    return {name: (int((weight == 0).sum()), weight.numel()) for name, weight in prunable(network).items()}


def sparsity(network: nn.Module) -> float:
    """Zeros over weights of all prunable layers, a fraction."""
    layers = count(network).values()
    return sum(zeros for zeros, _ in layers) / sum(weights for _, weights in layers)


@torch.no_grad()
def multiply_adds(network: nn.Module, image_size: int) -> dict[str, tuple[int, int]]:
    """Multiply-adds of each Conv2d and Linear layer for one image of `image_size` x `image_size` pixels, by the name
    of its weight: all, and those with a weight that is not zero. Padding counts; biases, additions and BatchNorm do
    not. All over nonzero is the theoretical speed-up: that of a device on which nothing else costs time."""
    pixels = {}

    def count_pixels(name: str, module: nn.Module, output: Tensor) -> None:
        pixels[f"{name}.weight"] = output[0].numel() // len(module.weight)

    hooks = [
        module.register_forward_hook(lambda module, _input, output, name=name: count_pixels(name, module, output))
        for name, module in network.named_modules()
        if f"{name}.weight" in prunable(network)
    ]
    # Without values: only shapes are computed, and no statistics are touched.
    shapes = {name: torch.empty_like(value, device="meta") for name, value in network.state_dict().items()}
    torch.func.functional_call(network, shapes, torch.empty(2, 3, image_size, image_size, device="meta"))
    for hook in hooks:
        hook.remove()
    return {
        name: (weight.numel() * pixels[name], int(weight.count_nonzero()) * pixels[name])
        for name, weight in prunable(network).items()
    }
