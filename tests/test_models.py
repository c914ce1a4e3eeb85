"""The networks have the sizes of the literature, and a state_dict identifies each of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
import pruning
from models.resnet import PadShortcut


def build(arch: str, classes: int = 10) -> models.ResNet:
    with torch.device("meta"):
        return models.build(arch, classes)


@pytest.mark.parametrize(
    ("arch", "parameters", "prunable", "layers"),
    [
        ("resnet18", 11_173_962, 11_164_352, 21),
        ("resnet34", 21_282_122, 21_265_088, 37),
        ("resnet50", 23_520_842, 23_467_712, 54),
        ("resnet20", 269_722, 268_336, 20),  # 0.27 million in the paper
        ("resnet20-projection", 272_474, 270_896, 22),
    ],
)
def test_parameter_counts_are_those_of_the_literature(arch, parameters, prunable, layers):
    network = build(arch)
    weights = pruning.prunable(network)
    assert sum(weight.numel() for weight in network.parameters()) == parameters
    assert (len(weights), sum(weight.numel() for weight in weights.values())) == (layers, prunable)


def test_the_parameters_of_resnet20_are_counted_by_hand():
    convolutions = 3 * 16 * 9 + 6 * 16 * 16 * 9 + (16 + 5 * 32) * 32 * 9 + (32 + 5 * 64) * 64 * 9
    assert convolutions + 64 * 10 == 268_336
    batchnorm = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert convolutions + 64 * 10 + batchnorm + 10 == 269_722
    shortcuts = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64  # of option B
    assert 269_722 + shortcuts == 272_474


def test_a_padded_shortcut_takes_every_second_pixel_and_adds_channels_of_zeros():
    x = torch.randn(2, 3, 5, 6)
    y = PadShortcut(3, 8, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, :2], torch.zeros(2, 2, 3, 3)) and torch.equal(y[:, 5:], torch.zeros(2, 3, 3, 3))
    for row in range(3):
        for column in range(3):
            assert torch.equal(y[:, 2:5, row, column], x[:, :, 2 * row, 2 * column])


def test_only_the_shortcuts_of_resnet20_with_projection_have_parameters():
    plain, projected = (set(build(arch).state_dict()) for arch in ("resnet20", "resnet20-projection"))
    assert plain < projected
    assert {name.rpartition(".")[0] for name in projected - plain} == {
        f"layer{stage}.0.shortcut.{part}" for stage in (2, 3) for part in (0, 1)
    }
    padded = [name for name, module in build("resnet20").named_modules() if isinstance(module, PadShortcut)]
    assert padded == ["layer2.0.shortcut", "layer3.0.shortcut"]


def reference_resnet20(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """ResNet20 with shortcuts of option A as one function, in evaluation mode, written without the project's code."""

    def conv_bn(x: Tensor, conv: str, bn: str, stride: int = 1) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        parts = (state[f"{bn}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        mean, var, weight, bias = (part[:, None, None] for part in parts)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = conv_bn(x, "conv1", "bn1").relu()
    for stage in 1, 2, 3:
        for block in 0, 1, 2:
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = conv_bn(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            y = conv_bn(y, f"{name}.conv2", f"{name}.bn2")
            if stride == 2:
                zeros = torch.zeros(len(x), x.shape[1] // 2, *y.shape[2:])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            x = (y + x).relu()
    return F.avg_pool2d(x, x.shape[-1]).flatten(1) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize("size", [16, 32, 33])
def test_resnet20_computes_what_a_reference_computes(size):
    torch.manual_seed(0)
    network = models.build("resnet20", 10)
    with torch.no_grad():
        for _ in range(3):  # statistics that are not those of a new network
            network(torch.randn(8, 3, size, size) + 1)
        images = torch.randn(4, 3, size, size)
        torch.testing.assert_close(
            network.eval()(images), reference_resnet20(images, network.state_dict()), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("size", [16, 33])
def test_every_network_takes_images_of_any_size_from_16_pixels(arch, size):
    with torch.device("meta"):
        assert build(arch, 7).eval()(torch.zeros(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_names_and_shapes_identify_a_network(arch, classes):
    state = build(arch, classes).state_dict()
    assert models.identify(state) == arch
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert models.identify(old) == arch, "files from before PyTorch 0.4.1 have no such counters"


def test_an_unknown_network_is_refused_with_the_closest_one_and_the_first_difference():
    state = build("resnet20").state_dict()
    with pytest.raises(ValueError, match=r"^fits no known network; closest is resnet20, but bn1.bias is missing$"):
        models.identify({name: value for name, value in state.items() if name != "bn1.bias"})
    with pytest.raises(ValueError, match=r"closest is resnet20, but extra is unknown \(and 1 more\)$"):
        models.identify(state | {"extra": torch.zeros(1), "linear.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"but bn1.weight has shape \(3,\), not \(16,\)$"):
        models.identify(state | {"bn1.weight": torch.zeros(3)})
    with pytest.raises(KeyError, match="vgg"):
        models.build("vgg", 10)
