"""Which weights are pruned, how many, and that they stay pruned."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_resnet18 import ResNet18
from torch import nn
from torch.nn import functional as F

import models
import pruning

repeatable = settings(deadline=None, derandomize=True)
EVERY = pytest.mark.parametrize("allocation", pruning.ALLOCATIONS)


def network(*, ties: bool = False, zeros: float = 0.0) -> nn.Module:
    """Three layers of 216, 40 and 140 weights; with `ties` many of them have the same magnitude."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1, bias=False), nn.Flatten(), nn.Linear(20, 7)
    )
    with torch.no_grad():
        for weight in pruning.prunable(net).values():
            if ties:
                weight.copy_(weight.sign() * ((weight.abs() * 20).round() + 1) / 20)
            weight[torch.rand_like(weight) < zeros] = 0
    return net


def linear_layers(*shapes: tuple[int, int]) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for inputs, outputs in shapes))


def flat(values: dict) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in values.values()])


def zeros_of(masks: pruning.Masks) -> list[int]:
    return [int((~mask).sum()) for mask in masks.values()]


def same(one: pruning.Masks, other: pruning.Masks) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- What can be pruned --------------------------------------------------------------------------------------------


def test_weights_of_convolutions_and_linear_layers_are_prunable_in_the_order_of_the_modules():
    net = network()
    assert list(pruning.prunable(net)) == ["0.weight", "2.weight", "4.weight"]
    assert pruning.prunable(net)["2.weight"] is net[2].weight


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        (["linear"], ["linear"]),
        (["conv1"], ["conv1"]),  # and not layer1.0.conv1
        (["layer1.2"], ["layer1.2.conv1", "layer1.2.conv2"]),
        (["layer2"], [f"layer2.{block}.conv{conv}" for block in (0, 1, 2) for conv in (1, 2)]),
        (["layer3.0.conv2", "linear"], ["layer3.0.conv2", "linear"]),
        (["linear", "linear"], ["linear"]),
        (["layer1.2", "layer1.2.conv1"], ["layer1.2.conv1", "layer1.2.conv2"]),
    ],
)
def test_excluded_layers_and_containers_are_not_prunable(exclude, left_out):
    with torch.device("meta"):
        net = models.build("resnet20", 10)
    everything, rest = pruning.prunable(net), pruning.prunable(net, exclude)
    assert list(rest) == [name for name in everything if name.removesuffix(".weight") not in left_out]
    assert len(everything) == len(rest) + len(left_out)


@pytest.mark.parametrize("unknown", ["layer9", "layer", "linear.weight", "bn1", "layer1.0.shortcut", ""])
def test_a_name_that_fits_no_layer_is_refused(unknown):
    net = models.build("resnet20", 10)
    for function in pruning.prunable, pruning.count_zeros, pruning.sparsity:
        with pytest.raises(ValueError, match=f"no convolution or linear layer {unknown}$"):
            function(net, ["conv1", unknown])
    with pytest.raises(ValueError, match=f"no convolution or linear layer {unknown}$"):
        pruning.compute_masks(net, 100, "global", [unknown])


@EVERY
def test_excluded_layers_have_no_mask_and_do_not_count(allocation):
    net = models.build("resnet20", 10)
    exclude = ["conv1", "layer1"]
    with torch.no_grad():
        net.conv1.weight.zero_()  # zeros in an excluded layer are not pruned weights
    weights = 268_336 - 432 - 6 * 2304
    zeros = round(0.9 * weights)
    masks = pruning.compute_masks(net, zeros, allocation, exclude)
    assert list(masks) == list(pruning.prunable(net, exclude))
    assert sum(zeros_of(masks)) == zeros
    pruning.apply(net, masks)
    assert pruning.sparsity(net, exclude) == zeros / weights
    assert all(weight.all() for name, weight in net.named_parameters() if name.startswith("layer1.0.conv"))


def test_zeros_are_counted_in_each_layer():
    net = network()
    with torch.no_grad():
        net[0].weight.view(-1)[:7] = 0.0
        net[2].weight.view(-1)[3] = -0.0
    assert pruning.count_zeros(net) == {"0.weight": (7, 216), "2.weight": (1, 40), "4.weight": (0, 140)}
    assert pruning.count_zeros(net, ["0"]) == {"2.weight": (1, 40), "4.weight": (0, 140)}
    assert pruning.sparsity(net) == 8 / 396
    assert pruning.sparsity(net, ["0"]) == 1 / 180


# --- How much ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sparsity", "steps"), [(0.5, 6), (0.75, 12), (0.9, 20)])
def test_the_iterative_schedule_has_the_classic_number_of_steps(sparsity, steps):
    weights = 11_164_352
    levels = pruning.schedule(weights, sparsity, 0.11)
    assert len(levels) == steps
    assert levels[-1] == round(sparsity * weights)
    left = weights
    for zeros in levels[:-1]:
        left -= round(0.11 * left)
        assert weights - zeros == left


@repeatable
@given(weights=st.integers(1, 10**7), sparsity=st.floats(0, 1, exclude_max=True), step=st.floats(0.01, 0.99))
def test_every_schedule_rises_to_exactly_its_target(weights, sparsity, step):
    levels = pruning.schedule(weights, sparsity, step)
    assert levels[-1] == round(sparsity * weights)
    assert all(low < high for low, high in itertools.pairwise(levels))
    assert levels[0] > 0 or levels == [0]


@repeatable
@given(weights=st.integers(1, 10**6), sparsities=st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2))
def test_targets_share_their_steps(weights, sparsities):
    low, high = (pruning.schedule(weights, sparsity, 0.11) for sparsity in sorted(sparsities))
    assert low[:-1] == high[: len(low) - 1]


def test_a_schedule_continues_from_the_zeros_that_exist():
    levels = pruning.schedule(1000, 0.5, 0.1)
    assert levels == [100, 190, 271, 344, 410, 469, 500]
    for index, zeros in enumerate(levels[:-1]):
        assert pruning.schedule(1000, 0.5, 0.1, zeros) == levels[index + 1 :]
    assert pruning.schedule(1000, 0.5, 0.1, 450) == [500]  # not 505
    assert pruning.schedule(1000, 0.5, 0.1, 500) == [500]


@pytest.mark.parametrize(
    ("allocation", "most"), [("global", 396 - 1), ("uniform", 40 - 1), ("erk", 396 - 3), ("lamp", 396 - 3)]
)
def test_no_more_weights_are_pruned_than_an_allocation_can(allocation, most):
    net = network()
    assert pruning.max_zeros(net, allocation) == most
    masks = pruning.compute_masks(net, most, allocation)
    assert sum(zeros_of(masks)) == most
    with pytest.raises(ValueError, match=f"cannot have {most + 1} zeros"):
        pruning.compute_masks(net, most + 1, allocation)


@EVERY
def test_weights_that_are_zero_stay_pruned_and_count(allocation):
    net = network(zeros=0.3)
    pruned = flat(pruning.prunable(net)) == 0
    count = int(pruned.sum())
    assert torch.equal(flat(pruning.compute_masks(net, count, allocation)), ~pruned)
    with pytest.raises(ValueError, match=f"^cannot have {count - 1} zeros: {count} weights are zero already$"):
        pruning.compute_masks(net, count - 1, allocation)
    net[4].weight.data[net[4].weight == 0] = -0.0
    assert torch.equal(flat(pruning.compute_masks(net, count, allocation)), ~pruned)


def test_global_pruning_leaves_the_largest_weight_at_least():
    net = network()
    magnitude = flat(pruning.prunable(net)).abs()
    kept = flat(pruning.compute_masks(net, 395))
    assert magnitude[kept].tolist() == [magnitude.max()]


# --- Which weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("zeros", [0.0, 0.3])
@pytest.mark.parametrize("share", [0.0, 0.11, 0.5, 0.75, 0.9, 0.997])
def test_one_threshold_on_the_magnitude_decides_over_all_layers(ties, zeros, share):
    net = network(ties=ties, zeros=zeros)
    magnitude = flat(pruning.prunable(net)).abs()
    pruned = int((magnitude == 0).sum())
    count = pruned + round(share * (len(magnitude) - pruned))
    kept = flat(pruning.compute_masks(net, count))
    assert int((~kept).sum()) == count
    # The pruned magnitudes are, as a sorted list, the smallest ones of a plain sort; ties may fall either way.
    assert torch.equal(magnitude[~kept].sort().values, magnitude.sort().values[:count])


@EVERY
def test_pruning_one_weight_at_a_time_ends_where_pruning_at_once_does(allocation):
    """So masks only shrink, counts are exact, and no layer has to give a zero back (the Alabama paradox)."""
    net, dense = network(), network()
    most = pruning.max_zeros(net, allocation)
    for zeros in range(most + 1):
        at_once = pruning.compute_masks(dense, zeros, allocation)
        assert sum(zeros_of(at_once)) == zeros
        assert same(pruning.compute_masks(net, zeros, allocation), at_once)
        pruning.apply(net, at_once)
    assert sum(zeros_of(at_once)) == most


@EVERY
@repeatable
@given(data=st.data())
def test_every_allocation_is_exact_and_revives_nothing_whatever_training_does(allocation, data):
    net, before = network(ties=True), None
    most = pruning.max_zeros(net, allocation)
    for zeros in sorted(data.draw(st.lists(st.integers(0, most), min_size=1, max_size=4))):
        masks = pruning.compute_masks(net, zeros, allocation)
        assert sum(zeros_of(masks)) == zeros
        if before:
            assert not (flat(masks) & ~flat(before)).any(), "a pruned weight came back"
        if allocation != "global":
            assert all(mask.any() for mask in masks.values()), "a layer is empty"
        with torch.no_grad():
            for name, weight in pruning.prunable(net).items():
                weight.normal_().mul_(masks[name])
        before = masks


@EVERY
def test_ties_fall_the_same_way_with_any_number_of_threads_and_any_layout(allocation):
    net = models.build("resnet20", 10)
    with torch.no_grad():
        for weight in pruning.prunable(net).values():  # four magnitudes, the same in every layer
            weight.copy_(torch.arange(1, weight.numel() + 1).view(weight.shape) % 4 + 1)
    masks = pruning.compute_masks(net, 200_000, allocation)
    assert sum(zeros_of(masks)) == 200_000
    assert same(pruning.compute_masks(net, 200_000, allocation), masks)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert same(pruning.compute_masks(net, 200_000, allocation), masks)
        torch.set_num_threads(3)
        assert same(pruning.compute_masks(net, 200_000, allocation), masks)
    finally:
        torch.set_num_threads(threads)
    assert same(pruning.compute_masks(net.to(memory_format=torch.channels_last), 200_000, allocation), masks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY
def test_a_gpu_computes_the_same_masks(allocation):
    net = models.build("resnet20", 10)
    masks = pruning.compute_masks(net, 200_000, allocation)
    assert same(pruning.compute_masks(net.cuda(), 200_000, allocation), masks)


@EVERY
def test_layers_lose_their_smallest_magnitudes(allocation):
    net = models.build("resnet20", 10)
    for mask, weight in zip(
        pruning.compute_masks(net, 200_000, allocation).values(), pruning.prunable(net).values(), strict=True
    ):
        magnitude = weight.detach().abs()
        assert mask.all() or magnitude[~mask].max() <= magnitude[mask].min()


def test_uniform_prunes_the_same_share_of_every_layer_but_the_first_and_the_last():
    net = linear_layers((1, 10), (10, 10), (10, 20), (20, 15), (15, 2))  # 10, 100, 200, 300 and 30 weights
    assert zeros_of(pruning.compute_masks(net, 300, "uniform")) == [0, 50, 100, 150, 0]
    assert zeros_of(pruning.compute_masks(net, 540, "uniform")) == [0, 90, 180, 270, 0]
    assert zeros_of(pruning.compute_masks(net, 597, "uniform")) == [0, 99, 199, 299, 0]
    # 16 weights of 50, 100 and 350 are shares of 1.6, 3.2 and 11.2; they are rounded, not cut off.
    net = linear_layers((1, 5), (5, 10), (10, 10), (10, 35), (35, 2))
    assert zeros_of(pruning.compute_masks(net, 484, "uniform")) == [0, 50 - 2, 100 - 3, 350 - 11, 0]


def test_uniform_prunes_layers_of_a_resnet_alike():
    net = models.build("resnet20", 10)
    zeros = zeros_of(pruning.compute_masks(net, 241_502, "uniform"))
    sizes = [weight.numel() for weight in pruning.prunable(net).values()]
    assert zeros[0] == zeros[-1] == 0
    share = 241_502 / sum(sizes[1:-1])
    assert all(abs(z - share * size) < 1 for z, size in zip(zeros[1:-1], sizes[1:-1]))


def test_uniform_keeps_the_first_and_the_last_layer_of_the_network_dense_whatever_is_excluded():
    net = linear_layers((1, 10), (10, 10), (10, 20), (20, 15), (15, 2))
    assert pruning.max_zeros(net, "uniform", ["0", "1"]) == 200 + 300 - 2
    assert zeros_of(pruning.compute_masks(net, 250, "uniform", ["0", "1"])) == [100, 150, 0]
    assert zeros_of(pruning.compute_masks(net, 250, "uniform", ["1", "4"])) == [0, 100, 150]


def test_erk_keeps_as_many_weights_as_the_dimensions_of_a_layer_say():
    net = linear_layers((20, 30), (30, 40), (40, 10))  # 50, 70 and 50 dimensions; 600, 1200 and 400 weights
    assert zeros_of(pruning.compute_masks(net, 2200 - 170, "erk")) == [600 - 50, 1200 - 70, 400 - 50]
    assert zeros_of(pruning.compute_masks(net, 2200 - 850, "erk")) == [600 - 250, 1200 - 350, 400 - 250]
    # Nine weights a dimension would be 450 of 400: the last layer is dense, and the others share the rest.
    assert zeros_of(pruning.compute_masks(net, 2200 - 400 - 1080, "erk")) == [600 - 450, 1200 - 630, 0]


@pytest.mark.parametrize("target", [20_000, 135_000, 241_502, 265_000])
def test_erk_densities_are_in_proportion_to_the_dimensions_of_the_layers(target):
    net = models.build("resnet20", 10)
    weights = pruning.prunable(net).values()
    raw = [sum(weight.shape) / weight.numel() for weight in weights]
    low, high = 0.0, 1e6  # by bisection, to know the factor without the code's way of finding it
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(min(1, middle * r) * weight.numel() for r, weight in zip(raw, weights))
        low, high = (middle, high) if kept < sum(w.numel() for w in weights) - target else (low, middle)
    for zeros, r, weight in zip(zeros_of(pruning.compute_masks(net, target, "erk")), raw, weights):
        assert abs(zeros - (1 - min(1, low * r)) * weight.numel()) < 1


@pytest.mark.parametrize("zeros", [0, 1, 100, 300, 390, 393])
def test_lamp_is_one_threshold_on_the_scores_of_its_paper(zeros):
    net = network()
    scores = {}
    for name, weight in pruning.prunable(net).items():
        squares = weight.detach().double().square().flatten()
        scores[name] = torch.stack([square / squares[squares >= square].sum() for square in squares])
    masks = pruning.compute_masks(net, zeros, "lamp")
    kept, every = flat(masks), flat(scores)
    assert int((~kept).sum()) == zeros
    assert zeros == 0 or every[~kept].max() < every[kept].min()


@pytest.mark.parametrize(
    ("allocation", "layer", "name"), [("uniform", 0, "0.weight"), ("uniform", 2, "2.weight"), ("erk", 1, "1.weight")]
)
def test_an_allocation_that_would_have_to_revive_a_weight_is_refused(allocation, layer, name):
    """All zeros are in one layer, which has more of them than its share."""
    net = linear_layers((20, 20), (20, 20), (20, 20), (20, 20))
    with torch.no_grad():
        net[layer].weight.view(-1)[:300] = 0.0
    share = {"uniform": 0 if layer == 0 else 200, "erk": 100}[allocation]
    message = f"allocation {allocation} would have to revive {300 - share} pruned weights of {name}$"
    with pytest.raises(ValueError, match=message):
        pruning.compute_masks(net, 400, allocation)
    for other in "global", "lamp":
        masks = pruning.compute_masks(net, 400, other)
        assert sum(zeros_of(masks)) == 400
        assert not masks[name].view(-1)[:300].any()


def test_an_allocation_takes_zeros_that_fit_its_shares():
    net = linear_layers((20, 20), (20, 20), (20, 20), (20, 20))
    with torch.no_grad():
        net[1].weight.view(-1)[:200] = 0.0
    assert zeros_of(pruning.compute_masks(net, 400, "uniform")) == [0, 200, 200, 0]
    assert zeros_of(pruning.compute_masks(net, 800, "erk")) == [200] * 4


def test_layers_approach_their_densities_in_equal_powers():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(30, 20, bias=False), nn.Linear(10, 10, bias=False))
    dense = copy.deepcopy(network)
    goals = {"0.weight": 1, "1.weight": 240, "2.weight": 100}
    final = {}
    for name, weight in pruning.prunable(network).items():
        kept = torch.zeros(weight.numel(), dtype=torch.bool)
        kept[weight.detach().abs().flatten().argsort(descending=True)[: goals[name]]] = True
        final[name] = kept.view(weight.shape)
    before = {name: weight != 0 for name, weight in pruning.prunable(network).items()}
    for zeros in (100, 300, 500, 700, 759):
        masks = pruning.approach(network, final, zeros)
        kept = [int(mask.sum()) for mask in masks.values()]
        assert sum(kept) == 1100 - zeros
        assert all(bool((before[name] | ~mask).all()) for name, mask in masks.items()), "a weight was revived"
        powers = [math.log(kept[0] / 400) / math.log(1 / 400), math.log(kept[1] / 600) / math.log(240 / 600)]
        assert powers[0] == pytest.approx(powers[1], abs=0.05) and kept[2] == 100
        pruning.apply(network, masks)
        before = masks
    assert all(torch.equal(masks[name], final[name]) for name in final)
    assert all(torch.equal(pruning.approach(dense, final, 759)[name], final[name]) for name in final)


def test_a_layer_that_is_zero_already_approaches_nothing():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(20, 20, bias=False))
    nn.init.zeros_(network[0].weight)
    final = pruning.compute_masks(network, 450)
    for zeros in (100, 300, 450):
        masks = pruning.approach(network, final, zeros)
        assert [int(mask.sum()) for mask in masks.values()] == [0, 500 - zeros]


# --- They stay pruned ----------------------------------------------------------------------------------------------


def test_applying_masks_touches_only_weights_of_convolutions_and_linear_layers():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    masks = pruning.compute_masks(net, 300)
    pruning.apply(net, masks)
    for name, value in net.state_dict().items():
        expected = torch.where(masks[name], before[name], 0.0) if name in masks else before[name]
        assert torch.equal(value, expected) and not value[value == 0].float().signbit().any(), name
    assert set(net.state_dict()) == set(before)


def test_computing_masks_leaves_the_network_as_it_was():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pruning.compute_masks(net, 300)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert set(net.state_dict()) == set(before)
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pruned_weights_stay_zero_through_momentum_and_weight_decay(layout):
    net = network().to(memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=0.1)
    for _ in range(3):  # momentum that would move every weight
        net(torch.randn(4, 3, 4, 4)).square().sum().backward()
        optimizer.step()
    masks = pruning.compute_masks(net, 300)
    pruning.apply(net, masks)
    start = {name: weight.detach().clone() for name, weight in pruning.prunable(net).items()}
    mask = pruning.mask_fn(net, masks)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        weights = pruning.prunable(net)
        assert all(weight[~masks[name]].any() for name, weight in weights.items()), "nothing moves them"
        kept = {name: weight.detach()[masks[name]].clone() for name, weight in weights.items()}
        mask()
        for name, weight in weights.items():
            assert (weight[~masks[name]] == 0).all()
            assert torch.equal(weight[masks[name]], kept[name])
    for name, weight in pruning.prunable(net).items():
        assert (weight[masks[name]] != start[name][masks[name]]).all()
    pruning.apply(net, masks)
    zeros = torch.cat([weight[~masks[name]].detach() for name, weight in pruning.prunable(net).items()])
    assert not zeros.signbit().any(), "a pruned weight is -0.0"


def test_no_masks_mask_nothing():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pruning.mask_fn(net, {})()
    pruning.apply(net, {})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# --- Multiply-adds -------------------------------------------------------------------------------------------------


def test_resnet18_has_555_million_multiply_adds():
    net = models.build("resnet18", 10)
    statistics = {name: value.clone() for name, value in net.named_buffers()}
    found = pruning.count_macs(net, 32)
    assert net.training and all(torch.equal(value, statistics[name]) for name, value in net.named_buffers())
    assert not any(module._forward_hooks for module in net.modules())
    # Counted another way: every output number of a layer in a network of other code is one inner product.
    products = {}

    def count(name, module, output):
        length = module.weight[0].numel()
        products[name] = output.numel() * length

    theirs = ResNet18().eval()
    for name, module in theirs.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda m, _i, o, name=name: count(f"{name}.weight", m, o))
    theirs(torch.zeros(1, 3, 32, 32))
    assert {name: dense for name, (dense, _) in found.items()} == products
    assert sum(products.values()) == 555_422_720


def test_multiply_adds_of_a_transformer_are_counted_for_every_vector():
    """Linear layers of 5 vectors an image, the tokens; attention uses the weights of its layer without calling it."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.inner = nn.Linear(8, 12)
            self.head = nn.Linear(12, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.pad(self.patches(x).flatten(2).transpose(1, 2), (0, 0, 1, 0))
            x = self.inner(self.attention(x, x, x, need_weights=False)[0])
            return F.linear(x.mean(1), weight=self.head.weight, bias=self.head.bias)

    for network in Network().train(), Network().eval():
        with torch.no_grad():
            network.inner.weight[0] = 0.0
        assert pruning.count_macs(network, 16) == {
            "patches.weight": (4 * 3 * 64 * 8,) * 2,
            "attention.out_proj.weight": (5 * 8 * 8,) * 2,
            "inner.weight": (5 * 8 * 12, 5 * 8 * 11),
            "head.weight": (12 * 7,) * 2,
        }


def test_nonzero_multiply_adds_are_nonzeros_times_pixels():
    net = models.build("resnet20-projection", 10).to(memory_format=torch.channels_last)
    pruning.apply(net, pruning.compute_masks(net, 243_806))
    found = pruning.count_macs(net, 33)
    assert list(found) == list(pruning.prunable(net))
    sides = {
        "conv1.weight": 33,
        "layer1.0.conv1.weight": 33,
        "layer2.0.shortcut.0.weight": 17,
        "layer3.2.conv2.weight": 9,
    }
    for name, side in (sides | {"linear.weight": 1}).items():
        weight = pruning.prunable(net)[name]
        assert found[name] == (weight.numel() * side**2, int((weight != 0).sum()) * side**2)
