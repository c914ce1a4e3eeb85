"""Networks without dead channels compute the same."""

import pytest
import torch
from test_sparse import pruned

import compact
import pruning


@torch.no_grad()
def assert_same(first: torch.nn.Module, second: torch.nn.Module, size: int = 16) -> None:
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    expected, found = first.double()(images), second.double()(images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arch", ("resnet18", "resnet20", "resnet50"))
def test_folding_keeps_the_logits(arch):
    network = pruned(arch, 0.5)
    folded = compact.fold(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules()), "the original is left alone"
    assert_same(network.double(), compact.fold(network.double()))
    assert_same(network, compact.fold(compact.fold(network)))


def set_constant(block, first: str, channel: int, value: float) -> None:
    """Make a channel of a block's inner layer dead, with `value` after BatchNorm."""
    bn = getattr(block, f"bn{first}")
    with torch.no_grad():
        getattr(block, f"conv{first}").weight[channel] = 0
        bn.bias[channel] = value + bn.running_mean[channel] * bn.weight[channel] / (
            (bn.running_var[channel] + bn.eps).sqrt()
        )


@pytest.mark.parametrize(
    "arch, first, constants",
    [
        ("resnet20", "1", (0.7,)),
        ("resnet20", "1", (-0.7,)),
        ("resnet20", "1", (0.3, 1.2)),
        ("resnet18", "1", (-1, 0.4, -0.2)),
        ("resnet50", "1", (-1, 0.4, -0.2)),
        ("resnet50", "2", (0.3, 1.2)),
    ],
)
def test_planted_in_every_block(arch, first, constants):
    """Dead channels in first, last and middle places of every block; borders are part of the comparison."""
    network = pruned(arch, 0.3).double()
    removed = 0
    for module in network.modules():
        if hasattr(module, "shortcut"):
            width = len(getattr(module, f"bn{first}").bias)
            for channel, constant in zip((0, width - 1, width // 2), constants):
                set_constant(module, first, channel, constant)
            removed += len(constants) - any(constant > 0 for constant in constants)
    smaller = compact.remove_dead_channels(network)

    def channels(network):
        return sum(
            getattr(module, f"conv{first}").out_channels for module in network.modules() if hasattr(module, "shortcut")
        )

    assert channels(network) - channels(smaller) == removed
    assert_same(network, smaller)


def test_channels_that_nobody_reads():
    network = pruned("resnet18", 0.3).double()
    with torch.no_grad():
        network.layer2[0].conv2.weight[:, 3:7] = 0
    smaller = compact.remove_dead_channels(network)
    assert smaller.layer2[0].conv1.out_channels == 124 and smaller.layer2[0].conv2.in_channels == 124
    assert_same(network, smaller)


def test_a_layer_without_weights():
    network = pruned("resnet18", 0.3).double()
    with torch.no_grad():
        network.layer1[0].conv1.weight.zero_()
        network.layer3[1].conv2.weight.zero_()
        network.layer4[0].conv1.weight.zero_()
        network.layer4[0].bn1.bias.fill_(-5)
    smaller = compact.remove_dead_channels(network)
    assert smaller.layer1[0].conv1.out_channels == 1 and smaller.layer3[1].conv1.out_channels == 1
    assert_same(network, smaller)


@pytest.mark.parametrize("arch", ("resnet18", "resnet20"))
def test_globally_pruned(arch):
    """Pruned by magnitude, with filters of different scale, so that whole filters go."""
    network = pruned(arch, 1)
    with torch.no_grad():
        for weight in pruning.prunable(network).values():
            weight.mul_(torch.logspace(-1.5, 0, len(weight)).reshape(-1, *[1] * (weight.dim() - 1)))
    weights = sum(weight.numel() for weight in pruning.prunable(network).values())
    pruning.apply(network, pruning.choose(network, round(0.95 * weights)))
    network.double()
    smaller = compact.remove_dead_channels(network)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in network.parameters())
    assert_same(network, smaller)
    assert_same(network, compact.fold(smaller))
