"""A limit on what one image costs: `--macs`, a share of the multiply-adds, or `--ms`, a time by a profile of a device.

`budgets` chooses the weights that keep a limit.
"""

import argparse
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import budgets
import profiles
import pruning
from utils import Failure


@dataclass(frozen=True)
class Limit:
    """One image costs at most `asked`, and `dense` in the dense network: both shares, or both milliseconds.

    `costs` returns the cost of each layer by the number of weights it keeps, as shares of `dense`. It gets the network
    and the names of the layers that stay dense. `settings` are what results depend on; `predicted` returns what files
    say about the cost of a network.

    Where the cost falls with every weight (`each_level`) each level of iterative pruning has a limit of its own. A time
    does not: layers with many weights take as long as dense ones, and could only be faster without any. There the last
    level is planned on the dense network, and the others approach it.
    """

    flag: str
    asked: float
    dense: float
    settings: dict[str, Any]
    each_level: bool
    costs: Callable[[nn.Module, Collection[str]], dict[str, budgets.Profile]]
    predicted: Callable[[nn.Module], dict[str, Any]] = field(default=lambda _network: {})

    def check(self, network: nn.Module, levels: Sequence[int], exclude: Collection[str]) -> None:
        """Failure when pruning to so many zeros, one level after the other, cannot keep the limit."""
        costs = self.costs(network, exclude)
        try:
            lowest = budgets.lowest_share(network, levels if self.each_level else levels[-1:], costs, exclude)
        except ValueError as error:
            raise Failure(f"argument --{self.flag}: {error}") from None
        lowest, highest = lowest - budgets.ROUNDING, 1 + budgets.ROUNDING
        if not lowest <= self.asked / self.dense <= highest:
            unit = 10 ** max(-4, math.floor(math.log10(self.dense)) - 5)  # at most six digits
            least, most = math.ceil(lowest * self.dense / unit) * unit, math.floor(highest * self.dense / unit) * unit
            sparsity = round(100 * levels[-1] / _weights(network, exclude), 3)
            limits = f"with {sparsity:g} % zeros it can be from {least:g} to {most:g}"
            raise Failure(f"argument --{self.flag}: {limits}, not {self.asked:g}")

    def compute_masks(
        self, dense: nn.Module, network: nn.Module, zeros: int, levels: Sequence[int], exclude: Collection[str]
    ) -> pruning.Masks:
        """Masks with exactly `zeros` pruned weights, for the first of the levels that are left of a schedule."""
        share = self.asked / self.dense
        if self.each_level:
            first, *later = zip(levels, budgets.shares(levels, _weights(network, exclude), share))
            costs = self.costs(network, exclude)
            return budgets.compute_masks(network, (zeros, first[1]), costs, exclude, later)
        final = budgets.compute_masks(dense, (levels[-1], share), self.costs(dense, exclude), exclude)
        return pruning.approach(network, final, zeros)


def of(args: argparse.Namespace, network: nn.Module) -> Limit | None:
    """The limit that the command line asks for. Failure where it needs a profile and there is none of the network."""
    if args.macs:

        def costs(network: nn.Module, exclude: Collection[str]) -> dict[str, budgets.Profile]:
            return budgets.mac_profiles(network, args.image_size, exclude)

        return Limit("macs", args.macs, 1.0, {"macs": args.macs}, True, costs)
    if args.ms:
        path = args.profile or args.checkpoint_dir / profiles.NAME
        profile = profiles.read(path, network, args.arch, args.image_size)
        settings = {"ms": args.ms, "profile": profile.identity}
        return Limit("ms", args.ms, profile.dense_ms, settings, False, profile.shares, profile.predicted)
    return None


def _weights(network: nn.Module, exclude: Collection[str]) -> int:
    return sum(weight.numel() for weight in pruning.prunable(network, exclude).values())
