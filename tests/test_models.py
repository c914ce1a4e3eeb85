"""The networks have the sizes of the literature, and a state_dict identifies each, whatever its tensors are called."""

import argparse
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
import pruning
from models import identification, torchvision_networks
from models.resnet import PadShortcut

build = models.empty


# Parameters as pinned here, and in millions as published: He et al. 2016 (table 6), Liu et al. 2017 (network slimming:
# VGG19), Li et al. 2017 (pruning filters: VGG16, 15 million), Zagoruyko and Komodakis 2016, Huang et al. 2017. The
# others are those of the pytorch-cifar scripts.
SIZES = [
    ("resnet18", 11_173_962, 11_164_352, 21, 11.17),
    ("resnet34", 21_282_122, 21_265_088, 37, 21.28),
    ("resnet50", 23_520_842, 23_467_712, 54, 23.52),
    ("resnet20", 269_722, 268_336, 20, 0.27),
    ("resnet32", 464_154, 461_872, 32, 0.46),
    ("resnet44", 658_586, 655_408, 44, 0.66),
    ("resnet56", 853_018, 848_944, 56, 0.85),
    ("resnet110", 1_727_962, 1_719_856, 110, 1.7),
    ("resnet20-projection", 272_474, 270_896, 22, 0.27),
    ("resnet32-projection", 466_906, 464_432, 34, 0.47),
    ("resnet44-projection", 661_338, 657_968, 46, 0.66),
    ("resnet56-projection", 855_770, 851_504, 58, 0.86),
    ("resnet110-projection", 1_730_714, 1_722_416, 112, 1.73),
    ("vgg11", 9_231_114, 9_222_848, 9, 9.23),
    ("vgg16", 14_728_266, 14_715_584, 14, 15),
    ("vgg19", 20_040_522, 20_024_000, 17, 20.04),
    ("wrn-16-4", 2_748_890, 2_745_264, 17, 2.7),
    ("wrn-28-10", 36_479_194, 36_461_232, 29, 36.5),
    ("mobilenetv2", 2_296_922, 2_261_824, 58, 2.30),
    ("densenet-bc-100-12", 769_162, 745_164, 100, 0.8),
]


def test_every_network_has_its_size_in_the_table():
    assert tuple(arch for arch, *_ in SIZES) == models.NAMES


@pytest.mark.parametrize(("arch", "parameters", "prunable", "layers", "millions"), SIZES)
def test_parameter_counts_are_those_of_the_literature(arch, parameters, prunable, layers, millions):
    network = build(arch, 10)
    weights = pruning.prunable(network)
    assert sum(weight.numel() for weight in network.parameters()) == parameters
    assert (len(weights), sum(weight.numel() for weight in weights.values())) == (layers, prunable)
    decimals = len(f"{millions}".partition(".")[2])
    assert round(parameters / 1e6, decimals) == millions


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
    plain, projected = (set(build(arch, 10).state_dict()) for arch in ("resnet20", "resnet20-projection"))
    assert plain < projected
    assert {name.rpartition(".")[0] for name in projected - plain} == {
        f"layer{stage}.0.shortcut.{part}" for stage in (2, 3) for part in (0, 1)
    }
    padded = [name for name, module in build("resnet20", 10).named_modules() if isinstance(module, PadShortcut)]
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


@pytest.mark.parametrize("arch", models.NAMES)
def test_every_network_takes_images_of_any_size_from_16_pixels_and_vgg_from_32(arch):
    for size in (32, 33) if arch.startswith("vgg") else (16, 33):
        models.check_size(arch, 7, size)
        network = build(arch, 7).eval()
        assert network(torch.empty(2, 3, size, size, device="meta")).shape == (2, 7)


def test_networks_compute_what_the_layers_of_other_scripts_compute():
    """Blocks against the same written as plain functions: where activations and shortcuts are is not in the shapes."""
    torch.manual_seed(0)
    x = torch.randn(4, 32, 9, 9)

    def bn(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
        return F.batch_norm(x, None, None, layer.weight, layer.bias, True)

    wide = models.wide_resnet.WideBlock(32, 48, 2)
    pre = bn(x, wide.bn1).relu()
    inner = bn(F.conv2d(pre, wide.conv1.weight, stride=2, padding=1), wide.bn2).relu()
    expected = F.conv2d(inner, wide.conv2.weight, padding=1) + F.conv2d(pre, wide.convShortcut.weight, stride=2)
    torch.testing.assert_close(wide(x), expected)
    wide = models.wide_resnet.WideBlock(32, 32, 1)
    inner = bn(F.conv2d(bn(x, wide.bn1).relu(), wide.conv1.weight, padding=1), wide.bn2).relu()
    torch.testing.assert_close(wide(x), x + F.conv2d(inner, wide.conv2.weight, padding=1))

    dense = models.densenet.DenseLayer(32, 12)
    inner = bn(F.conv2d(bn(x, dense.bn1).relu(), dense.conv1.weight), dense.bn2).relu()
    torch.testing.assert_close(dense(x), torch.cat([x, F.conv2d(inner, dense.conv2.weight, padding=1)], 1))

    for stride, width in (1, 32), (1, 48), (2, 48):
        block = models.mobilenet.InvertedBlock(32, width, 6, stride)
        inner = bn(F.conv2d(x, block.conv1.weight), block.bn1).relu()
        inner = bn(F.conv2d(inner, block.conv2.weight, stride=stride, padding=1, groups=192), block.bn2).relu()
        expected = bn(F.conv2d(inner, block.conv3.weight), block.bn3)
        if stride == 1:
            short = block.shortcut
            expected = expected + (x if width == 32 else bn(F.conv2d(x, short[0].weight), short[1]))
        torch.testing.assert_close(block(x), expected)


# --- Names -----------------------------------------------------------------------------------------------------------


def test_names_are_ours_or_those_of_the_classifiers_of_torchvision():
    for name in *models.NAMES, "torchvision:resnet18", "torchvision:vit_b_16":
        assert models.arch(name) == name
    for text, close in {
        "resnet19": "resnet18",
        "wrn-28-1": "wrn-28-10",
        "vgg16_bn": "torchvision:vgg16_bn",
        "torchvision:resnet19": "torchvision:resnet18",
        "torchvision:deeplabv3_resnet50": "torchvision:resnet50",
        "alexnet": "torchvision:alexnet",
    }.items():
        with pytest.raises(argparse.ArgumentTypeError, match=rf"^'{text}' is no known network; close to it: .*{close}"):
            models.arch(text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"^'\?' is no known network$"):
        models.arch("?")
    for unknown in "vgg", "torchvision:raft_small", "torchvision:":
        with pytest.raises(KeyError, match=unknown):
            models.build(unknown, 10)


def test_a_network_of_torchvision_has_weights_of_its_own_and_the_seed_decides_them():
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return models.build("torchvision:squeezenet1_1", 3).classifier[1].weight

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))
    assert weights(0).device.type == "cpu" and weights(0).std() > 0


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_networks_of_torchvision_have_no_auxiliary_classifiers(arch):
    network, images = build(f"torchvision:{arch}", 7), torch.empty(2, 3, 96, 96, device="meta")
    assert network.train()(images).shape == network.eval()(images).shape == (2, 7)
    assert not network.transform_input


@pytest.mark.slow
def test_every_classifier_of_torchvision_has_its_outputs_in_its_last_parameter_and_is_like_no_other():
    seen: dict[frozenset, str] = {}
    for arch in (*models.NAMES, *torchvision_networks.names()):
        state, shapes = models.state(arch, 7), models.shapes(arch, 7)
        assert all(value.is_meta and value.dtype in (torch.float32, torch.int64) for value in state.values())
        assert models.outputs(arch, state) == 7
        spelled = identification.canonical(shapes)
        assert seen.setdefault(frozenset((spelled[name], shape) for name, shape in shapes.items()), arch) == arch
        found = identification.compare(shapes, arch, models.shapes)
        assert found == ({name: name for name in shapes}, [], 1.0)
    assert len(seen) >= 100
    shapes = models.shapes("torchvision:resnet18", 7)
    assert models.identify(shapes) == models.Match("torchvision:resnet18", {name: name for name in shapes})


def test_a_size_that_a_network_cannot_take_is_one_line():
    for arch, size, reason in (
        ("vgg16", 16, "Output size is too small"),
        ("torchvision:vit_b_16", 32, "Wrong image height! Expected 224 but got 32!"),
        ("torchvision:inception_v3", 32, "Kernel size can't be greater than actual input size"),
    ):
        line = rf"^{arch} cannot be trained on batches of 2 images of {size}x{size} pixels: .*{reason}$"
        with pytest.raises(ValueError, match=line):
            models.check_size(arch, 10, size)
    models.check_size("torchvision:resnet18", 10, 32)
    with pytest.raises(ValueError, match="batches of 1 image of 32x32 pixels: BatchNorm needs more than one value per"):
        models.check_size("torchvision:resnet18", 10, 32, images=1)
    models.check_size("resnet18", 10, 32, images=1)


# --- Identification --------------------------------------------------------------------------------------------------

COUNTER = "num_batches_tracked"


@pytest.mark.parametrize("arch", models.NAMES)
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_names_and_shapes_identify_a_network(arch, classes):
    shapes = models.shapes(arch, classes)
    assert models.identify(shapes) == models.Match(arch, {name: name for name in shapes})
    old = {name: shape for name, shape in shapes.items() if not name.endswith(COUNTER)}
    assert models.identify(old).arch == arch, "files from before PyTorch 0.4.1 have no such counters"
    assert models.identify(dict(sorted(shapes.items()))).arch == arch, "safetensors are sorted"


def renamed(arch: str, *rules: tuple[str, str]) -> dict[str, tuple[int, ...]]:
    """The shapes of a network under the names of another script, by regular expressions."""
    shapes = {}
    for name, shape in models.shapes(arch, 10).items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        shapes[name] = shape
    assert len(shapes) == len(models.shapes(arch, 10))
    return shapes


RESIDUAL = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4"}
FOREIGN = {
    "fc and downsample": ("resnet56-projection", ("^linear", "fc"), ("shortcut", "downsample")),
    "fc alone": ("resnet20", ("^linear", "fc")),
    "classifier of several modules": ("vgg16", ("^classifier", "classifier.0")),
    "classifier with dropout before": ("vgg19", ("^classifier", "classifier.1")),
    "head": ("wrn-16-4", ("^fc", "head.fc")),
    "a sequence for one convolution": ("wrn-16-4", ("convShortcut", "shortcut.0"), (r"block(.)\.layer", r"layer\1")),
    "norm": ("resnet18", (r"\bbn", "norm")),
    "stages": ("resnet34", ("^layer", "stage")),
    "linear": ("densenet-bc-100-12", ("^fc", "linear")),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_names_of_other_scripts_are_understood(kind):
    arch, *rules = FOREIGN[kind]
    foreign = renamed(arch, *rules)
    for shapes in foreign, dict(sorted(foreign.items())):
        match = models.identify(shapes)
        assert (match.arch, match.by_order) == (arch, False)
        assert all(models.shapes(arch, 10)[ours] == foreign[name] for name, ours in match.names.items())
        assert list(match.names.values()) == list(models.shapes(arch, 10))


def residual_function(found: re.Match) -> str:
    return f"conv{int(found[1]) + 1}_x.{found[2]}.residual_function.{RESIDUAL[found[3]]}"


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("counters", [True, False])
def test_a_network_with_other_names_is_matched_by_the_order_of_its_tensors(counters):
    shapes = {}
    for name, shape in models.shapes("resnet18", 100).items():
        name = re.sub(r"^bn1", "conv1.1", re.sub(r"^conv1", "conv1.0", name))
        name = re.sub(r"^layer(.)\.(.)\.((?:conv|bn).)", residual_function, name)
        name = re.sub(r"^layer(.)", lambda found: f"conv{int(found[1]) + 1}_x", name)
        if counters or not name.endswith(COUNTER):
            shapes[name.replace("linear", "fc")] = shape
    match = models.identify(shapes)
    assert (match.arch, match.by_order, list(match.names)) == ("resnet18", True, list(shapes))
    assert match.names["conv3_x.0.residual_function.3.weight"] == "layer2.0.conv2.weight"
    assert match.names["conv5_x.1.residual_function.4.running_var"] == "layer4.1.bn2.running_var"
    assert match.names["conv4_x.0.shortcut.1.bias"] == "layer3.0.shortcut.1.bias"
    assert not counters or match.names[f"conv1.1.{COUNTER}"] == f"bn1.{COUNTER}"
    shapes.pop("conv3_x.1.residual_function.3.weight")
    with pytest.raises(ValueError, match="fits no known network"):
        models.identify(shapes)


def test_every_network_can_be_matched_by_order_and_none_is_confused_with_another():
    for arch in models.NAMES:
        shapes = {f"net.x{name}": shape for name, shape in models.shapes(arch, 10).items()}
        match = models.identify(shapes)
        assert (match.arch, match.by_order) == (arch, True)
        assert all(name == f"net.x{ours}" for name, ours in match.names.items())


@pytest.mark.usefixtures("few")
def test_a_pre_activation_network_is_not_taken_for_the_residual_network_with_the_same_tensors():
    """In order, its convolutions and BatchNorms have the very shapes of resnet20: only the blocks tell them apart."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (16, 3, 3, 3)}

    def bn(name: str, width: int) -> None:
        shapes.update({f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")})

    channels = 16
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(3):
            bn(f"layer{stage}.{block}.bn1", channels)
            shapes[f"layer{stage}.{block}.conv1.weight"] = (width, channels, 3, 3)
            bn(f"layer{stage}.{block}.bn2", width)
            shapes[f"layer{stage}.{block}.conv2.weight"] = (width, width, 3, 3)
            channels = width
    bn("bn", 64)
    shapes |= {"fc.weight": (10, 64), "fc.bias": (10,)}
    plain = [shape for name, shape in models.shapes("resnet20", 10).items() if not name.endswith(COUNTER)]
    assert list(shapes.values()) == plain
    with pytest.raises(ValueError, match="fits no known network; closest is resnet"):
        models.identify(shapes)


def test_a_network_that_fits_several_by_order_is_refused(monkeypatch):
    monkeypatch.setattr(models, "NAMES", ("resnet20", "twin"))
    monkeypatch.setitem(models.ARCHITECTURES, "twin", models.ARCHITECTURES["resnet20"])
    with pytest.raises(ValueError, match=r"^fits several networks by the order of its tensors: resnet20, twin$"):
        models.identify({f"x{name}": shape for name, shape in models.shapes("resnet20", 10).items()})


def closest(shapes: dict) -> str:
    with pytest.raises(ValueError, match=r"^fits no known network; closest is ") as caught:
        models.identify(shapes)
    return str(caught.value).removeprefix("fits no known network; closest is ")


@pytest.mark.usefixtures("few")
def test_an_unknown_network_is_refused_with_the_closest_one_and_the_first_difference():
    shapes = dict(models.shapes("resnet20", 10))
    assert closest({n: s for n, s in shapes.items() if n != "bn1.bias"}) == "resnet20, but bn1.bias is missing"
    more = shapes | {"extra": (1,), "linear.bias": (3,)}
    assert closest(more) == "resnet20, but extra is unknown (and 1 more)"
    assert closest(shapes | {"bn1.weight": (3,)}) == "resnet20, but bn1.weight has shape (3,), not (16,)"
    # After renaming: what is called otherwise is no difference.
    other = renamed("resnet32-projection", ("^linear", "fc"), ("shortcut", "downsample"))
    other.pop("layer2.0.downsample.1.bias")
    assert closest(other) == "resnet32-projection, but layer2.0.shortcut.1.bias is missing"
    biases = renamed("wrn-16-4", ("^fc", "linear")) | {"conv1.bias": (16,)}
    assert closest(biases) == "wrn-16-4, but conv1.bias is unknown"
    # Three linear layers behind the convolutions.
    three = dict(models.shapes("torchvision:vgg16_bn", 10)) | {"classifier.0.weight": (512, 512)}
    difference = "classifier.0.weight has shape (512, 512), not (4096, 25088)"
    assert closest(three) == f"torchvision:vgg16_bn, but {difference}"
    for shapes, first in ({"weight": (3,)}, "weight (3,)"), ({"a.weight": (0, 64), "a.bias": ()}, "a.weight (0, 64)"):
        with pytest.raises(ValueError, match=rf"is like none of them; it begins with {re.escape(first)}"):
            models.identify(shapes)


def test_names_that_would_become_one_stay_as_they_are():
    both = {"layer1.0.shortcut.0.weight": (8, 8, 1, 1), "layer1.0.downsample.0.weight": (8, 8, 1, 1)}
    assert identification.canonical(both) == {name: name for name in both}
