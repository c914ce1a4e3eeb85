"""Fused programs and programs without dead channels compute the same."""

import pytest
import torch
import torch.nn.functional as F
from networks import TINY, one_thread, pruned, randomize  # noqa: F401 (one_thread is an automatic fixture)
from torch import Tensor, nn

import pruning
from deployment.graph import lower
from deployment.program import Operation, Program
from deployment.simplification import without_dead_channels


@torch.no_grad()
def simplified(network: nn.Module, size: int | tuple[int, int] = 16) -> tuple[Program, Program]:
    """Its program with and without dead channels, after a comparison of logits, image borders included."""
    program = lower(network, size)
    smaller = without_dead_channels(program)
    images = torch.randn(4, 3, *program.image_size, dtype=torch.float64)
    expected = network.double()(images)
    network.float()
    for found in program.run(images), smaller.run(images):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert len(smaller.shapes()) <= len(program.shapes()) and smaller.nonzeros() <= program.nonzeros()
    return program, smaller


def channels(program: Program, suffix: str = "") -> int:
    """Channels of the convolutions of modules with such a name."""
    return sum(len(op.weight) for op in program.operations if op.kind == "convolve" and op.name.endswith(suffix))


def operation(program: Program, name: str) -> Operation:
    return next(op for op in program.operations if op.name == name)


def set_constant(conv: nn.Conv2d, bn: nn.BatchNorm2d, channel: int, value: float) -> None:
    """Make a channel dead, with the constant `value` after BatchNorm."""
    with torch.no_grad():
        conv.weight[channel] = 0
        bn.running_mean[channel], bn.bias[channel] = 0, value


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
    """They are the first, the last and the middle channel of a layer. A convolution without padding takes constants
    into its bias; one with padding needs one constant channel."""
    network = pruned(arch, 0.6)
    blocks = [module for module in network.modules() if hasattr(module, "shortcut")]
    for block in blocks:
        conv, bn = getattr(block, f"conv{number}"), getattr(block, f"bn{number}")
        for channel, constant in zip((0, conv.out_channels - 1, conv.out_channels // 2), constants):
            set_constant(conv, bn, channel, constant)
    padded = (arch, number) != ("bottleneck", "2") and arch != "resnet50"
    removed = len(constants) - (padded and any(constant > 0 for constant in constants))
    program, smaller = simplified(network)
    assert channels(program, f"conv{number}") - channels(smaller, f"conv{number}") == removed * len(blocks)
    assert sum(channels(program, f"conv{n}") - channels(smaller, f"conv{n}") for n in (1, 2, 3)) == (
        removed * len(blocks)
    )


def test_channels_that_the_next_layer_does_not_read_are_removed():
    network = pruned("basic", 0.3)
    with torch.no_grad():
        network.layer2[0].conv2.weight[:, 3:7] = 0
    _, smaller = simplified(network)
    assert operation(smaller, "layer2.0.conv1").weight.shape[:2] == (20, 12)
    assert operation(smaller, "layer2.0.conv2").weight.shape[:2] == (24, 20)


def test_channels_of_the_residual_stream_go_together():
    """A channel is removed from everything that is added up, if it is dead in each of these layers."""
    network = pruned("basic", 0.6)
    for conv, bn in (
        (network.conv1, network.bn1),
        *((block.conv2, block.bn2) for block in network.layer1),
    ):
        set_constant(conv, bn, 5, 0.2)
    set_constant(network.layer1[0].conv2, network.layer1[0].bn2, 7, 0.2)  # alive in the other layers
    _, smaller = simplified(network)
    names = ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    # layer1 reads it with padding, so it stays, but as a constant: its filters are empty
    assert [len(operation(smaller, name).weight) for name in names] == [12, 12, 12]
    assert all(not operation(smaller, name).weight[5].any() for name in names)
    for conv, bn in ((network.conv1, network.bn1), *((block.conv2, block.bn2) for block in network.layer1)):
        set_constant(conv, bn, 5, -0.2 if conv is network.conv1 else 0)
    _, smaller = simplified(network)
    assert [len(operation(smaller, name).weight) for name in names] == [11, 11, 11]
    assert operation(smaller, "layer2.0.shortcut.0").weight.shape[1] == 11


class Branches(nn.Module):
    """Concatenation, a depthwise convolution, a gate, pooling and BatchNorm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.gate = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 12, 1)
        self.grouped = nn.Conv2d(12, 12, 3, groups=3)
        self.linear = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(images)))
        x = F.relu(self.norm(torch.cat([self.left(x), F.avg_pool2d(self.right(x), 3, 1, 1)], 1)))
        x = F.max_pool2d(F.relu6(self.depthwise(x)), 2)
        x = self.last(x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))
        return self.linear(self.grouped(F.hardswish(x)).mean((2, 3)))


def test_dead_channels_of_branches_gates_and_depthwise_convolutions():
    torch.manual_seed(0)
    network = randomize(Branches(), 1)
    with torch.no_grad():
        network.left.weight[[0, 3]] = 0
        network.norm.bias[0] = network.norm.running_mean[0] = network.left.bias[0] = 0  # constant 0
        network.right.weight[1] = 0  # pooling with padding makes it vary
        network.depthwise.weight[[2, 9]] = 0  # not constant before, constant after
        network.depthwise.bias[2], network.depthwise.bias[9] = -1, 1
        network.last.weight[:, 11] = network.gate.weight[:, 11] = 0  # unread
        network.last.weight[4] = 0  # constant, read by a grouped convolution
    program, smaller = simplified(network, (15, 18))
    # Channels 0 and 2 are 0 behind the depthwise convolution, 11 is unread; 9 is 1 times a gate.
    assert operation(smaller, "depthwise").groups == 13 == len(operation(smaller, "gate").weight)
    assert channels(smaller, "left") == 4 and channels(smaller, "right") == 9
    assert operation(smaller, "grouped").weight.shape == (12, 4, 3, 3) == operation(program, "grouped").weight.shape
    assert not operation(smaller, "depthwise").weight[7].any(), "channel 9 is constant"


def test_a_layer_without_weights_keeps_one_channel():
    network = pruned("basic", 0.3)
    with torch.no_grad():
        network.layer1[0].conv1.weight.zero_()
        network.layer2[0].conv1.weight.zero_()
        network.layer2[0].bn1.bias.fill_(-5)
    _, smaller = simplified(network)
    assert len(operation(smaller, "layer1.0.conv1").weight) == 1


def test_a_block_without_weights_is_removed():
    """What remains of it is the bias that it adds to the residual."""
    network = pruned("basic", 0.3)
    with torch.no_grad():
        network.layer1[1].conv2.weight.zero_()
    _, smaller = simplified(network)
    assert not any(op.name == "layer1.1.conv1" for op in smaller.operations)
    assert operation(smaller, "layer1.1.conv2").kind == "affine"


@pytest.mark.parametrize("arch", ["basic", "padded", "bottleneck"])
def test_a_network_without_weights(arch):
    network = pruned(arch, 0)
    with torch.no_grad():
        network.linear.bias.normal_()
    _, smaller = simplified(network)
    assert not any(op.weight.any() for op in smaller.operations if op.kind == "convolve" and op.name != "linear")
    assert channels(smaller) < 30


@pytest.mark.parametrize("arch", [*TINY, pytest.param("resnet18", marks=pytest.mark.slow)])
def test_global_pruning(arch):
    """Filters of different scale are pruned by magnitude, so that whole filters become zero."""
    network = pruned(arch, 1)
    with torch.no_grad():
        for weight in pruning.prunable(network).values():
            weight.mul_(torch.logspace(-1.5, 0, len(weight)).reshape(-1, *[1] * (weight.dim() - 1)))
    weights = sum(weight.numel() for weight in pruning.prunable(network).values())
    pruning.apply(network, pruning.compute_masks(network, round(0.95 * weights)))
    program, smaller = simplified(network)
    assert channels(smaller) < channels(program) and smaller.macs() < program.macs()


def test_a_broken_channel_is_not_removed():
    """A channel that computes NaN stays, so a broken network still looks broken."""
    network = pruned("basic", 0.3)
    with torch.no_grad():
        network.layer1[0].conv1.weight[2] = 0
        network.layer1[0].bn1.running_var[2] = -1
    smaller = without_dead_channels(lower(network, 16))
    assert len(operation(smaller, "layer1.0.conv1").weight) == 12
    assert smaller.run(torch.randn(1, 3, 16, 16)).isnan().all()


def test_a_broken_weight_of_a_dead_channel_stays():
    network = pruned("basic", 0.3)
    set_constant(network.layer1[0].conv1, network.layer1[0].bn1, 2, -1)
    with torch.no_grad():
        network.layer1[0].conv2.weight[4, 2, 1, 1] = torch.nan
    assert without_dead_channels(lower(network, 16)).run(torch.randn(1, 3, 16, 16)).isnan().all()


def test_what_more_than_one_operation_reads_is_not_fused():
    """BatchNorm, activation and addition read a value that another operation needs as it is."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

        def forward(self, images: Tensor) -> Tensor:
            x = self.conv(images)
            y = x + self.bn(x)
            return (F.relu(y) + y).mean((2, 3))

    torch.manual_seed(0)
    program, _ = simplified(randomize(Shared(), 1))
    assert [op.kind for op in program.operations] == ["convolve", "affine", "add", "activate", "add", "adaptive_pool"]
