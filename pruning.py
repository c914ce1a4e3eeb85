"""Magnitude pruning: what to zero, how to keep it zero, how much is zero. It knows nothing of training.

Only the `weight` of Conv2d and Linear layers is pruned. A mask is a boolean tensor of the weight's shape, False where
the weight is pruned. Masks live beside the network, never in it: the network that is trained, copied and saved always
has its ordinary parameters. A weight that is zero counts as pruned, so masks can be read off a network.
"""

import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

Masks = dict[str, Tensor]
MAX_LEVELS = 1000  # of iterative pruning
PRODUCTS = (torch.conv2d, F.linear, F.multi_head_attention_forward)
ALLOCATIONS = ("global", "uniform", "erk", "lamp")


def prunable(network: nn.Module, exclude: Collection[str] = ()) -> dict[str, Tensor]:
    """The weights that pruning may zero, by parameter name, in the order of the network's modules.

    `exclude` names layers, or modules that contain them, that stay dense. Raises ValueError when one of these names
    fits no layer.
    """
    layers = {name: m.weight for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    excluded: set[str] = set()
    for module in exclude:
        fitting = {name for name in layers if name == module or name.startswith(f"{module}.")}
        if not fitting:
            raise ValueError(f"the network has no convolution or linear layer {module}")
        excluded |= fitting
    return {f"{name}.weight": weight for name, weight in layers.items() if name not in excluded}


def schedule(weights: int, sparsity: float, step: float, zeros: int = 0) -> list[int]:
    """How many of `weights` weights are zero after each level of iterative pruning (Han et al. 2015).

    Each level prunes the fraction `step` of the weights that are left. The last level is clipped, so the schedule ends
    on exactly round(sparsity * weights). From `zeros` = 0 in steps of 0.11, 0.5 / 0.75 / 0.9 take 6 / 12 / 20 levels.
    Raises ValueError for more than MAX_LEVELS levels.
    """
    target = round(sparsity * weights)
    levels: list[int] = []
    while zeros < target:
        if len(levels) == MAX_LEVELS:
            raise ValueError(
                f"steps of {step:g} of the weights left take more than {MAX_LEVELS:,} levels to {sparsity:g}"
            )
        zeros = min(target, zeros + max(1, round(step * (weights - zeros))))
        levels.append(zeros)
    return levels or [target]


def compute_masks(network: nn.Module, zeros: int, allocation: str = "global", exclude: Collection[str] = ()) -> Masks:
    """Masks with exactly `zeros` pruned weights over all layers. Weights that are zero already stay pruned and count.

    One threshold over all layers decides, on a score that depends on the allocation:

    global   the magnitude (Han et al. 2015)
    uniform  the rank in the layer over its size: the same sparsity in every layer, first and last layer dense
             (Gale et al. 2019)
    erk      Erdos-Renyi-kernel: the rank in the layer over the sum of its dimensions, so a layer's density is
             proportional to that sum over its size, and at most 1 (Mocanu et al. 2018; Evci et al. 2020)
    lamp     w^2 over the sum of v^2 over the layer's weights v with |v| >= |w| (Lee et al. 2021)

    Within a layer the smallest magnitudes are pruned. All but global keep at least one weight in each layer. Ties fall
    the same way on every run. Raises ValueError when `zeros` is less than the network has or more than `max_zeros`,
    and when the allocation would have to revive a pruned weight.
    """
    weights = prunable(network, exclude)
    # On the CPU, so that every device computes the same masks; contiguous, because prune fails on channels_last
    # weights (pytorch#96743).
    magnitudes = {name: weight.detach().cpu().contiguous().abs() for name, weight in weights.items()}
    masks = {name: magnitude > 0 for name, magnitude in magnitudes.items()}
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    if zeros < pruned:
        raise ValueError(f"cannot have {zeros} zeros: {pruned} weights are zero already")
    if zeros > max(pruned, most := max_zeros(network, allocation, exclude)):
        raise ValueError(f"cannot have {zeros} zeros: allocation {allocation} can prune at most {most} weights")
    if zeros == pruned:
        return masks
    if allocation == "global":
        return _global_masks(magnitudes, masks, zeros - pruned)
    scores = {name: _scores(magnitude.flatten(), magnitude.shape, allocation) for name, magnitude in magnitudes.items()}
    for name in _dense_layers(network, allocation) & scores.keys():
        scores[name].fill_(torch.inf)
    new = _above_threshold(scores, zeros, masks)
    for name, mask in masks.items():
        if revived := int((new[name] & ~mask).sum()):
            raise ValueError(f"allocation {allocation} would have to revive {revived} pruned weights of {name}")
    return new


def approach(network: nn.Module, final: Masks, zeros: int) -> Masks:
    """Masks with exactly `zeros` pruned weights, on the way to as many weights in each layer as `final` keeps.

    The density of each layer is its final one to the same power. Within a layer the smallest magnitudes are pruned.
    Weights that are zero already stay pruned and count.
    """
    scores = {}
    for name, mask in final.items():
        magnitude = network.get_parameter(name).detach().cpu().contiguous().flatten().abs()
        order = magnitude.sort(descending=True, stable=True).indices
        rank = torch.arange(len(magnitude), dtype=torch.float64) + 0.5
        goal = max(1, int(mask.sum()))  # a layer that was zero before pruning keeps nothing
        # The power at which the density is the rank over the size; above 1 for the weights that are kept to the end.
        powers = (len(magnitude) / rank).log() / max(math.log(len(magnitude) / goal), 1e-12)
        scores[name] = torch.empty_like(powers).scatter_(0, order, powers)
        scores[name][magnitude == 0] = -torch.inf
    return _above_threshold(scores, zeros, final)


def _above_threshold(scores: dict[str, Tensor], zeros: int, masks: Masks) -> Masks:
    """Masks in the shapes of `masks` that prune the `zeros` lowest of the (n,) scores of all layers."""
    kept = torch.ones(sum(map(len, scores.values())), dtype=torch.bool)
    kept[torch.cat(list(scores.values())).argsort(stable=True)[:zeros]] = False
    chosen = kept.split([len(score) for score in scores.values()])
    return {name: keep.view(masks[name].shape) for name, keep in zip(scores, chosen)}


def _scores(magnitude: Tensor, shape: torch.Size, allocation: str) -> Tensor:
    """(n,) magnitudes of a layer -> (n,) float64 scores in the same order; infinite for the largest magnitude."""
    descending, order = magnitude.double().sort(descending=True, stable=True)
    rank = torch.arange(len(magnitude), dtype=torch.float64) + 0.5
    if allocation == "lamp":
        scores = descending.square() / descending.square().cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
    else:
        scores = (len(magnitude) if allocation == "uniform" else sum(shape)) / rank
    scores[0] = torch.inf
    return torch.empty_like(scores).scatter_(0, order, scores)


def _global_masks(magnitudes: dict[str, Tensor], masks: Masks, more: int) -> Masks:
    """Masks that prune `more` of the weights that `masks` keep, by the library's own global L1 pruning."""
    # The library prunes modules in place and leaves hooks on them; it gets stand-ins, which are thrown away.
    # The amount is a count: a fraction would be one of what is left.
    layers = []
    for name, magnitude in magnitudes.items():
        layer = nn.Module()
        layer.weight = nn.Parameter(magnitude)
        prune.custom_from_mask(layer, "weight", masks[name])
        layers.append(layer)
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=more)
    return {name: layer.get_buffer("weight_mask").bool() for name, layer in zip(magnitudes, layers)}


def max_zeros(network: nn.Module, allocation: str, exclude: Collection[str] = ()) -> int:
    """How many weights `compute_masks` can prune in a dense network; a network without weights is no network."""
    weights, dense = prunable(network, exclude), _dense_layers(network, allocation)
    sizes = [weight.numel() for name, weight in weights.items() if name not in dense]
    return sum(sizes) - (1 if allocation == "global" else len(sizes))


def _dense_layers(network: nn.Module, allocation: str) -> set[str]:
    """The layers that an allocation leaves dense."""
    names = list(prunable(network))
    return {names[0], names[-1]} if allocation == "uniform" else set()


@torch.no_grad()
def apply(network: nn.Module, masks: Masks) -> None:
    """Set every pruned weight to +0.0, in place."""
    parameters = dict(network.named_parameters())
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)


def mask_fn(network: nn.Module, masks: Masks) -> Callable[[], None]:
    """A function that zeroes the pruned weights again.

    Called after each step of the optimizer, it undoes what gradient, momentum and weight decay did to them. It may
    leave -0.0; `apply` gives +0.0.
    """
    weights: list[Tensor] = [weight for name, weight in network.named_parameters() if name in masks]
    if not weights:
        return lambda: None
    # Floats in each weight's own memory layout, so that one call multiplies all layers.
    factors = [
        torch.empty_like(weight).copy_(masks[name]) for name, weight in network.named_parameters() if name in masks
    ]

    @torch.no_grad()
    def mask() -> None:
        torch._foreach_mul_(weights, factors)  # type: ignore[arg-type]

    return mask


def count_zeros(network: nn.Module, exclude: Collection[str] = ()) -> dict[str, tuple[int, int]]:
    """Zeros and weights of each prunable layer, by parameter name."""
    return {name: (int((weight == 0).sum()), weight.numel()) for name, weight in prunable(network, exclude).items()}


def sparsity(network: nn.Module, exclude: Collection[str] = ()) -> float:
    """Zeros over weights of all prunable layers, a fraction."""
    layers = count_zeros(network, exclude).values()
    return sum(zeros for zeros, _ in layers) / sum(weights for _, weights in layers)


@torch.no_grad()
def count_macs(network: nn.Module, image_size: int) -> dict[str, tuple[int, int]]:
    """Multiply-adds (MACs) of each Conv2d and Linear layer for one image of `image_size` x `image_size` pixels.

    By the name of its weight: all MACs, and those whose weight is not zero. Padding counts; biases, additions and
    BatchNorm do not. Dense MACs over nonzero MACs are an upper bound on the speed-up.
    """
    weights = prunable(network)
    # On the meta device only shapes are computed, and no statistics are touched. In two images no BatchNorm is short
    # of values.
    shapes = {name: torch.empty_like(value, device="meta") for name, value in network.state_dict().items()}
    with _CountProducts({id(shapes[name]): name for name in weights}) as pixels:
        torch.func.functional_call(network, shapes, torch.empty(2, 3, image_size, image_size, device="meta"))
    return {
        name: (weight.numel() * pixels[name] // 2, int(weight.count_nonzero()) * pixels[name] // 2)
        for name, weight in weights.items()
    }


class _CountProducts(TorchFunctionMode):
    """Counts how often each weight is multiplied, by name: the vectors that a convolution or a product puts out.

    Modules are not asked, because attention uses the weights of its layers without calling these.
    """

    def __init__(self, names: dict[int, str]):
        super().__init__()
        self.names = names  # by the identity of the weight
        self.counts = dict.fromkeys(names.values(), 0)

    def __enter__(self) -> dict[str, int]:
        super().__enter__()
        return self.counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in PRODUCTS:
            vectors = output[0] if isinstance(output, tuple) else output
            for value in (*args, *kwargs.values()):
                if name := self.names.get(id(value)):
                    self.counts[name] += vectors.numel() // len(value)
        return output
