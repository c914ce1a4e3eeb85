"""Pruning within a budget, against every mask of tiny networks."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import budgets
import models
import pruning
from budgets import Profile


def tiny(seed: int, ties: bool = False, pruned: int = 0) -> tuple[nn.Module, dict[str, Profile]]:
    """Ten weights in three layers, whose costs for one weight differ; the last layer's rise with their number."""
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        for layer in network:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            if ties:
                layer.weight.copy_(layer.weight.sign() * layer.weight.abs().mul(2).ceil().clamp(max=2))
        network[0].weight.view(-1)[:pruned] = 0
    profiles = {
        "0.weight": Profile((0, 4), (0.0, 36.0)),
        "1.weight": Profile((0, 2), (0.0, 2.0)),
        "2.weight": Profile((0, 1, 3, 4), (1.0, 2.0, 8.0, 13.0)),
    }
    return network, profiles


def every_mask(network: nn.Module, profiles: dict[str, Profile], zeros: int) -> list[tuple[float, float]]:
    """Cost and removed squared magnitude of every mask that keeps a weight of each layer and revives none."""
    weights = pruning.prunable(network)
    values = torch.cat([weight.detach().flatten().double() for weight in weights.values()]).numpy()
    sizes = [weight.numel() for weight in weights.values()]
    found = []
    for kept in itertools.combinations(range(len(values)), len(values) - zeros):
        keep = np.zeros(len(values), bool)
        keep[list(kept)] = True
        counts = [int(part.sum()) for part in np.split(keep, np.cumsum(sizes)[:-1])]
        if min(counts) > 0 and not (keep & (values == 0)).any():
            cost = sum(profile.at(count) for profile, count in zip(profiles.values(), counts))
            found.append((cost, float((values[~keep] ** 2).sum())))
    return found


def measured(network: nn.Module, profiles: dict[str, Profile], masks: pruning.Masks) -> tuple[float, float]:
    weights = pruning.prunable(network)
    cost = sum(profiles[name].at(int(mask.sum())) for name, mask in masks.items())
    return cost, sum(float(weights[name].detach()[~mask].double().square().sum()) for name, mask in masks.items())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("ties", "pruned"), [(False, 0), (True, 0), (False, 2), (True, 1)])
def test_no_mask_with_as_many_zeros_and_no_higher_cost_removes_less(seed, ties, pruned):
    network, profiles = tiny(seed, ties, pruned)
    for zeros in range(max(1, pruned), 8):
        masks = every_mask(network, profiles, zeros)
        lowest, highest = min(masks)[0], max(masks)[0]
        assert budgets.lowest_cost(network, zeros, profiles) == pytest.approx(lowest)
        for budget in np.linspace(lowest, highest, 9):
            chosen = budgets.compute_masks(network, zeros, profiles, budget + 1e-9)
            cost, removed = measured(network, profiles, chosen)
            assert sum(int((~mask).sum()) for mask in chosen.values()) == zeros
            assert cost <= budget + 1e-6
            assert removed <= min(other for price, other in masks if price <= cost + 1e-9) + 1e-9


def test_the_largest_optimal_mask_that_fits_is_taken():
    """Optimal for some price are the corners of the convex hull of cost and removed magnitude."""
    network, profiles = tiny(11)
    masks = every_mask(network, profiles, 5)
    prices = np.linspace(0, 2, 4001)
    corners = sorted({min(masks, key=lambda mask: mask[1] + price * mask[0]) for price in prices})
    assert len(corners) == 4
    for low, high in itertools.pairwise(corners):
        for budget in (low[0] + 1e-9, (low[0] + high[0]) / 2, high[0] - 1e-6):
            cost, removed = measured(network, profiles, budgets.compute_masks(network, 5, profiles, budget))
            assert (cost, removed) == (pytest.approx(low[0]), pytest.approx(low[1]))


def test_a_budget_that_does_not_bind_gives_global_magnitude_pruning():
    torch.manual_seed(0)
    network = models.build("resnet20", 10)
    profiles = budgets.mac_profiles(network, 32)
    zeros = 200_000
    masks = budgets.compute_masks(network, zeros, profiles, 1e12)
    expected = pruning.compute_masks(network, zeros)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def test_zeros_and_multiply_adds_of_a_network_are_as_asked():
    torch.manual_seed(0)
    network = models.build("resnet20", 10)
    profiles = budgets.mac_profiles(network, 32)
    dense = sum(profile.cost[-1] for profile in profiles.values())
    zeros = round(0.9 * 267_824)
    lowest = budgets.lowest_cost(network, zeros, profiles) / dense
    assert lowest < 0.05
    for share in (1.001 * lowest, 0.06, 0.1):
        masks = budgets.compute_masks(network, zeros, profiles, share * dense)
        pruned = models.build("resnet20", 10)
        pruned.load_state_dict(network.state_dict())
        pruning.apply(pruned, masks)
        assert sum(found for found, _ in pruning.count_zeros(pruned).values()) == zeros
        left = sum(nonzero for _, nonzero in pruning.count_macs(pruned, 32).values())
        assert left <= share * dense
        assert left > 0.999 * share * dense or share < 1.01 * lowest
        again = budgets.compute_masks(pruned, zeros, profiles, share * dense)
        assert all(torch.equal(masks[name], again[name]) for name in masks), "zeros stay zeros"


@pytest.mark.parametrize(
    ("zeros", "budget", "message"),
    [
        (8, 100.0, "^cannot have 8 zeros: every layer keeps a weight, so at most 7$"),
        (0, 100.0, "^cannot have 0 zeros: 1 weights are zero already$"),
        (5, 10.0, "^at least 16 is needed, and 10 allowed$"),
    ],
)
def test_what_is_not_possible_is_refused(zeros, budget, message):
    network, profiles = tiny(0, pruned=1)
    with pytest.raises(ValueError, match=message):
        budgets.compute_masks(network, zeros, profiles, budget)


def test_costs_that_are_not_convex_are_refused():
    for kept, cost in ((0, 2, 4), (0.0, 3.0, 4.0)), ((0, 2), (1.0, 0.0)), ((1, 2), (0.0, 1.0)):
        with pytest.raises(ValueError, match="convex"):
            Profile(kept, cost)
