"""Folded networks and networks without dead channels compute the same."""

import pytest
import torch
from networks import TINY, one_thread, pruned  # noqa: F401 (an automatic fixture)

import models
import pruning
from deployment import simplification


@torch.no_grad()
def assert_same(first: torch.nn.Module, second: torch.nn.Module, size: int = 16) -> None:
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    expected, found = first.double()(images), second.double()(images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("simplify", [simplification.fold, simplification.remove_dead_channels])
@pytest.mark.parametrize("arch", ["wrn-16-4", "mobilenetv2"])
def test_other_networks_are_refused(simplify, arch):
    """Folding a BatchNorm that comes before its convolution would change the function."""
    with pytest.raises(ValueError, match=r"only the ResNets of models/ can be simplified, not (Wide|Mobile)"):
        simplify(models.empty(arch, 10))


@pytest.mark.parametrize("arch", [*TINY, pytest.param("resnet18", marks=pytest.mark.slow)])
def test_folding_keeps_the_logits(arch):
    network = pruned(arch, 0.5)
    folded = simplification.fold(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules()), "the original has changed"
    assert_same(network.double(), simplification.fold(network.double()))
    assert_same(network, simplification.fold(simplification.fold(network)))


def set_constant(block: torch.nn.Module, number: str, channel: int, value: float) -> None:
    """Make an inner channel of a block dead, with the constant `value` after BatchNorm."""
    bn = getattr(block, f"bn{number}")
    with torch.no_grad():
        getattr(block, f"conv{number}").weight[channel] = 0
        bn.bias[channel] = value + bn.running_mean[channel] * bn.weight[channel] / (
            (bn.running_var[channel] + bn.eps).sqrt()
        )


@pytest.mark.parametrize(
    "arch, number, constants",
    [
        ("padded", "1", (0.7,)),
        ("padded", "1", (-0.7,)),
        ("padded", "1", (0.3, 1.2)),
        ("basic", "1", (-1, 0.4, -0.2)),
        ("bottleneck", "1", (-1, 0.4, -0.2)),
        ("bottleneck", "2", (0.3, 1.2)),
        pytest.param("resnet20", "1", (0.3, -1.2), marks=pytest.mark.slow),
        pytest.param("resnet50", "2", (-1, 0.4, -0.2), marks=pytest.mark.slow),
    ],
)
def test_planted_dead_channels_are_removed_from_every_block(arch, number, constants):
    """They are the first, the last and the middle channel of a layer. The comparison includes image borders."""
    network = pruned(arch, 0.6).double()
    removed = 0
    for module in network.modules():
        if hasattr(module, "shortcut"):
            width = len(getattr(module, f"bn{number}").bias)
            for channel, constant in zip((0, width - 1, width // 2), constants):
                set_constant(module, number, channel, constant)
            removed += len(constants) - any(constant > 0 for constant in constants)
    smaller = simplification.remove_dead_channels(network)

    def channels(network: torch.nn.Module) -> int:
        blocks = [module for module in network.modules() if hasattr(module, "shortcut")]
        return sum(getattr(block, f"conv{number}").out_channels for block in blocks)

    assert channels(network) - channels(smaller) == removed
    assert_same(network, smaller)


def test_channels_that_the_next_layer_does_not_read_are_removed():
    network = pruned("basic", 0.3).double()
    with torch.no_grad():
        network.layer2[0].conv2.weight[:, 3:7] = 0
    smaller = simplification.remove_dead_channels(network)
    assert smaller.layer2[0].conv1.out_channels == 20 and smaller.layer2[0].conv2.in_channels == 20
    assert_same(network, smaller)


def test_a_layer_without_weights_keeps_one_channel():
    network = pruned("basic", 0.3).double()
    with torch.no_grad():
        network.layer1[0].conv1.weight.zero_()
        network.layer1[1].conv2.weight.zero_()
        network.layer2[0].conv1.weight.zero_()
        network.layer2[0].bn1.bias.fill_(-5)
    smaller = simplification.remove_dead_channels(network)
    blocks = smaller.layer1[0], smaller.layer1[1], smaller.layer2[0]
    assert [block.conv1.out_channels for block in blocks] == [1, 1, 1]
    assert_same(network, smaller)


@pytest.mark.parametrize("arch", [*TINY, pytest.param("resnet18", marks=pytest.mark.slow)])
def test_global_pruning(arch):
    """Filters of different scale are pruned by magnitude, so that whole filters become zero."""
    network = pruned(arch, 1)
    with torch.no_grad():
        for weight in pruning.prunable(network).values():
            weight.mul_(torch.logspace(-1.5, 0, len(weight)).reshape(-1, *[1] * (weight.dim() - 1)))
    weights = sum(weight.numel() for weight in pruning.prunable(network).values())
    pruning.apply(network, pruning.compute_masks(network, round(0.95 * weights)))
    network.double()
    smaller = simplification.remove_dead_channels(network)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in network.parameters())
    assert_same(network, smaller)
    assert_same(network, simplification.fold(smaller))


def test_a_broken_channel_is_not_removed():
    """A channel that computes NaN stays, so a broken network still looks broken."""
    network = pruned("basic", 0.3)
    with torch.no_grad():
        network.layer1[0].conv1.weight[2] = 0
        network.layer1[0].bn1.running_var[2] = -1
    smaller = simplification.remove_dead_channels(network)
    assert smaller.layer1[0].conv1.out_channels == 12
    assert smaller(torch.randn(1, 3, 16, 16)).isnan().all()
