"""Any convolutional network can be read as a program that computes the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import TINY, one_thread, pruned, randomize  # noqa: F401 (one_thread is an automatic fixture)
from torch import Tensor, nn
from torch.nn.utils import prune

from deployment.graph import lower
from deployment.program import Program


@torch.no_grad()
def assert_same(network: nn.Module, size: int | tuple[int, int], count: int = 2) -> Program:
    """Its program computes what the network computes in double precision, up to the rounding of folded weights."""
    program = lower(network, size)
    images = torch.randn(count, 3, *program.image_size, dtype=torch.double)
    expected = copy.deepcopy(network).double().eval()(images)
    found = program.run(images)
    assert found.shape == expected.shape and expected.std() > 0
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    assert program.shapes() == [tuple(value.shape[1:]) for value in program.values(images)]
    assert [operation.output for operation in program.operations] == list(range(1, len(program.operations) + 1))
    return program


def from_torchvision(name: str) -> nn.Module:
    """A network with random weights, half of them zero, and random BatchNorm statistics."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # its own initialization takes seconds
        network = getattr(torchvision.models, name)(num_classes=7)
        if name.startswith("vgg"):  # 100 million weights
            network.classifier[0], network.classifier[3] = nn.Linear(25088, 32), nn.Linear(32, 4096)
    return randomize(network if name.startswith("regnet") else network.to_empty(device="cpu"), 0.5)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", [
    "resnet18", "vgg11_bn", "mobilenet_v2", "googlenet", "densenet121", "squeezenet1_1", "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "efficientnet_b0", "regnet_x_400mf", "mnasnet0_5", "resnext50_32x4d", "alexnet", "regnet_y_400mf",
        "wide_resnet50_2", "inception_v3",
    )),
])  # fmt: skip
def test_networks_of_torchvision(name):
    assert_same(from_torchvision(name), 96 if name == "inception_v3" else 64)


@pytest.mark.parametrize("arch", [*TINY, "resnet20", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_our_networks(arch):
    program = assert_same(pruned(arch, 0.5), (16, 24))
    assert not any(operation.kind in ("affine", "activate", "add") for operation in program.operations), "not fused"


class Functions(nn.Module):
    """The same layer called in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.randn(6, 1, 1))
        self.linear = nn.Linear(6 * 5 * 4, 7)
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv((images - self.mean) / 0.5)
        y = F.relu(x)
        x = torch.add(y, x).clamp(min=0) + self.bn(x).relu_()
        x += y.clamp(0, 6)
        x = 1.5 * x * self.scale - 1
        x = F.dropout(x, training=self.training)
        x = x * torch.sigmoid(x) + F.hardsigmoid(x) * x
        gate = x.mean(3, keepdim=True).mean(2).view(x.size(0), -1).sigmoid()
        x = x * gate.unsqueeze(2).unsqueeze(3).expand_as(x)
        x = x.mul(torch.mean(x, [-1, -2], keepdim=True)).contiguous()
        pooled = F.adaptive_max_pool2d(x, 1).reshape(-1, 6)
        x = F.adaptive_avg_pool2d(x, output_size=(5, 4))
        return torch.cat([self.linear(x.permute(0, 2, 3, 1).flatten(start_dim=1)), pooled], dim=-1)


class Geometry(nn.Module):
    """Kernels, strides, paddings and pools that are not square or not symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Conv2d(3, 8, (4, 3), padding="same", dilation=(1, 2))
        self.wide = nn.Conv2d(8, 12, (1, 5), stride=(1, 2), padding=(0, 3), groups=4, bias=False)
        self.pad = nn.ZeroPad2d((0, 1, 2, 3))
        self.strided = nn.Conv2d(12, 12, 3, stride=2)
        self.depthwise = nn.Conv2d(24, 48, 3, groups=24, padding="valid")

    def forward(self, images: Tensor) -> Tensor:
        x = self.even(images)
        x = self.wide(F.max_pool2d(x, (3, 2), stride=2, padding=1, ceil_mode=True))
        x = self.strided(self.pad(x))
        x = torch.cat((F.pad(x, (1, 2, 0, 3)), F.pad(x[:, 2:8], (1, 2, 0, 3, 1, 5))), dim=-3)
        x = self.depthwise(x[:, torch.tensor([3, 2, 1, 0, *range(4, 24)])])
        x = torch.cat([F.avg_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)], 1)
        return x.mean((2, 3))


class Shuffle(nn.Module):
    """Channels are split, shuffled and padded: the shortcut of option A, ShuffleNet, and images in BGR."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.last, self.bn = nn.Conv2d(13, 7, 1), nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images[:, [2, 1, 0]])
        x = F.relu(self.bn(x), inplace=True)  # BatchNorm reads the convolution before
        first, second = x.chunk(2, dim=1)
        x = torch.cat((first, self.other(second)), 1)
        x = x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).contiguous().view(len(x), -1, *x.shape[2:])
        x = F.pad(x[:, :, ::2, ::3], (0, 0, 0, 0, 2, 3)) + torch.cat((x, x[:, :5]), 1)[..., ::2, ::3]
        x = self.last(x)
        return x.mean((-2, -1)) + x.flatten(2).mean(-1)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind, size", [(Functions, (9, 11)), (Geometry, (21, 23)), (Shuffle, (8, 9))])
def test_functions_and_geometry(kind, size):
    torch.manual_seed(0)
    assert_same(randomize(kind(), 1), size)


def test_the_network_is_not_changed():
    network = pruned("padded", 0.3).train()
    network.layer1.eval()
    before = copy.deepcopy(network.state_dict())
    program = lower(network, 16)
    modes = {name: module.training for name, module in network.named_modules()}
    assert modes == {name: not name.startswith("layer1") for name in modes}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    images = torch.randn(1, 3, 16, 16)
    logits = program.run(images)
    with torch.no_grad():
        for value in network.parameters():
            value.zero_()
    assert torch.equal(program.run(images), logits), "the program shares memory with the network"


def test_weights_that_hooks_compute():
    network = pruned("basic", 1)
    prune.l1_unstructured(network.layer1[0].conv1, "weight", 0.5)
    program = assert_same(network, 16)
    assert [int((operation.weight == 0).sum()) for operation in program.operations[:2]] == [0, 648]


def test_a_compiled_network_is_read_as_it_was_before():
    network = pruned("basic", 0.5)
    compiled = nn.Module()  # torch.compile itself imports modules for three seconds
    compiled._orig_mod = network
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(lower(compiled, 16).run(images), lower(network, 16).run(images))


def unknown(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), module), nn.Flatten())


class Calls(nn.Module):
    """A network that calls a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 3, 3), function

    def forward(self, *images: Tensor) -> Tensor:
        return self.function(self.conv(images[0]), *images[1:])


@pytest.mark.parametrize("network, complaint", [
    (unknown(nn.GELU()), r"1\.1 \(GELU\) calls gelu, which is not supported"),
    (unknown(nn.GroupNorm(2, 4)), r"1\.1 \(GroupNorm\) calls group_norm"),
    (unknown(nn.ConvTranspose2d(4, 4, 2)), r"1\.1 \(ConvTranspose2d\) calls conv_transpose2d"),
    (unknown(nn.Hardtanh()), r"1\.1 \(Hardtanh\) clamps to \[-1\.0, 1\.0\]"),
    (unknown(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), r"1\.1 \(Conv2d\) pads with something else"),
    (unknown(nn.BatchNorm2d(4, track_running_stats=False)), r"1\.1 \(BatchNorm2d\) .* statistics of the batch"),
    (unknown(nn.MaxPool2d(2, dilation=2)), r"1\.1 \(MaxPool2d\) pools with dilation"),
    (unknown(nn.Conv2d(5, 4, 3)), r"1\.1 \(Conv2d\) cannot be read for images of 16x16: a convolution of 5 channels"),
    (unknown(nn.Conv2d(4, 4, 30)), r"1\.1 \(Conv2d\) cannot be read for images of 16x16"),
    (Calls(lambda x: x if x.max() > 0 else -x), "the network calls max"),
    (Calls(lambda x: x[0, 0, 0, 0].item()), "the network calls item"),
    (Calls(lambda x: x if x[0, 0, 0, 0] else -x), "the network calls bool"),
    (Calls(lambda x: x * x), "multiplies images"),
    (Calls(lambda x: x - x.relu()), "subtracts images"),
    (Calls(lambda x: x + torch.arange(14.0)), "varies within channels"),
    (Calls(lambda x: x.transpose(1, 2) + 1), "rearranges an image"),
    (Calls(lambda x: x.flip(0)), "calls flip"),
    (Calls(lambda x: x.to(torch.double)), "computes with float64"),
    (Calls(lambda x: x.mean((1, 2))), "takes a mean"),
    (Calls(lambda x: x.mean((2, 3)).view(-1)), "logits"),
    (Calls(lambda x: x), r"returns a tensor of shape \(2, 3, 14, 14\), not logits"),
    (Calls(lambda x: (x.mean((2, 3)),)), "returns tuple, not logits"),
    (Calls(lambda _: torch.zeros(2, 5)), "that depend on the images"),
    (Calls(lambda x, mask: x + mask), "cannot be read for images of 16x16: .*missing 1 required"),
    (unknown(nn.ReLU()).double(), r"not float32: 0\.weight is float64"),
])  # fmt: skip
def test_what_cannot_be_read_is_named(network, complaint):
    before = network.training
    with pytest.raises(ValueError, match=complaint) as raised:
        lower(network, 16)
    assert "\n" not in str(raised.value)
    assert network.training == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_small_networks():
    """Logits without a convolution, and images of one pixel."""
    assert_same(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), 2)
    assert_same(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 4)
    assert_same(nn.Sequential(nn.Flatten()), 1)
    assert_same(pruned("padded", 0), 16)
