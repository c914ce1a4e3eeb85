"""Packed files lose nothing, hostile ones do no harm, and they are as small as promised."""

import functools
import hashlib
import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from networks import one_thread  # noqa: F401 (an automatic fixture)

import checkpoints
import models
import pruning
import utils
from deployment import packing
from formats import packed

METADATA = {
    "format": 2,
    "acc": 91.234567890123,
    "loss": 0.1,
    "zeros": 7,
    "epoch": 4,
    "dense_acc": 93,
    "classes": ["a", "ü"],
    "settings": {"arch": "resnet20", "dataset": "digits", "image_size": 16, "sparsity": 0.9},
    "history": [{"stage": "dense", "epoch": 1, "lr": 1e-17}],
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.247, 0.2435, 0.2616],
    "test_images": "folder 0123456789abcdef",
    "parent": "fedcba9876543210",
}


def checkpoint(sparsity: float, arch: str = "resnet20") -> dict:
    """A network with random statistics. Each weight is zero with probability `sparsity`."""
    return {"net": {key: value.clone() for key, value in random_net(sparsity, arch).items()}, **METADATA}


@functools.cache
def random_net(sparsity: float, arch: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    network = models.build(arch, 10)
    net = {key: torch.randn_like(v) if v.is_floating_point() else v + 2**40 for key, v in network.state_dict().items()}
    for key in pruning.prunable(network):
        net[key] *= 0.05
        net[key][torch.rand_like(net[key]) < sparsity] = 0.0
    return net


def bits(net: dict) -> dict:
    return {key: (value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()) for key, value in net.items()}


def same(one: dict, other: dict) -> bool:
    metadata = [{key: value for key, value in c.items() if key != "net"} for c in (one, other)]
    return metadata[0] == metadata[1] and bits(one["net"]) == bits(other["net"]) and [*one["net"]] == [*other["net"]]


@pytest.mark.parametrize("sparsity", [0, 0.01, 0.5, 0.9, 0.99, 0.9999, 1])
def test_nothing_is_lost(sparsity):
    original = checkpoint(sparsity)
    content = packing.pack(original)
    assert same(packed.unpack(content), original)
    assert packing.pack(original) == content


TOO_LARGE = ("resnet20", "resnet50", "wrn-28-10", "vgg16", "vgg19")  # for a test; others of their families are packed


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in models.ARCHITECTURES if arch not in TOO_LARGE])
def test_every_network_can_be_packed(arch):
    original = checkpoint(0.9, arch)
    assert same(packed.unpack(packing.pack(original)), original)


class Attentive(torch.nn.Module):
    """With what transformers have: a class token, weights of attention outside of layers, integer indices."""

    def __init__(self, classes: int):
        super().__init__()
        self.token = torch.nn.Parameter(torch.zeros(1, 1, 8))
        self.register_buffer("index", torch.arange(12).reshape(3, 4))
        self.patches = torch.nn.Conv2d(3, 8, 4, 4)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), 1, 8), x], 1)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.norm(x[:, 0]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tensors_that_are_no_weights_of_layers_are_kept_bit_for_bit(dtype, monkeypatch):
    monkeypatch.setattr(models, "NAMES", ("attentive",))
    monkeypatch.setitem(models.ARCHITECTURES, "attentive", Attentive)
    original = checkpoint(0.5, "attentive")
    original["net"]["index"] = torch.arange(12).reshape(3, 4) - 2**40
    original["net"]["token"][0, 0, 0] = 1.0 + 2**-20
    back = packed.unpack(packing.pack(original, dtype))
    assert dtype != "fp32" or same(back, original)
    layers = {"patches.weight", "attention.out_proj.weight", "head.weight"}
    others = [{name: value for name, value in c["net"].items() if name not in layers} for c in (original, back)]
    assert bits(others[0]) == bits(others[1])
    assert set(pruning.prunable(Attentive(2))) == layers
    for name, value in ("index", torch.zeros(3, 4)), ("token", torch.zeros(1, 1, 8).long()):
        with pytest.raises(utils.Failure, match=rf"{name} is torch\.(float32|int64), not torch\.(float32|int64)"):
            packing.pack(original | {"net": original["net"] | {name: value}})
    with pytest.raises(utils.Failure, match="index is missing"):
        packing.pack(original | {"net": {name: value for name, value in original["net"].items() if name != "index"}})


def test_a_network_with_other_names_is_packed_under_ours():
    original = checkpoint(0.9)
    foreign = {name.replace("linear", "fc"): value for name, value in original["net"].items()}
    assert same(packed.unpack(packing.pack(original | {"net": foreign})), original)


def odd_checkpoint() -> dict:
    """A network with -0.0, denormal and huge numbers, odd memory layouts, and without one of its counters."""
    original = checkpoint(0.9)
    net = original["net"]
    odd = torch.tensor([-0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0])
    net["layer1.0.conv1.weight"].view(-1)[: len(odd)] = odd
    net["bn1.bias"][: len(odd)] = odd
    net["layer2.0.conv1.weight"].zero_()
    net["layer3.0.conv1.weight"].fill_(1.0)
    net["layer3.0.conv2.weight"] = net["layer3.0.conv2.weight"].to(memory_format=torch.channels_last)
    net["linear.weight"] = net["linear.weight"].T.contiguous().T
    assert not net["layer3.0.conv2.weight"].is_contiguous()
    del net["bn1.num_batches_tracked"]  # files of old versions of PyTorch lack counters
    return original


def test_odd_values_and_layouts_are_kept_bit_for_bit():
    original = odd_checkpoint()
    assert same(packed.unpack(packing.pack(original)), original)


def test_a_network_without_counters():
    original = checkpoint(0.9)
    original["net"] = {key: v for key, v in original["net"].items() if not key.endswith("num_batches_tracked")}
    assert same(packed.unpack(packing.pack(original)), original)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_documented_format(dtype):
    """A second reader, written from the docstring of packed.py alone, finds the same numbers."""
    original = checkpoint(0.9) if dtype != "fp32" else odd_checkpoint()
    content = packing.pack(original, dtype)
    magic, version, header_bytes, file_bytes = struct.unpack("<8sIIQ", content[:24])
    assert (magic, version, file_bytes) == (bytes.fromhex("89 50 52 55 4E 45 44 0A"), 2, len(content))
    assert content[24:56] == hashlib.sha256(content[:24] + content[56:]).digest()
    header = json.loads(content[56:][:header_bytes])
    parts, position = [], 56 + header_bytes
    for size in header["parts"]:
        parts.append(zlib.decompress(content[position:][:size]))
        position += size
    metadata, others, mask, exponents, mantissas = parts
    assert position == len(content) and header["dtype"] == dtype
    renamed = {} if dtype == "fp32" else {"acc": "fp32_acc", "loss": "fp32_loss"}
    assert json.loads(metadata) == {renamed.get(key, key): value for key, value in METADATA.items()}

    def number(planes: bytes, index: int, count: int, kind: str) -> float:
        word = sum(planes[plane * count + index] << 8 * plane for plane in range(len(planes) // count))
        width = 8 * len(planes) // count
        word = word >> 1 | (word & 1) << width - 1
        if kind == "fp16":
            return np.uint16(word).view(np.float16).astype(np.float32)
        return np.uint32(word << 16 if kind == "bf16" else word).view(np.float32)

    count, stored, place, floats = len(exponents), 0, 0, []
    for value in packed.unpack(content)["net"].values():
        if value.dim() < 2:
            floats += [value] if value.is_floating_point() else []
            continue
        for expected in value.flatten().numpy():
            if mask[place // 8] >> place % 8 & 1:
                assert number(mantissas + exponents, stored, count, dtype).tobytes() == expected.tobytes()
                stored += 1
            else:
                assert expected.tobytes() == bytes(4)
            place += 1
    assert stored == count
    floats = torch.cat(floats).numpy()
    found = [number(others[: 4 * len(floats)], index, len(floats), "fp32") for index in range(len(floats))]
    assert np.array(found).tobytes() == floats.tobytes()
    counters = np.frombuffer(others[4 * len(floats) :], np.uint8).reshape(8, -1).T.copy().view("<i8")
    assert (counters == 2**40).all() and counters.size == sum(key.endswith("tracked") for key in original["net"])


def test_what_cannot_be_packed_is_refused():
    for key, value in (("conv1.weight", torch.nan), ("bn1.running_var", torch.inf)):
        bad = checkpoint(0.9)
        bad["net"][key].view(-1)[3] = value
        with pytest.raises(utils.Failure, match=f"{key} contains NaN or inf"):
            packing.pack(bad)
    bad = checkpoint(0.9)
    bad["net"]["bn1.bias"] = bad["net"]["bn1.bias"].double()
    with pytest.raises(utils.Failure, match=r"bn1\.bias is torch\.float64, not torch\.float32"):
        packing.pack(bad)
    with pytest.raises(utils.Failure, match="fits no known network"):
        packing.pack({"net": {"weight": torch.zeros(3)}})
    for odd in ((1, 2), {1: 2}, torch.zeros(2), float("nan")):
        with pytest.raises(utils.Failure, match="must be numbers, texts, lists and dictionaries"):
            packing.pack(checkpoint(0.9) | {"history": [odd]})
    with pytest.raises(utils.Failure, match="metadata of the checkpoint takes more than"):
        packing.pack(checkpoint(0.9) | {"history": ["x" * packed.MAX_METADATA]})


def test_entries_that_are_no_metadata_are_left_out():
    original = checkpoint(0.9)
    assert same(packed.unpack(packing.pack(original | {"arch": "resnet20", "optimizer": torch.zeros(3)})), original)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_rounding_is_to_nearest_keeps_the_zeros_and_is_labeled(dtype, torch_dtype):
    original = checkpoint(0.9)
    net = original["net"]
    tiny = torch.tensor([1e-45, -1e-45, 1e-12, -1e-12, 0.0, -0.0, 1.00390625, 1.01171875])  # the last two: bf16 ties
    net["layer1.0.conv1.weight"].view(-1)[: len(tiny)] = tiny
    content = packing.pack(original, dtype)
    back = packed.unpack(content)
    for key, value in net.items():
        if value.dim() < 2:
            assert torch.equal(back["net"][key], value), key
        else:
            rounded = value.to(torch_dtype).float()
            lost = (rounded == 0) & (value != 0)
            assert torch.equal(back["net"][key][~lost], rounded[~lost])
            assert torch.equal(back["net"][key] != 0, value != 0), "the zeros have changed"
            assert torch.equal(back["net"][key][lost].sign(), value[lost].sign())
            smallest = 2**-24 if dtype == "fp16" else 2**-133
            assert (back["net"][key][lost].abs() == smallest).all()
    assert back["net"]["layer1.0.conv1.weight"].view(-1)[5].signbit()
    assert back["dtype"] == dtype
    assert "acc" not in back and "loss" not in back
    assert (back["fp32_acc"], back["fp32_loss"]) == (METADATA["acc"], METADATA["loss"])
    assert same(packed.unpack(packing.pack(back, dtype)), back)
    with pytest.raises(utils.Failure, match=f"rounded to {dtype}: it cannot be packed as fp32"):
        packing.pack(back)
    net["conv1.weight"].view(-1)[0] = -3.4028e38 if dtype == "bf16" else -65520.0
    with pytest.raises(utils.Failure, match=rf"conv1\.weight has weights that are too large for {dtype}"):
        packing.pack(original, dtype)


def test_a_packed_file_is_read_like_any_checkpoint(tmp_path):
    made = checkpoint(0.9)
    for name, value in made["net"].items():
        if name.endswith("running_var"):
            value.abs_()
    checkpoints.save(tmp_path / "90percent_iter_ckpt.pth", made)
    original = checkpoints.load_checkpoint(tmp_path / "90percent_iter_ckpt.pth")
    path = packing.name(tmp_path / "90percent_iter_ckpt.pth")
    assert path == tmp_path / "90percent_iter_ckpt.packed"
    assert packing.name(path, "bf16") == tmp_path / "90percent_iter_ckpt.bf16.packed"
    checkpoints.write(path, packing.pack(original))
    assert same(checkpoints.load_checkpoint(path), original)
    checkpoints.write(path, packing.pack(original, "bf16"))
    assert checkpoints.load_checkpoint(path)["dtype"] == "bf16"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(utils.Failure, match=r"iter_ckpt\.packed is not a checkpoint.*: cut short"):
        checkpoints.load_checkpoint(path)


def test_nan_is_refused_when_a_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda _value: torch.ones(()))
    bad = checkpoint(0.9)
    bad["net"]["conv1.weight"][0] = torch.nan
    (tmp_path / "x.packed").write_bytes(packing.pack(bad))
    monkeypatch.undo()
    with pytest.raises(utils.Failure, match=r"conv1\.weight"):
        checkpoints.load_checkpoint(tmp_path / "x.packed")


def test_every_damage_is_found():
    content = packing.pack(checkpoint(1))
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(utils.Failure):
            packed.unpack(bytes(damaged))
    for size in [*range(200), *range(200, len(content), 97), len(content) - 1]:
        with pytest.raises(utils.Failure, match=r"cut short|not a packed network"):
            packed.unpack(content[:size])
    with pytest.raises(utils.Failure, match=f"damaged: it has {len(content) + 1} bytes instead of {len(content)}"):
        packed.unpack(content + b"\0")


@pytest.mark.parametrize(
    "version, message",
    [
        (1, "packed in version 1, which this program no longer reads: pack the checkpoint again with deploy.py"),
        (3, "packed in version 3, or damaged: this program reads version 2"),
    ],
)
def test_other_versions_are_refused(version, message):
    content = small_file()
    with pytest.raises(utils.Failure, match=message):
        packed.unpack(content[:8] + struct.pack("<I", version) + content[12:])


PARTS = ["metadata", "others", "mask", "exponents", "mantissas"]


@functools.cache
def small_file() -> bytes:
    return packing.pack(checkpoint(0.9))


def forged(header: dict | bytes | None = None, **parts: bytes) -> bytes:
    """A packed file with other contents and a right checksum. `header` is the whole header in bytes, or changes."""
    good, contents = packed._split(small_file())
    contents = [parts.get(name, content) for name, content in zip(PARTS, contents)]
    if not isinstance(header, bytes):
        header = json.dumps(good | {"parts": [len(content) for content in contents]} | (header or {})).encode()
    return packing._assemble(header, contents)


BOMB = zlib.compress(bytes(2**27), 9)
HOSTILE = {
    "unknown network": {"header": {"arch": "vgg"}},
    "network is a list": {"header": {"arch": []}},
    "unknown network of torchvision": {"header": {"arch": "torchvision:vgg"}},
    "huge network": {"header": {"arch": "torchvision:regnet_y_128gf"}},
    "other network": {"header": {"arch": "resnet50"}},
    "unknown type": {"header": {"dtype": "fp8"}},
    "type is a list": {"header": {"dtype": []}},
    "other type": {"header": {"dtype": "bf16"}},
    **{
        f"{classes!s:.9} classes": {"header": {"classes": classes}}
        for classes in (10**12, 10**300, 2**16, 11, 0, -5, 2.0, "10", True, None)
    },
    "lacks weights": {"header": {"absent": ["conv1.weight"]}},
    "lacks numbers": {"header": {"absent": [1, 2]}},
    "lacks a number": {"header": {"absent": 3}},
    "lacks an unknown counter": {"header": {"absent": ["x.num_batches_tracked"]}},
    "lacks a counter that is there": {"header": {"absent": ["bn1.num_batches_tracked"]}},
    "huge part": {"header": {"parts": [10**30] * 5}},
    "negative part": {"header": {"parts": [-1] * 5}},
    "no parts": {"header": {"parts": []}},
    "parts are a number": {"header": {"parts": 5}},
    "parts are texts": {"header": {"parts": ["1"] * 5}},
    "header is a list": {"header": b"[]"},
    "header is empty": {"header": b""},
    "header is deep": {"header": b"[" * 100_000},
    "header is no text": {"header": b"\xff\xfe"},
    "header has a huge number": {"header": b'{"parts": ' + b"9" * 10_000 + b"}"},
    **{f"{part} is a bomb": {part: BOMB} for part in PARTS},
    **{f"{part} is empty": {part: b""} for part in PARTS},
    **{f"{part} is too short": {part: zlib.compress(bytes(100))} for part in PARTS[1:]},
    **{f"{part} is cut short": {part: packed._split(small_file())[1][index][:-5]} for index, part in enumerate(PARTS)},
    "more weights in the mask": {"mask": zlib.compress(b"\xff" * (270_896 // 8 + 1))},
    "no weights in the mask": {"mask": zlib.compress(bytes(270_896 // 8))},
    "metadata is a list": {"metadata": zlib.compress(b'["acc"]')},
    "metadata is a number": {"metadata": zlib.compress(b"3")},
    "metadata is deep": {"metadata": zlib.compress(b"[" * 100_000)},
    "unknown metadata": {"metadata": zlib.compress(b'{"net": 3}')},
    "two streams": {"metadata": zlib.compress(b"{}") + b"x"},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_crafted_files_are_refused_and_take_little_memory(kind):
    content = forged(**HOSTILE[kind])
    tracemalloc.start()
    with pytest.raises(utils.Failure, match="although its checksum is right"):
        packed.unpack(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_a_forgery_that_changes_nothing_is_read():
    assert same(packed.unpack(forged()), checkpoint(0.9))


@pytest.mark.parametrize("sparsity, over", [(0.5, 1.005), (0.9, 1.005), (0.98, 1.06)])
def test_a_file_is_close_to_the_entropy_of_mask_and_values(sparsity, over):
    """The bound holds for independent weights: n * H(density) bits for the mask of each layer of n weights (H: binary
    entropy), and the empirical entropy of each byte of the rotated values."""
    original = checkpoint(sparsity)
    weights = [value.flatten() for value in original["net"].values() if value.dim() > 1]
    bound = 0.0
    for weight in weights:
        share = float((weight == 0).double().mean())
        bound -= len(weight) * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    words = torch.cat([weight[weight != 0] for weight in weights]).view(torch.int32).numpy().view(np.uint32)
    for plane in (words & 0x7F) * 2 + (words >> 31), words >> 7 & 0xFF, words >> 15 & 0xFF, words >> 23 & 0xFF:
        _, counts = np.unique(plane, return_counts=True)
        bound -= (counts * np.log2(counts / counts.sum())).sum() / 8
    rest = sum(4 * value.numel() for value in original["net"].values() if value.dim() < 2)
    assert len(packing.pack(original)) < over * bound + rest


def test_no_checkpoint_of_ours_has_a_negative_zero():
    """A packed file stores -0.0 like any other value."""
    network = models.build("resnet20", 10)
    with torch.no_grad():
        network.conv1.weight[0] = -0.0
        network.bn1.bias.fill_(-0.0)
    state = checkpoints.plain_state(network)
    for key in "conv1.weight", "bn1.bias":
        zeros = state[key][state[key] == 0]
        assert len(zeros) and not zeros.signbit().any()
    assert network.bn1.bias.signbit().all(), "the network itself has changed"
