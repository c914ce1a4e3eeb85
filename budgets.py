"""Prune within a budget of multiply-adds or of time, at an exact number of zeros.

Global magnitude pruning spares the early layers, whose weights are multiplied most often. Here a weight is kept if
w^2 - lambda * cost is above one threshold over all layers. lambda is found by bisection, the smallest for which the
network fits the budget; lambda = 0 is global magnitude pruning. For the cost that it attains the choice is optimal:
no other with as many zeros and no higher cost removes less squared magnitude (Everett, Generalized Lagrange
multiplier method, 1963). Every layer keeps its largest weight.

The time of a layer is not a convex function of its weights: an engine computes a layer that kept many with all of
them, and then another weight costs nothing. Such a layer has either a price for each weight, or one price for all that
are above the threshold, whichever is better for the same lambda and threshold. The choice fits the budget; a better one
may exist.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

import pruning
from pruning import Masks

BISECTIONS = 200
HIGHEST_PRICE = 1e30
ROUNDING = 1e-9  # of shares of multiply-adds, which are sums of fractions


@dataclass(frozen=True)
class Profile:
    """What a layer costs by the number of weights it keeps: a piecewise linear function.

    `kept` (points,) rises from 0 to the layer's number of weights, `cost` (points,) are the costs there. `prices`
    (points - 1,) are what the choice takes one more weight to cost in each piece, by default the slopes of `cost`.
    Raises ValueError where a price is negative or falls: a larger weight would then be pruned before a smaller one.
    """

    kept: tuple[int, ...]
    cost: tuple[float, ...]
    prices: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.prices:
            object.__setattr__(self, "prices", self.slopes)
        rising = self.kept[0] == 0 and min(np.diff(self.kept)) > 0
        if not rising or min(self.prices) < 0 or any(np.diff(self.prices) < 0):
            raise ValueError("the costs of a layer must be a convex function that does not fall")

    @property
    def slopes(self) -> tuple[float, ...]:
        return tuple(np.diff(self.cost) / np.diff(self.kept))

    def at(self, kept: int) -> float:
        """The cost with so many weights."""
        return float(np.interp(kept, self.kept, self.cost))


def mac_profiles(network: nn.Module, image_size: int, exclude: Collection[str] = ()) -> dict[str, Profile]:
    """Multiply-adds of each prunable layer, as shares of those of the whole dense network for one image.

    Images have `image_size` x `image_size` pixels. Layers in `exclude` have no profile; what they cost is a constant
    in the first one.
    """
    macs = {name: dense for name, (dense, _) in pruning.count_macs(network, image_size).items()}
    whole = sum(macs.values())
    weights = pruning.prunable(network, exclude)
    constant = sum(dense for name, dense in macs.items() if name not in weights) / whole
    profiles = {}
    for name, weight in weights.items():
        profiles[name] = Profile((0, weight.numel()), (constant, constant + macs[name] / whole))
        constant = 0.0
    return profiles


def shares(levels: Sequence[int], weights: int, share: float) -> list[float]:
    """The budget of each level of iterative pruning, for `share` at the last: density^a, with the a that fits there.

    `levels` are zeros of `weights` weights. One-shot pruning is the schedule with one level.
    """
    return [share ** _steps(zeros, levels[-1], weights) for zeros in levels]


def _steps(zeros: int, last: int, weights: int) -> float:
    """Which fraction of the way from the dense network to `last` zeros is done with `zeros`, in equal factors."""
    return 1.0 if zeros == last else math.log(1 - zeros / weights) / math.log(1 - last / weights)


Budget = tuple[int, float]  # zeros, and the cost that is allowed with them


def compute_masks(
    network: nn.Module,
    budget: Budget,
    profiles: dict[str, Profile],
    exclude: Collection[str] = (),
    later: Sequence[Budget] = (),
) -> Masks:
    """Masks with exactly as many pruned weights and at most the cost of `budget`, in the profiles' unit.

    The budgets that `later` levels will have can be kept, too, by weights that are kept now; see `shares`. Weights that
    are zero already stay pruned and count. Ties break by position. Raises ValueError as `lowest_share`, and when
    nothing fits.
    """
    layers = [_Layer(name, weight, profiles[name]) for name, weight in pruning.prunable(network, exclude).items()]
    lowest_share(network, [budget[0]], profiles, exclude)
    weights = sum(layer.size for layer in layers)

    def fits(kept: list[int]) -> bool:
        return _cost(layers, kept) <= budget[1] + ROUNDING and all(
            _cost(layers, _cheapest(layers, weights - zeros, kept)) <= cost + ROUNDING for zeros, cost in later
        )

    kept = _fit(layers, weights - budget[0], fits)
    if any(layer.profile.prices != layer.profile.slopes for layer in layers):
        for layer in layers:
            layer.has_whole_price = True
        kept = max(kept, _fit(layers, weights - budget[0], fits), key=lambda kept: _squares(layers, kept))
    return {layer.name: layer.mask(count) for layer, count in zip(layers, kept)}


def lowest_share(
    network: nn.Module, levels: Sequence[int], profiles: dict[str, Profile], exclude: Collection[str] = ()
) -> float:
    """The lowest share that pruning to so many zeros, one level after the other, can be asked for.

    Raises ValueError when the network has more zeros than the first level, and when a layer would lose all weights.
    """
    layers = [_Layer(name, weight, profiles[name]) for name, weight in pruning.prunable(network, exclude).items()]
    weights = sum(layer.size for layer in layers)
    pruned, most = weights - sum(layer.available for layer in layers), weights - sum(layer.least for layer in layers)
    if levels[0] < pruned:
        raise ValueError(f"cannot have {levels[0]} zeros: {pruned} weights are zero already")
    if levels[-1] > most:
        raise ValueError(f"cannot have {levels[-1]} zeros: every layer keeps a weight, so at most {most}")
    return max(
        _cost(layers, _cheapest(layers, weights - zeros)) ** (1 / _steps(zeros, levels[-1], weights))
        for zeros in levels
    )


class _Layer:
    """A layer's weights by falling magnitude, cut where the cost of one more weight changes."""

    def __init__(self, name: str, weight: Tensor, profile: Profile):
        self.name, self.weight, self.profile = name, weight, profile
        self.size = weight.numel()
        self.available = self.size if weight.is_meta else int(weight.count_nonzero())
        self.least = min(1, self.available)
        self.starts = [min(max(point, self.least), self.available) for point in profile.kept]
        self.prices = profile.prices
        self.has_whole_price = False  # whether the layer may be kept at what its weights cost together

    @cached_property
    def sorted(self) -> tuple[np.ndarray, Tensor]:
        """-w^2 of the weights that are not zero, rising, as searchsorted wants it; and the positions of all."""
        squares, order = self.weight.detach().cpu().double().flatten().square().sort(descending=True, stable=True)
        return -squares[: self.available].numpy(), order

    @cached_property
    def squares(self) -> np.ndarray:
        """(n + 1,) the sum of w^2 of so many of the largest weights."""
        return np.concatenate([[0.0], np.cumsum(-self.sorted[0])])

    def count(self, price: float, threshold: float) -> int:
        """How many weights to keep at this price of a unit of cost."""
        kept = self.above(price, threshold)
        if self.has_whole_price:
            return max(kept, self.above(0.0, threshold), key=lambda count: self.value(count, price, threshold))
        return kept

    def value(self, kept: int, price: float, threshold: float) -> float:
        """What so many of the largest weights are worth: their squares, less what they cost and displace."""
        return self.squares[kept] - price * self.profile.at(kept) - threshold * kept

    def above(self, price: float, threshold: float) -> int:
        """How many weights are above the threshold, at this price of a unit of cost. Costs rise with the rank and
        magnitudes fall, so these are the largest."""
        for start, end, each in zip(self.starts, self.starts[1:], self.prices):
            above = np.searchsorted(self.sorted[0][start:end], -(threshold + price * each))
            if start + above < end:
                return int(start + above)
        return self.starts[-1]

    def mask(self, count: int) -> Tensor:
        kept = torch.zeros(self.size, dtype=torch.bool)
        kept[self.sorted[1][:count]] = True
        return kept.view(self.weight.shape)


def _squares(layers: list[_Layer], kept: list[int]) -> float:
    return sum(float(layer.squares[count]) for layer, count in zip(layers, kept))


def _cost(layers: list[_Layer], kept: list[int]) -> float:
    return sum(layer.profile.at(count) for layer, count in zip(layers, kept))


def _largest(layers: list[_Layer], keep: int, price: float) -> list[int]:
    """How many weights each layer keeps when the `keep` highest of w^2 - price * cost are kept."""
    highest = max((float(-layer.sorted[0][0]) for layer in layers if layer.available), default=0.0)
    low, high = -price * max(float(layer.prices[-1]) for layer in layers) - 1.0, highest + 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        kept = [layer.count(price, middle) for layer in layers]
        if sum(kept) == keep:
            return kept
        low, high = (middle, high) if sum(kept) > keep else (low, middle)
    kept = [layer.count(price, high) for layer in layers]
    for index, layer in enumerate(layers):  # ties at the threshold, by position
        kept[index] += max(0, min(layer.count(price, low) - kept[index], keep - sum(kept)))
    return kept


def _cheapest(layers: list[_Layer], keep: int, most: list[int] | None = None) -> list[int]:
    """How many weights each layer keeps at the lowest cost, at most as many as `most` says."""
    most = [layer.available for layer in layers] if most is None else most
    kept = [min(layer.least, limit) for layer, limit in zip(layers, most)]
    pieces = [
        (price, index, min(end, most[index]) - min(start, most[index]))
        for index, layer in enumerate(layers)
        for start, end, price in zip(layer.starts, layer.starts[1:], layer.prices)
    ]
    left = keep - sum(kept)
    for _, index, size in sorted(pieces):
        taken = min(size, left)
        kept[index] += taken
        left -= taken
    return kept


def _fit(layers: list[_Layer], keep: int, fits: Callable[[list[int]], bool]) -> list[int]:
    """How many weights each layer keeps at the lowest price for which they fit."""
    too_much = _largest(layers, keep, 0.0)
    if fits(too_much):
        return too_much
    low, high = 0.0, 1.0
    while not fits(fitting := _largest(layers, keep, high)):
        low, high, too_much = high, 4 * high, fitting
        if high > HIGHEST_PRICE:  # the magnitudes are lost in rounding
            cheapest = _cheapest(layers, keep)
            if not fits(cheapest):
                raise ValueError(f"{keep} weights cost at least {_cost(layers, cheapest):.4g}, which is too much")
            return _between(layers, too_much, cheapest, fits)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        kept = _largest(layers, keep, middle)
        if fits(kept):
            high, fitting = middle, kept
        else:
            low, too_much = middle, kept
    return _between(layers, too_much, fitting, fits)


def _between(layers: list[_Layer], costly: list[int], cheap: list[int], fits: Callable[[list[int]], bool]) -> list[int]:
    """Of the choices between two that differ only in weights of equal score, the first that fits.

    One weight after the other is given up in the layers that keep more in `costly`, the most expensive first, for one
    in the layers that keep more in `cheap`.
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
        low, high = (low, middle) if fits(swapped(middle)) else (middle, high)
    return swapped(high)
