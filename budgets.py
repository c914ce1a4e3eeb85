"""Prune within a budget of multiply-adds or of time, at an exact number of zeros.

Global magnitude pruning spares the early layers, whose weights are multiplied most often. Here a weight is kept if
w^2 - lambda * cost is above one threshold over all layers. lambda is found by bisection, the smallest for which the
network fits the budget; lambda = 0 is global magnitude pruning. For the cost that it attains the choice is optimal:
no other with as many zeros and no higher cost removes less squared magnitude (Everett, Generalized Lagrange
multiplier method, 1963). Every layer keeps its largest weight.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

import pruning
from pruning import Masks

BISECTIONS = 200


@dataclass(frozen=True)
class Profile:
    """What a layer costs by the number of weights it keeps: a convex piecewise linear function.

    `kept` (points,) rises from 0 to the layer's number of weights, `cost` (points,) are the costs there. Raises
    ValueError where the costs are not convex and rising: a larger weight would then be pruned before a smaller one.
    """

    kept: tuple[int, ...]
    cost: tuple[float, ...]

    def __post_init__(self) -> None:
        slopes = self.slopes()
        if self.kept[0] != 0 or min(np.diff(self.kept)) <= 0 or min(slopes) < 0 or any(np.diff(slopes) < 0):
            raise ValueError("the costs of a layer must be a convex function that does not fall")

    def slopes(self) -> np.ndarray:
        """(points - 1,) the cost of one more weight in each piece."""
        return np.diff(self.cost) / np.diff(self.kept)

    def at(self, kept: int) -> float:
        """The cost with so many weights."""
        return float(np.interp(kept, self.kept, self.cost))


def mac_profiles(network: nn.Module, image_size: int, exclude: Collection[str] = ()) -> dict[str, Profile]:
    """Multiply-adds of each prunable layer for one image of `image_size` x `image_size` pixels."""
    macs = pruning.count_macs(network, image_size)
    weights = pruning.prunable(network, exclude)
    return {name: Profile((0, weight.numel()), (0.0, float(macs[name][0]))) for name, weight in weights.items()}


def compute_masks(
    network: nn.Module, zeros: int, profiles: dict[str, Profile], budget: float, exclude: Collection[str] = ()
) -> Masks:
    """Masks with exactly `zeros` pruned weights, whose layers together cost at most `budget`, in the profiles' unit.

    Weights that are zero already stay pruned and count. Ties break by position. Raises ValueError when `zeros` is less
    than the network has or leaves a layer without weights, and when no choice fits the budget, naming the lowest cost.
    """
    layers = [_Layer(name, weight, profiles[name]) for name, weight in pruning.prunable(network, exclude).items()]
    keep = sum(layer.size for layer in layers) - zeros
    available = sum(layer.available for layer in layers)
    if keep > available:
        raise ValueError(f"cannot have {zeros} zeros: {zeros + keep - available} weights are zero already")
    if keep < (least := sum(layer.least for layer in layers)):
        raise ValueError(f"cannot have {zeros} zeros: every layer keeps a weight, so at most {zeros + keep - least}")
    kept = _fit(layers, keep, budget)
    return {layer.name: layer.mask(count) for layer, count in zip(layers, kept)}


def lowest_cost(network: nn.Module, zeros: int, profiles: dict[str, Profile], exclude: Collection[str] = ()) -> float:
    """The lowest cost of any choice with so many zeros, in the profiles' unit."""
    layers = [_Layer(name, weight, profiles[name]) for name, weight in pruning.prunable(network, exclude).items()]
    return _cost(layers, _cheapest(layers, sum(layer.size for layer in layers) - zeros))


class _Layer:
    """A layer's weights by falling magnitude, cut where the cost of one more weight changes."""

    def __init__(self, name: str, weight: Tensor, profile: Profile):
        self.name, self.profile, self.shape = name, profile, weight.shape
        squares = weight.detach().cpu().double().flatten().square()
        squares, self.order = squares.sort(descending=True, stable=True)
        self.size = len(squares)
        self.available = int((squares > 0).sum())
        self.least = min(1, self.available)
        self.rising = -squares[: self.available].numpy()  # searchsorted wants rising numbers
        self.starts = [min(max(point, self.least), self.available) for point in profile.kept]
        self.slopes = profile.slopes()

    def count(self, price: float, threshold: float) -> int:
        """How many weights are above the threshold, at this price of a unit of cost. Costs rise with the rank and
        magnitudes fall, so these are the largest."""
        for start, end, slope in zip(self.starts, self.starts[1:], self.slopes):
            above = np.searchsorted(self.rising[start:end], -(threshold + price * slope))
            if start + above < end:
                return int(start + above)
        return self.starts[-1]

    def mask(self, count: int) -> Tensor:
        kept = self.order.new_zeros(self.size, dtype=bool)
        kept[self.order[:count]] = True
        return kept.view(self.shape)


def _cost(layers: list[_Layer], kept: list[int]) -> float:
    return sum(layer.profile.at(count) for layer, count in zip(layers, kept))


def _largest(layers: list[_Layer], keep: int, price: float) -> list[int]:
    """How many weights each layer keeps when the `keep` highest of w^2 - price * cost are kept."""
    highest = max((float(-layer.rising[0]) for layer in layers if layer.available), default=0.0)
    low, high = -price * max(float(layer.slopes[-1]) for layer in layers) - 1.0, highest + 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if sum(layer.count(price, middle) for layer in layers) >= keep:
            low = middle
        else:
            high = middle
    kept = [layer.count(price, high) for layer in layers]
    for index, layer in enumerate(layers):  # ties at the threshold, by position
        kept[index] += min(layer.count(price, low) - kept[index], keep - sum(kept))
    return kept


def _cheapest(layers: list[_Layer], keep: int) -> list[int]:
    """How many weights each layer keeps at the lowest cost."""
    kept = [layer.least for layer in layers]
    pieces = [
        (slope, index, end - start)
        for index, layer in enumerate(layers)
        for start, end, slope in zip(layer.starts, layer.starts[1:], layer.slopes)
    ]
    for _, index, size in sorted(pieces):
        kept[index] += min(size, keep - sum(kept))
    return kept


def _fit(layers: list[_Layer], keep: int, budget: float) -> list[int]:
    """How many weights each layer keeps within the budget; ValueError when that is not possible."""
    cheapest = _cheapest(layers, keep)
    if _cost(layers, cheapest) > budget:
        raise ValueError(f"at least {_cost(layers, cheapest):g} is needed, and {budget:g} allowed")
    kept = _largest(layers, keep, 0.0)
    if _cost(layers, kept) <= budget:
        return kept
    low, high = 0.0, 1.0
    while _cost(layers, fitting := _largest(layers, keep, high)) > budget:
        low, high = high, 2 * high
        if high > 1e300:
            return cheapest
    too_much = kept
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        kept = _largest(layers, keep, middle)
        if _cost(layers, kept) > budget:
            low, too_much = middle, kept
        else:
            high, fitting = middle, kept
    return _between(layers, too_much, fitting, budget)


def _between(layers: list[_Layer], costly: list[int], cheap: list[int], budget: float) -> list[int]:
    """Of the choices between two that differ only in weights of equal score, one that fits the budget.

    One weight after the other is given up in the layers that keep more in `costly`, the most expensive first, for one
    in the layers that keep more in `cheap`, until the budget holds.
    """

    def pieces(more: list[int], fewer: list[int]) -> list[tuple[float, int, int]]:
        return [
            (layer.profile.at(a) - layer.profile.at(a - 1), index, a - b)
            for index, (layer, a, b) in enumerate(zip(layers, more, fewer))
            if a > b
        ]

    def swapped(count: int) -> list[int]:
        kept = list(costly)
        for sign, order in (-1, sorted(pieces(costly, cheap), reverse=True)), (1, sorted(pieces(cheap, costly))):
            left = count
            for _, index, size in order:
                moved = min(left, size)
                kept[index] += sign * moved
                left -= moved
        return kept

    low, high = 0, sum(a - b for a, b in zip(costly, cheap) if a > b)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _cost(layers, swapped(middle)) <= budget else (middle, high)
    return swapped(high)
