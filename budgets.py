"""Prune within a budget of multiply-adds or of time, at an exact number of zeros.

Global magnitude pruning spares the early layers, whose weights are multiplied most often. Here each layer keeps its
largest weights, as many as are worth most: their squares, less lambda times what they cost together, less a threshold
for each. One lambda and one threshold hold for all layers. The threshold gives the number of zeros. lambda is found by
bisection, the smallest for which the network fits the budget; lambda = 0 is global magnitude pruning. For the cost that
it attains such a choice is optimal: of the masks that keep a weight in every layer, none with as many zeros and no
higher cost removes less squared magnitude (Everett, Generalized Lagrange multiplier method, 1963).

Where each weight of a layer costs the same, as with multiply-adds, that is one threshold over w^2 - lambda * cost. The
time of a layer is another function of its weights: an engine computes a layer that kept many with all of them, and then
one weight more costs nothing. As the threshold falls, such a layer keeps many weights more at once, so a number of
zeros between needs another threshold inside the pieces of the functions. That fits the budget; a better choice may
exist.
"""

import copy
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
ROUNDING = 1e-9  # of shares of multiply-adds, which are sums of fractions


@dataclass(frozen=True)
class Profile:
    """What a layer costs by the number of weights it keeps: a piecewise linear function that does not fall.

    `kept` (points,) rises from 0 to the layer's number of weights, `cost` (points,) are the costs there. ValueError
    for other functions.
    """

    kept: tuple[int, ...]
    cost: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.kept[0] != 0 or min(np.diff(self.kept)) <= 0 or min(np.diff(self.cost)) < 0:
            raise ValueError("the cost of a layer must not fall with the number of its weights")

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
    layers = _layers(network, [budget[0]], profiles, exclude)
    weights = sum(layer.size for layer in layers)

    def fits(kept: list[int]) -> bool:
        return _cost(layers, kept) <= budget[1] + ROUNDING and all(
            _cost(layers, _cheapest(layers, weights - zeros, kept)) <= cost + ROUNDING for zeros, cost in later
        )

    kept = _choose(layers, weights - budget[0], fits)
    return {layer.name: layer.mask(count) for layer, count in zip(layers, kept)}


def lowest_share(
    network: nn.Module, levels: Sequence[int], profiles: dict[str, Profile], exclude: Collection[str] = ()
) -> float:
    """The lowest share that pruning to so many zeros, one level after the other, can be asked for.

    Raises ValueError when the network has more zeros than the first level, and when a layer would lose all weights.
    """
    layers = _layers(network, levels, profiles, exclude)
    weights = sum(layer.size for layer in layers)
    return max(
        _cost(layers, _cheapest(layers, weights - zeros)) ** (1 / _steps(zeros, levels[-1], weights))
        for zeros in levels
    )


class _Layer:
    """A layer's weights by falling magnitude, and the pieces of its profile between the numbers that it may keep."""

    def __init__(self, name: str, weight: Tensor, profile: Profile):
        self.name, self.weight, self.profile = name, weight, profile
        self.size = weight.numel()
        self.available = self.size if weight.is_meta else int(weight.count_nonzero())
        self.least = min(1, self.available)
        inner = [point for point in profile.kept if self.least < point < self.available]
        self.points = np.array(sorted({self.least, *inner, self.available}))
        self.costs = np.interp(self.points, profile.kept, profile.cost)
        self.slopes = np.diff(self.costs) / np.diff(self.points)

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
        """How many weights are worth most, at this price of a unit of cost and with this threshold for each.

        Within a piece of the profile these are the weights above the threshold and the price of one.
        """
        if len(self.points) < 2:
            return int(self.points[0])
        starts = self.points[:-1]
        kept = np.searchsorted(self.sorted[0], -(threshold + price * self.slopes)).clip(starts, self.points[1:])
        costs = self.costs[:-1] + self.slopes * (kept - starts)
        return int(kept[np.argmax(self.squares[kept] - price * costs - threshold * kept)])

    def within(self, count: int, upwards: bool) -> "_Layer":
        """The layer as if its profile had one piece, that above or below so many weights."""
        layer = copy.copy(self)
        piece = int(np.searchsorted(self.points[1:-1], count, "right" if upwards else "left"))
        layer.points, layer.costs = self.points[piece : piece + 2], self.costs[piece : piece + 2]
        layer.slopes = self.slopes[piece : piece + 1]
        return layer

    def mask(self, count: int) -> Tensor:
        kept = torch.zeros(self.size, dtype=torch.bool)
        kept[self.sorted[1][:count]] = True
        return kept.view(self.weight.shape)


def _layers(
    network: nn.Module, levels: Sequence[int], profiles: dict[str, Profile], exclude: Collection[str]
) -> list[_Layer]:
    """The layers that can be pruned to so many zeros, one level after the other; ValueError as in `lowest_share`."""
    layers = [_Layer(name, weight, profiles[name]) for name, weight in pruning.prunable(network, exclude).items()]
    weights = sum(layer.size for layer in layers)
    pruned, most = weights - sum(layer.available for layer in layers), weights - sum(layer.least for layer in layers)
    if levels[0] < pruned:
        raise ValueError(f"cannot have {levels[0]} zeros: {pruned} weights are zero already")
    if levels[-1] > most:
        raise ValueError(f"cannot have {levels[-1]} zeros: every layer keeps a weight, so at most {most}")
    return layers


def _squares(layers: list[_Layer], kept: list[int]) -> float:
    return sum(float(layer.squares[count]) for layer, count in zip(layers, kept))


def _cost(layers: list[_Layer], kept: list[int]) -> float:
    return sum(layer.profile.at(count) for layer, count in zip(layers, kept))


def _choose(layers: list[_Layer], keep: int, fits: Callable[[list[int]], bool]) -> list[int]:
    """How many weights each layer keeps at the lowest price for which they fit; ValueError if none do."""
    kept, prices = _fit(layers, keep, fits)
    if all(len(layer.points) <= 2 for layer in layers):
        return kept
    for price in prices:  # inside the pieces where the layers are before and after a jump
        for counts, upwards in zip(_around(layers, keep, price), (True, False)):
            narrow = [layer.within(count, upwards) for layer, count in zip(layers, counts)]
            possible = sum(layer.points[0] for layer in narrow) <= keep <= sum(layer.points[-1] for layer in narrow)
            if possible and fits(_cheapest(narrow, keep)):
                kept = max(kept, _fit(narrow, keep, fits)[0], key=lambda kept: _squares(layers, kept))
    return kept


def _fit(layers: list[_Layer], keep: int, fits: Callable[[list[int]], bool]) -> tuple[list[int], set[float]]:
    """As `_choose`, where no layer jumps over a number of weights; and the prices between which it was found."""
    too_much, cheapest = _filled(*_around(layers, keep, 0.0), keep), _cheapest(layers, keep)
    if fits(too_much):
        return too_much, {0.0}
    if not fits(cheapest):
        raise ValueError(f"{keep} weights cost at least {_cost(layers, cheapest):.4g}, which is too much")
    whole = [int(layer.points[-1]) for layer in layers]
    usual = _squares(layers, whole) / _cost(layers, whole)
    fitting, low, high = cheapest, 0.0, 1.0  # the price over itself plus the usual one, up to an infinite price
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        kept = _filled(*_around(layers, keep, usual * middle / (1 - middle)), keep)
        if fits(kept):
            high, fitting = middle, max(fitting, kept, key=lambda kept: _squares(layers, kept))
        else:
            low, too_much = middle, kept
    between = _between(layers, too_much, fitting, fits)
    prices = {usual * part / (1 - part) for part in (low, high) if part < 1}
    return max(fitting, between, key=lambda kept: _squares(layers, kept)), prices


def _around(layers: list[_Layer], keep: int, price: float) -> tuple[list[int], list[int]]:
    """How many weights each layer keeps above and below the threshold where the sum passes `keep`."""
    highest = max((float(-layer.sorted[0][0]) for layer in layers if layer.available), default=0.0)
    steepest = max(float(max(layer.slopes, default=0.0)) for layer in layers)
    low, high = -price * steepest - 1.0, highest + 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        kept = [layer.count(price, middle) for layer in layers]
        if sum(kept) == keep:
            return kept, kept
        low, high = (middle, high) if sum(kept) > keep else (low, middle)
    return [layer.count(price, high) for layer in layers], [layer.count(price, low) for layer in layers]


def _filled(fewer: list[int], more: list[int], keep: int) -> list[int]:
    """`fewer` with what is missing to `keep` from `more`, by position."""
    kept = list(fewer)
    for index, count in enumerate(more):
        kept[index] += max(0, min(count - kept[index], keep - sum(kept)))
    return kept


def _cheapest(layers: list[_Layer], keep: int, most: list[int] | None = None) -> list[int]:
    """How many weights each layer keeps at a low cost, at most as many as `most` says.

    The lowest where the costs of each layer are convex. Others are filled along the largest convex functions below.
    """
    most = [int(layer.points[-1]) for layer in layers] if most is None else most
    kept = [min(int(layer.points[0]), limit) for layer, limit in zip(layers, most)]
    pieces = []
    for index, (layer, limit) in enumerate(zip(layers, most)):
        points = np.unique(layer.points.clip(max=limit))
        costs = np.interp(points, layer.profile.kept, layer.profile.cost)
        start = 0
        while start < len(points) - 1:
            slopes = (costs[start + 1 :] - costs[start]) / (points[start + 1 :] - points[start])
            end = start + 1 + int(np.argmin(slopes))
            pieces.append((float(slopes.min()), index, int(points[end] - points[start])))
            start = end
    left = keep - sum(kept)
    for _, index, size in sorted(pieces):
        if size > left:  # the last piece is not filled, so it may cost more for a weight than this function says
            able = [i for i, count in enumerate(kept) if count + left <= most[i]]
            costs = [layer.profile.at(count + left) - layer.profile.at(count) for layer, count in zip(layers, kept)]
            kept[min(able, key=costs.__getitem__)] += left
            break
        kept[index] += size
        left -= size
    return kept


def _between(layers: list[_Layer], costly: list[int], cheap: list[int], fits: Callable[[list[int]], bool]) -> list[int]:
    """Of the choices on a way between two, which may differ only in weights of equal score, the first that fits.

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
