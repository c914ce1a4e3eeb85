"""Packed files: nothing is lost, nothing is believed, and they are as small as promised."""

import functools
import hashlib
import json
import tracemalloc
import zlib

import numpy as np
import pytest
import torch

import entropy_coder
import models
import packed
import pruning
import store
import utils

FACTS = {
    "acc": 91.234567890123,
    "loss": 0.1,
    "zeros": 7,
    "epoch": 4,
    "dense_acc": 93,
    "classes": ["a", "ü"],
    "settings": {"arch": "resnet20", "dataset": "digits", "image_size": 16, "sparsity": 0.9},
    "history": [{"stage": "dense", "epoch": 1, "lr": 1e-17}],
}


def checkpoint(sparsity: float, arch: str = "resnet20") -> dict:
    """A network with random statistics, each of whose weights is zero with the same chance."""
    torch.manual_seed(5)
    network = models.build(arch, 10)
    net = {key: torch.randn_like(v) if v.is_floating_point() else v + 2**40 for key, v in network.state_dict().items()}
    for key in pruning.prunable(network):
        net[key] *= 0.05
        net[key][torch.rand_like(net[key]) < sparsity] = 0.0
    return {"net": net, **FACTS}


def bits(net: dict) -> dict:
    return {key: (value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()) for key, value in net.items()}


def same(one: dict, other: dict) -> bool:
    facts = [{key: value for key, value in c.items() if key != "net"} for c in (one, other)]
    return facts[0] == facts[1] and bits(one["net"]) == bits(other["net"]) and [*one["net"]] == [*other["net"]]


@pytest.mark.parametrize("sparsity", [0, 0.01, 0.5, 0.9, 0.99, 0.9999, 1])
def test_nothing_is_lost(sparsity):
    original = checkpoint(sparsity)
    content = packed.pack(original)
    assert same(packed.unpack(content), original)
    assert packed.pack(original) == content


@pytest.mark.parametrize("arch", [arch for arch in models.ARCHITECTURES if arch != "resnet20"])
def test_every_network_can_be_packed(arch):
    original = checkpoint(0.9, arch)
    assert same(packed.unpack(packed.pack(original)), original)


def test_odd_values_and_layouts_are_kept_bit_for_bit():
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
    del net["bn1.num_batches_tracked"]  # as files of old versions of PyTorch do
    assert same(packed.unpack(packed.pack(original)), original)


def test_what_cannot_be_packed_is_refused():
    changes = {
        "values in conv1.weight that are not finite|conv1.weight has values": ("conv1.weight", torch.nan),
        "bn1.running_var has values that are not finite": ("bn1.running_var", torch.inf),
    }
    for message, (key, value) in changes.items():
        bad = checkpoint(0.9)
        bad["net"][key].view(-1)[3] = value
        with pytest.raises(utils.Failure, match=message):
            packed.pack(bad)
    bad = checkpoint(0.9)
    bad["net"]["bn1.bias"] = bad["net"]["bn1.bias"].double()
    with pytest.raises(utils.Failure, match=r"bn1\.bias is of torch\.float64, not of torch\.float32"):
        packed.pack(bad)
    with pytest.raises(utils.Failure, match="fits no known network"):
        packed.pack({"net": {"weight": torch.zeros(3)}})
    for odd in ((1, 2), {1: 2}, torch.zeros(2), float("nan")):
        with pytest.raises(utils.Failure, match="neither number, text"):
            packed.pack(checkpoint(0.9) | {"history": [odd]})


@pytest.mark.parametrize(("values", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_rounding_is_to_nearest_keeps_the_zeros_and_is_labelled(values, dtype):
    original = checkpoint(0.9)
    net = original["net"]
    tiny = torch.tensor([1e-45, -1e-45, 1e-12, -1e-12, 0.0, -0.0, 1.00390625, 1.01171875])  # the last two: bf16 ties
    net["layer1.0.conv1.weight"].view(-1)[: len(tiny)] = tiny
    content = packed.pack(original, values)
    back = packed.unpack(content)
    for key, value in net.items():
        if value.dim() < 2:
            assert torch.equal(back["net"][key], value), key
        else:
            rounded = value.to(dtype).float()
            lost = (rounded == 0) & (value != 0)
            assert torch.equal(back["net"][key][~lost], rounded[~lost])
            assert torch.equal(back["net"][key] != 0, value != 0), "the zeros are others"
            assert torch.equal(back["net"][key][lost].sign(), value[lost].sign())
            smallest = 2**-24 if values == "fp16" else 2**-133
            assert (back["net"][key][lost].abs() == smallest).all()
    assert back["values"] == values
    assert "acc" not in back and "loss" not in back
    assert (back["fp32_acc"], back["fp32_loss"]) == (FACTS["acc"], FACTS["loss"])
    assert same(packed.unpack(packed.pack(back, values)), back)
    with pytest.raises(utils.Failure, match=f"rounded to {values}: it cannot be packed as fp32"):
        packed.pack(back)
    net["conv1.weight"].view(-1)[0] = -3.4028e38 if values == "bf16" else -65520.0
    with pytest.raises(utils.Failure, match=rf"conv1\.weight has values that are too large for {values}"):
        packed.pack(original, values)


def test_a_packed_file_is_read_as_any_checkpoint(tmp_path):
    store.save(tmp_path / "90percent_iter_ckpt.pth", checkpoint(0.9))
    original = store.load_checkpoint(tmp_path / "90percent_iter_ckpt.pth")
    path = packed.name(tmp_path / "90percent_iter_ckpt.pth")
    assert path == tmp_path / "90percent_iter_ckpt.packed"
    assert packed.name(path, "bf16") == tmp_path / "90percent_iter_ckpt.bf16.packed"
    store.write(path, packed.pack(original))
    assert same(store.load_checkpoint(path), original)
    store.write(path, packed.pack(original, "bf16"))
    assert store.load_checkpoint(path)["values"] == "bf16"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(utils.Failure, match=r"iter_ckpt\.packed is not a checkpoint that can be loaded: cut short"):
        store.load_checkpoint(path)


def test_values_that_are_not_finite_are_refused_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda _value: torch.ones(()))
    bad = checkpoint(0.9)
    bad["net"]["conv1.weight"][0] = torch.nan
    (tmp_path / "x.packed").write_bytes(packed.pack(bad))
    monkeypatch.undo()
    with pytest.raises(utils.Failure, match=r"values in conv1\.weight that are not finite"):
        store.load_checkpoint(tmp_path / "x.packed")


def test_every_damage_is_found():
    content = packed.pack(checkpoint(1))
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(utils.Failure):
            packed.unpack(bytes(damaged))
    for size in [*range(200), *range(200, len(content), 97), len(content) - 1]:
        with pytest.raises(utils.Failure, match=r"cut short|not a packed network"):
            packed.unpack(content[:size])
    with pytest.raises(utils.Failure, match=f"damaged: {len(content) + 1} bytes are there instead of {len(content)}"):
        packed.unpack(content + b"\0")


@functools.cache
def small_file() -> bytes:
    return packed.pack(checkpoint(0.9))


def forged(header=None, **parts) -> bytes:
    """A packed file with other contents and a right checksum. A part is given as bytes; `header` changes or is it."""
    good, contents = packed._open(small_file())
    names = ["facts", "others", "layers", "kernels", "tables", "exponents", "mantissas"]
    contents = [parts.get(name, content) for name, content in zip(names, contents)]
    if not isinstance(header, bytes):
        header = json.dumps(good | {"parts": [len(content) for content in contents]} | (header or {})).encode()
    body = b"".join([header, *contents])
    start = packed.START.pack(packed.MAGIC, packed.VERSION, len(header), packed.START.size + packed.DIGEST + len(body))
    return start + hashlib.sha256(start + body).digest() + body


bomb = zlib.compress(bytes(2**28), 9)
uneven = np.zeros((22, 256), "<u2")
uneven[:, 0] = 2**14 - 1
HOSTILE = {
    "unknown network": {"header": {"arch": "vgg"}},
    "network is a list": {"header": {"arch": []}},
    "other network": {"header": {"arch": "resnet50"}},
    "unknown type": {"header": {"values": "fp8"}},
    "other type": {"header": {"values": "bf16"}},
    **{
        f"{classes!s:.9} classes": {"header": {"classes": classes}}
        for classes in (10**12, 10**300, 11, 0, -5, 2.0, "10")
    },
    "lacks weights": {"header": {"absent": ["conv1.weight"]}},
    "lacks numbers": {"header": {"absent": [1, 2]}},
    "lacks a number": {"header": {"absent": 3}},
    "lacks a counter": {"header": {"absent": ["bn1.num_batches_tracked"]}},
    "huge part": {"header": {"parts": [10**30] * 7}},
    "negative part": {"header": {"parts": [-1] * 7}},
    "no parts": {"header": {"parts": []}},
    "parts are a number": {"header": {"parts": 7}},
    "header is a list": {"header": b"[]"},
    "header is deep": {"header": b"[" * 100_000},
    "header is no text": {"header": b"\xff\xfe"},
    "header has a huge number": {"header": b'{"parts": ' + b"9" * 10_000 + b"}"},
    **{f"{part} is a bomb": {part: bomb} for part in ("facts", "others", "layers", "tables", "mantissas")},
    **{
        f"{part} is empty": {part: b""}
        for part in ("facts", "others", "layers", "kernels", "tables", "exponents", "mantissas")
    },
    "kernels run out": {"kernels": bytes(1000)},
    "exponents run on": {"exponents": bytes(10**6)},
    "frequencies": {"tables": zlib.compress(uneven.tobytes())},
    "huge counts": {"layers": zlib.compress(b"\xff" * (22 * 40 + 512))},
    "facts are a list": {"facts": zlib.compress(b'["acc"]')},
    "facts are a number": {"facts": zlib.compress(b"3")},
    "facts are deep": {"facts": zlib.compress(b"[" * 100_000)},
    "unknown fact": {"facts": zlib.compress(b'{"net": 3}')},
    "two streams": {"facts": zlib.compress(b"{}") + b"x"},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_made_to_harm_is_refused_and_takes_no_memory(kind):
    content = forged(**HOSTILE[kind])
    tracemalloc.start()
    with pytest.raises(utils.Failure, match="although its checksum is right"):
        packed.unpack(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6 + (400e6 if kind == "other network" else 0)


def test_a_forgery_that_changes_nothing_is_read():
    assert same(packed.unpack(forged()), checkpoint(0.9))


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_a_file_is_as_small_as_the_entropy_of_mask_and_values(sparsity):
    original = checkpoint(sparsity, "resnet18")
    net = original["net"]
    bound = packed.entropy(net)
    mask = values = 0.0
    flat = [v.flatten() for v in net.values() if v.dim() > 1]
    for weight in flat:
        share = float((weight == 0).double().mean())
        mask -= len(weight) * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    words = torch.cat([weight[weight != 0] for weight in flat]).view(torch.int32).numpy().view(np.uint32)
    for plane in (words & 0x7F) * 2 + (words >> 31), words >> 7 & 0xFF, words >> 15 & 0xFF, words >> 23 & 0xFF:
        _, counts = np.unique(plane, return_counts=True)
        values -= (counts * np.log2(counts / counts.sum())).sum() / 8
    assert bound == pytest.approx({"mask": mask, "values": values})
    others = sum(4 * v.numel() for v in net.values() if v.dim() < 2)
    assert len(packed.pack(original)) < 1.004 * (mask + values) + others


def test_kernels_that_are_pruned_as_a_whole_take_less_than_their_weights_alone():
    original = checkpoint(0.5)
    for value in original["net"].values():
        if value.shape[2:] == (3, 3):
            value[torch.rand(value.shape[:2]) < 0.8] = 0.0
    sizes = packed._open(packed.pack(original))[0]["parts"]
    assert sizes[3] < 0.75 * packed.entropy(original["net"])["mask"]


def test_the_code_is_that_of_version_1():
    """Files that were written stay readable."""
    symbols = [np.array([0, 1, 2, 1, 1, 1, 0, 1] * 5), np.array([2, 2, 0])]
    frequencies = np.array([entropy_coder.normalise(np.bincount(layer, minlength=3)) for layer in symbols])
    assert frequencies.tolist() == [[4096, 10240, 2048], [5461, 0, 10923]]
    code = entropy_coder.encode(symbols, frequencies)
    assert code.hex() == "f84b6e006571c19af5c7"
    assert np.array_equal(entropy_coder.decode(code, [40, 3], frequencies), np.concatenate(symbols))


def test_no_checkpoint_that_is_written_has_a_negative_zero():
    network = models.build("resnet20", 10)
    with torch.no_grad():
        network.conv1.weight[0] = -0.0
        network.bn1.bias.fill_(-0.0)
    state = store.plain_state(network)
    for key in "conv1.weight", "bn1.bias":
        zeros = state[key][state[key] == 0]
        assert len(zeros) and not zeros.signbit().any()
    assert network.bn1.bias.signbit().all(), "the network itself was changed"
