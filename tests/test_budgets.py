"""Pruning within a budget, against every mask of tiny networks."""

import copy
import itertools
import math

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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ties", "pruned"), [(False, 0), (True, 0), (False, 2), (True, 1)])
def test_no_mask_with_as_many_zeros_and_no_higher_cost_removes_less(seed, ties, pruned):
    network, profiles = tiny(seed, ties, pruned)
    for zeros in range(max(1, pruned), 8, 3):
        masks = every_mask(network, profiles, zeros)
        lowest, highest = min(masks)[0], max(masks)[0]
        assert budgets.lowest_share(network, [zeros], profiles) == pytest.approx(lowest)
        for budget in np.linspace(lowest, highest, 7):
            chosen = budgets.compute_masks(network, (zeros, budget), profiles)
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
            cost, removed = measured(network, profiles, budgets.compute_masks(network, (5, budget), profiles))
            assert (cost, removed) == (pytest.approx(low[0]), pytest.approx(low[1]))


def test_a_budget_that_does_not_bind_gives_global_magnitude_pruning():
    torch.manual_seed(0)
    network = models.build("resnet20", 10)
    profiles = budgets.mac_profiles(network, 32)
    zeros = 200_000
    masks = budgets.compute_masks(network, (zeros, 1.0), profiles)
    expected = pruning.compute_masks(network, zeros)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def test_zeros_and_multiply_adds_of_a_network_are_as_asked():
    torch.manual_seed(0)
    network = models.build("resnet20", 10)
    profiles = budgets.mac_profiles(network, 32)
    zeros = round(0.9 * 268_336)
    for share in (0.0416, 0.06, 0.08):
        masks = budgets.compute_masks(network, (zeros, share), profiles)
        pruned = copy.deepcopy(network)
        pruning.apply(pruned, masks)
        assert sum(found for found, _ in pruning.count_zeros(pruned).values()) == zeros
        macs = pruning.count_macs(pruned, 32).values()
        left = sum(nonzero for _, nonzero in macs) / sum(dense for dense, _ in macs)
        assert share - 1e-5 < left <= share
        again = budgets.compute_masks(pruned, (zeros, share), profiles)
        assert all(torch.equal(masks[name], again[name]) for name in masks), "zeros stay zeros"


@pytest.mark.parametrize("sparsity", [0.9, 0.5])
@pytest.mark.parametrize("factor", [1.0001, 1.02, 1.5])
def test_no_level_takes_what_later_levels_need(sparsity, factor):
    """Levels that think of themselves alone prune weights for which later ones have no other of so low a cost."""
    torch.manual_seed(0)
    network = models.build("resnet20", 10)
    profiles = budgets.mac_profiles(network, 32)
    weights = sum(weight.numel() for weight in pruning.prunable(network).values())
    levels = pruning.schedule(weights, sparsity, 0.2)
    share = factor * budgets.lowest_share(network, levels, profiles)
    plan = list(zip(levels, budgets.shares(levels, weights, share)))
    assert plan[-1] == (levels[-1], share)
    exponent = math.log(share) / math.log(1 - sparsity)
    assert plan[0][1] == pytest.approx((1 - levels[0] / weights) ** exponent, rel=1e-3)
    for index, (zeros, allowed) in enumerate(plan):
        masks = budgets.compute_masks(network, plan[index], profiles, later=plan[index + 1 :])
        pruning.apply(network, masks)
        macs = pruning.count_macs(network, 32).values()
        left = sum(nonzero for _, nonzero in macs) / sum(dense for dense, _ in macs)
        assert sum(found for found, _ in pruning.count_zeros(network).values()) == zeros
        assert left <= allowed + 1e-9


def flat(seed: int) -> tuple[nn.Module, dict[str, Profile]]:
    """Two layers, which cost with a quarter of their weights what they cost with all."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(20, 20, bias=False))
    profiles = {"0.weight": Profile((0, 25, 100), (0.0, 0.3, 0.3)), "1.weight": Profile((0, 100, 400), (0.0, 0.7, 0.7))}
    return network, profiles


def stairs(seed: int) -> tuple[nn.Module, dict[str, Profile]]:
    """Three layers whose costs rise in steps of random height and length."""
    random = np.random.default_rng(seed)
    network, profiles = nn.Sequential(), {}
    for layer in range(3):
        network.append(nn.Linear(8, 5, bias=False))
        torch.nn.init.trunc_normal_(network[layer].weight, std=random.uniform(0.5, 2))
        points = np.sort(random.choice(np.arange(1, 40), 5, replace=False))
        costs = np.cumsum(random.exponential(size=7) * random.integers(0, 2, 7))
        profiles[f"{layer}.weight"] = Profile((0, *map(int, points), 40), tuple(costs))
    return network, profiles


def every_choice(network: nn.Module, profiles: dict[str, Profile], keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Cost and removed squared magnitude of every choice of how many of its largest weights each layer keeps."""
    removed, costs = [], []
    for name, weight in pruning.prunable(network).items():
        squares = weight.detach().double().square().flatten().sort().values
        removed.append(squares.sum().item() - squares.flip(0).cumsum(0).numpy())
        costs.append(np.array([profiles[name].at(kept + 1) for kept in range(len(squares))]))
    counts = np.indices([len(part) for part in costs]) + 1
    fits = counts.sum(0) == keep
    total, lost = (sum(part[count[fits] - 1] for part, count in zip(values, counts)) for values in (costs, removed))
    return total, lost


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("make", "keep"), [(flat, 50), (flat, 166), (stairs, 12), (stairs, 40)])
def test_costs_that_are_not_convex_lose_little_or_nothing_against_every_choice(make, keep, seed):
    network, profiles = make(seed)
    zeros = sum(weight.numel() for weight in pruning.prunable(network).values()) - keep
    costs, removed = every_choice(network, profiles, keep)
    lowest = budgets.lowest_share(network, [zeros], profiles)
    assert lowest >= costs.min() - 1e-9
    losses = []
    for budget in np.linspace(lowest, costs.max(), 9):
        masks = budgets.compute_masks(network, (zeros, budget), profiles)
        cost, found = measured(network, profiles, masks)
        assert sum(int(mask.sum()) for mask in masks.values()) == keep and cost <= budget + 1e-8
        losses.append(found / removed[costs <= budget + 1e-8].min() - 1)
    assert min(losses) > -1e-9 and np.mean(losses) < 0.031
    if (make, keep) == (flat, 50):
        assert max(losses) < 1e-9


def test_a_target_without_zeros_costs_what_the_dense_network_costs():
    network, profiles = tiny(0)
    assert budgets.lowest_share(network, [0], profiles) == pytest.approx(36 + 2 + 13)


def test_layers_that_stay_dense_count_in_the_budget():
    network = models.build("resnet20", 10)
    exclude = ["layer1"]
    weights = sum(weight.numel() for weight in pruning.prunable(network, exclude).values())
    zeros = round(0.8 * weights)
    profiles = budgets.mac_profiles(network, 32, exclude)
    assert budgets.lowest_share(network, [zeros], profiles, exclude) > 0.34, "layer1 alone has a third"
    pruning.apply(network, budgets.compute_masks(network, (zeros, 0.44), profiles, exclude))
    macs = pruning.count_macs(network, 32).values()
    assert 0.439 < sum(nonzero for _, nonzero in macs) / sum(dense for dense, _ in macs) <= 0.44
    assert all(value.all() for name, value in pruning.prunable(network).items() if name.startswith("layer1"))


@pytest.mark.parametrize(
    ("zeros", "budget", "message"),
    [
        (8, 100.0, "^cannot have 8 zeros: every layer keeps a weight, so at most 7$"),
        (0, 100.0, "^cannot have 0 zeros: 1 weights are zero already$"),
        (5, 10.0, "^5 weights cost at least 16, which is too much$"),
    ],
)
def test_what_is_not_possible_is_refused(zeros, budget, message):
    network, profiles = tiny(0, pruned=1)
    with pytest.raises(ValueError, match=message):
        budgets.compute_masks(network, (zeros, budget), profiles)


def test_costs_that_fall_are_refused():
    for kept, cost in ((0, 2, 4), (0.0, 3.0, 2.0)), ((0, 2), (1.0, 0.0)), ((1, 2), (0.0, 1.0)), ((0, 2, 2), (0, 1, 2)):
        with pytest.raises(ValueError, match="must not fall"):
            Profile(kept, cost)
