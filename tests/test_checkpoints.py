"""Checkpoints: both directions with pytorch-cifar, whole or not at all, and nothing runs when they are read."""

import codecs
import copy
import errno
import os
import pickle
import random
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Killed
from reference_resnet18 import ResNet18
from torch import Tensor, nn

import checkpoints
import models
import utils


def scrambled(network: nn.Module) -> nn.Module:
    """The network with statistics that are not those of a new one."""
    torch.manual_seed(3)
    network.train()
    with torch.no_grad():
        network(torch.randn(8, 3, 32, 32))
    return network.eval()


# --- What is read and written --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_pytorch_cifar_checkpoint_loads(tmp_path, prefix):
    theirs = scrambled(ResNet18())
    net = {prefix + name: value for name, value in theirs.state_dict().items()}
    torch.save({"net": net, "acc": 95.48, "epoch": 199}, tmp_path / "ckpt.pth")
    checkpoint = checkpoints.load_checkpoint(tmp_path / "ckpt.pth")
    assert (checkpoint["arch"], checkpoint["acc"], checkpoint["epoch"]) == ("resnet18", 95.48, 199)
    ours = checkpoints.build_network(checkpoint).eval()
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))


def test_ours_loads_in_pytorch_cifar(tmp_path):
    ours = scrambled(models.build("resnet18", 10)).to(memory_format=torch.channels_last)
    checkpoints.save(tmp_path / "ckpt.pth", {"net": checkpoints.plain_state(ours), "acc": 95.48, "epoch": 199})
    checkpoint = torch.load(tmp_path / "ckpt.pth", weights_only=True)
    theirs = ResNet18().eval()
    theirs.load_state_dict(checkpoint["net"], strict=True)
    assert all(value.is_contiguous() for value in checkpoint["net"].values())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_other_float_types_and_parameters_are_read(tmp_path):
    network = models.build("resnet20", 10)
    low = {name: value.bfloat16() for name, value in network.state_dict().items()}
    checkpoints.save(tmp_path / "x.pth", {"net": low})
    torch.save({"net": network.state_dict(keep_vars=True)}, tmp_path / "y.pth")
    for name in "x.pth", "y.pth":
        net = checkpoints.load_checkpoint(tmp_path / name)["net"]
        assert checkpoints.digest(net)
        assert net["conv1.weight"].dtype == torch.float32
        assert net["bn1.num_batches_tracked"].dtype == torch.int64
        assert not any(value.requires_grad for value in net.values())


def test_counters_that_old_files_lack_are_those_of_a_new_network(tmp_path):
    state = models.build("resnet20", 10).state_dict()
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save({"net": old}, tmp_path / "x.pth")
    network = checkpoints.build_network(checkpoints.load_checkpoint(tmp_path / "x.pth"))
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_numbers_saved_as_tensors_are_read_as_numbers(tmp_path):
    net = models.build("resnet20", 10).state_dict()
    torch.save({"net": net, "acc": torch.tensor(93.5), "epoch": torch.tensor([7])}, tmp_path / "x.pth")
    checkpoint = checkpoints.load_checkpoint(tmp_path / "x.pth")
    assert (checkpoint["acc"], checkpoint["epoch"]) == (93.5, 7)
    assert type(checkpoint["acc"]) is float and type(checkpoint["epoch"]) is int


def test_a_plain_state_is_contiguous_has_no_negative_zero_and_shares_no_memory():
    network = models.build("resnet20", 10).to(memory_format=torch.channels_last)
    with torch.no_grad():
        network.conv1.weight[0] = -0.0
    state = checkpoints.plain_state(network)
    assert state.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(state[name], value) and state[name].is_contiguous()
        assert state[name].data_ptr() != value.data_ptr()
    assert not state["conv1.weight"][0].signbit().any()
    assert network.conv1.weight[0].signbit().all()


def test_a_digest_depends_on_every_name_and_value_and_not_on_their_order():
    net = models.build("resnet20", 10).state_dict()
    digest = checkpoints.digest(net)
    assert len(digest) == 16 and int(digest, 16) >= 0
    assert checkpoints.digest(dict(reversed(net.items()))) == digest
    last = {
        name: value.to(memory_format=torch.channels_last) if value.dim() == 4 else value for name, value in net.items()
    }
    assert checkpoints.digest(last) == digest
    for name in "conv1.weight", "bn1.num_batches_tracked", "linear.bias":
        other = copy.deepcopy(net)
        other[name].view(-1)[0] += 1
        assert checkpoints.digest(other) != digest
    assert checkpoints.digest({"a": torch.zeros(1)}) != checkpoints.digest({"b": torch.zeros(1)})


# --- Whole or not at all -------------------------------------------------------------------------------------------


def test_the_same_content_gives_the_same_bytes(tmp_path):
    """Also when equal strings are other objects, as after a resume."""
    words = ["stage", "".join(["sta", "ge"])]
    assert words[0] is not words[1]
    for name, second in ("a.pth", words[0]), ("b.pth", words[1]):
        content = {
            "net": {"weight": torch.arange(9.0)},
            "acc": 1.5,
            "history": [{words[0]: words[0]}, {second: second}],
        }
        checkpoints.save(tmp_path / name, content)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    loaded = checkpoints.load(tmp_path / "b.pth")
    assert loaded["history"] == [{"stage": "stage"}] * 2 and torch.equal(loaded["net"]["weight"], torch.arange(9.0))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    checkpoints.write(tmp_path / "a", b"old")

    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(utils.Failure, match="a cannot be written: No space left on device") as failure:
        checkpoints.write(tmp_path / "a", b"new")
    assert failure.value.code == 1
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("function", "call", "left"), [("fsync", 1, b"old"), ("replace", 1, b"old"), ("fsync", 2, b"new")]
)
def test_a_kill_in_the_middle_of_a_write_leaves_a_whole_file(tmp_path, monkeypatch, function, call, left):
    """Killed before the bytes reach the disk, before the rename, before the rename reaches the disk."""
    checkpoints.write(tmp_path / "a", b"old")
    real, calls = getattr(os, function), []

    def kill(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == call:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(os, function, kill)
    with pytest.raises(Killed):
        checkpoints.write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == left
    assert all(re.fullmatch(r"a|\.a\.[0-9a-f]{8}\.tmp", path.name) for path in tmp_path.iterdir())
    monkeypatch.undo()
    checkpoints.write(tmp_path / "a", b"newer")
    assert (tmp_path / "a").read_bytes() == b"newer"


def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    steps = []
    for name in "fsync", "replace":
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments, n=name, real=real: steps.append(n) or real(*arguments))
    checkpoints.write(tmp_path / "a", b"new")
    assert steps == ["fsync", "replace", "fsync"]


# --- Files that cannot be used -------------------------------------------------------------------------------------


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def changed(**changes: object) -> Callable[[dict], dict]:
    """A checkpoint with other tensors, `bn1__weight` for bn1.weight; None takes one away."""

    def change(net: dict) -> dict:
        net = net | {name.replace("__", "."): value for name, value in changes.items()}
        return {"net": {name: value for name, value in net.items() if value is not None}}

    return change


def more(**entries: object) -> Callable[[dict], dict]:
    """A checkpoint of ours, by its mark, with more entries beside `net`."""
    return lambda net: {"format": checkpoints.FORMAT, "net": net} | entries


SETTINGS = {"arch": "resnet20", "dataset": "digits", "image_size": 16}


def with_settings(**settings: object) -> Callable[[dict], dict]:
    return more(acc=1.0, zeros=0, settings=SETTINGS | settings)


def expanded() -> Tensor:
    return torch.zeros(1, 1).expand(10**10, 64)


with warnings.catch_warnings(action="ignore"):  # about a prototype
    NESTED = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)])
BAD_SETTINGS = "its settings are not in the form that main.py writes"
BAD_FILES = {
    "payload": (
        more(acc=Payload("executed")),
        "asks for .*mkdir, not just for tensors and plain values",
    ),
    "no net": (lambda net: {"ema": net}, "holds no network: .* it has 'ema': to take 'ema', save it alone$"),
    "empty net": (lambda _net: {"net": {}}, "holds no network: .* it has 'net'$"),
    "nothing": (lambda _net: {}, "holds no network: .* it has nothing$"),
    "a list": (lambda net: [net], "holds a list, not a dictionary with the weights"),
    "no tensors": (lambda _net: {"net": {"conv1.weight": 3}}, "holds no network"),
    "not tensors": (
        lambda net: {"net": net | {"conv1.weight": [3]}},
        "entries in its .net. that are not tensors, such as conv1",
    ),
    "names are numbers": (
        lambda net: {"net": net | {3: torch.zeros(1)}},
        "entries in its .net. that are not tensors, such as 3",
    ),
    "twice": (lambda net: {"net": net | {"module.bn1.weight": net["bn1.weight"]}}, "both with and without a prefix"),
    "missing key": (changed(bn1__weight=None), "closest is resnet20, but bn1.weight is missing"),
    "extra key": (changed(extra=torch.zeros(3)), "closest is resnet20, but extra is unknown"),
    "wrong shape": (changed(bn1__weight=torch.zeros(3)), r"bn1.weight has shape \(3,\), not \(16,\)"),
    "nan": (changed(bn1__weight=torch.full((16,), torch.nan)), "bn1.weight that are not finite"),
    "whole numbers": (
        changed(bn1__weight=torch.zeros(16, dtype=torch.int32)),
        "bn1.weight in a form .* a float tensor",
    ),
    "complex": (changed(bn1__weight=torch.zeros(16, dtype=torch.complex64)), "bn1.weight in a form .* plain tensor"),
    "sparse": (changed(linear__weight=torch.zeros(10, 64).to_sparse()), "linear.weight in a form"),
    "meta": (changed(linear__weight=torch.zeros(10, 64, device="meta")), "linear.weight in a form"),
    "huge": (changed(linear__weight=expanded()), "linear.weight in a form that claims more values"),
    **{
        f"{classes} classes": (
            changed(linear__weight=torch.zeros(classes, 64), linear__bias=torch.zeros(classes)),
            f"a network with {classes} outputs, and not 2 to 65536|linear.weight has shape .0, 64.",
        )
        for classes in (0, 1, 2**16 + 1)
    },
    "small storage": (
        changed(linear__weight=torch.zeros(1, 1).expand(2**16, 64), linear__bias=torch.zeros(1).expand(2**16)),
        "linear.weight in a form that claims more values than the file holds",
    ),
    "nested": (
        changed(bn1__weight=NESTED),
        "bn1.weight in a form that is not a plain tensor",
    ),
    "bytes": (changed(bn1__weight=torch.zeros(16, dtype=torch.uint8)), "bn1.weight quantized: save the network before"),
    "terminal commands": (changed(**{"\x1b[31mred": torch.zeros(3)}), r"closest is resnet20, but \\x1b\[31mred is"),
    "overflow": (changed(bn1__weight=torch.full((16,), 1e300, dtype=torch.float64)), "bn1.weight that are not finite"),
}
BAD_METADATA = {
    **{
        f"image size {size}": (with_settings(image_size=size), BAD_SETTINGS)
        for size in (0, -4, 15, 1025, 10**9, 10**400)
    },
    **{
        f"{name} is unknown": (with_settings(**{name: "$\\bad{$"}), BAD_SETTINGS)
        for name in ("mode", "allocation", "retrain")
    },
    "excluded layers are a number": (with_settings(exclude=3), BAD_SETTINGS),
    "excluded layers are unknown": (with_settings(exclude="nowhere"), "no convolution or linear layer nowhere"),
    "accuracy without a value": (more(acc=torch.zeros((), device="meta")), "acc in a form that is not a plain tensor"),
    "accuracy is text": (more(acc="high"), "acc is not a finite number"),
    "accuracy is huge": (more(acc=10**400), "acc is not a finite number"),
    "accuracy is many": (more(acc=torch.zeros(2)), "acc is not a finite number"),
    "loss is nan": (more(loss=float("nan")), "loss is not a finite number"),
    "dtype is unknown": (more(dtype="fp8"), "its dtype is unknown"),
    "two means": (more(mean=[0.5, 0.5], std=[0.5] * 3), "its mean is not three fractions"),
    "mean is text": (more(mean="0.5", std=[0.5] * 3), "its mean is not three fractions"),
    "mean is nan": (more(mean=[0.5, 0.5, float("nan")], std=[0.5] * 3), "its mean is not three fractions"),
    "deviation is zero": (more(mean=[0.5] * 3, std=[0.5, 0.0, 0.5]), "its std is not three fractions"),
    "mean alone": (more(mean=[0.5] * 3), "it has only one of mean and standard deviation"),
    "settings are a list": (more(acc=1.0, zeros=0, settings=[1]), BAD_SETTINGS),
    "settings are few": (more(acc=1.0, zeros=0, settings={"arch": "resnet20"}), BAD_SETTINGS),
    "a setting is a list": (with_settings(lr=[0.1]), BAD_SETTINGS),
    "a setting's name is not printable": (with_settings(**{"a\nb": 1}), BAD_SETTINGS),
    "arch is a number": (with_settings(arch=3), BAD_SETTINGS),
    "epochs are none": (with_settings(epochs=0), BAD_SETTINGS),
    "a time without end": (with_settings(ms=float("inf")), BAD_SETTINGS),
    **{
        f"sparsity is {value!s:.9}": (with_settings(sparsity=value), BAD_SETTINGS)
        for value in ("0.5", None, float("nan"), 10**400, 1.5)
    },
    "no accuracy": (more(zeros=0, settings=SETTINGS), BAD_SETTINGS),
    "no zeros": (more(acc=1.0, settings=SETTINGS), BAD_SETTINGS),
}


def refused(path, message: str) -> None:
    with pytest.raises(utils.Failure, match=message) as failure:
        checkpoints.load_checkpoint(path)
    assert str(path) in str(failure.value)
    assert "\n" not in str(failure.value)
    assert failure.value.code == 2


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_checkpoint_is_named_with_what_is_wrong(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make, message = BAD_FILES[kind]
    torch.save(make(models.build("resnet20", 10).state_dict()), "x.pth")
    refused(tmp_path / "x.pth", message)
    assert os.listdir(tmp_path) == ["x.pth"], "reading a file ran its code"


@pytest.mark.parametrize("kind", BAD_METADATA)
def test_only_files_with_our_mark_are_held_to_our_form(tmp_path, kind):
    """Of others the network is taken, and what has another form than ours is ignored."""
    make, message = BAD_METADATA[kind]
    content = make(models.build("resnet20", 10).state_dict())
    torch.save(content, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", message)
    torch.save({name: value for name, value in content.items() if name != "format"}, tmp_path / "x.pth")
    checkpoint = checkpoints.load_checkpoint(tmp_path / "x.pth")
    assert checkpoint["taken"] == "net of resnet20" and "settings" not in checkpoint
    checkpoints.build_network(checkpoint)


def test_good_metadata_is_not_refused(tmp_path):
    net = models.build("resnet20", 10).state_dict()
    for make in more(), more(mean=[0.5] * 3, std=[0.25] * 3, acc=93), with_settings(epochs=3, sparsity=0.5):
        torch.save(make(net), tmp_path / "x.pth")
        assert checkpoints.load_checkpoint(tmp_path / "x.pth")["arch"] == "resnet20"


@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"PK\x03\x04 not a zip", pickle.dumps(Payload("executed")), b"\x89PRUNED\n and then nothing"],
    ids=["empty", "text", "zip", "pickle", "packed"],
)
def test_files_that_are_no_checkpoints_are_named(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").write_bytes(content)
    refused(tmp_path / "x.pth", r"x\.pth is not a checkpoint that can be loaded")
    assert os.listdir(tmp_path) == ["x.pth"], "reading a file ran its code"


def test_a_truncated_checkpoint_is_named(tmp_path):
    checkpoints.save(tmp_path / "x.pth", {"net": models.build("resnet20", 10).state_dict()})
    content = (tmp_path / "x.pth").read_bytes()
    for size in (10, 1000, len(content) // 2, len(content) - 1):
        (tmp_path / "x.pth").write_bytes(content[:size])
        refused(tmp_path / "x.pth", r"x\.pth is not a checkpoint that can be loaded( safely)?: (cut short or )?damaged")


def test_a_path_that_is_no_file_is_named(tmp_path):
    refused(tmp_path / "x.pth", r"x\.pth does not exist$")
    refused(tmp_path, "(is not a regular file|Is a directory)$")
    os.mkfifo(tmp_path / "pipe.pth")  # reading it would wait for ever
    (tmp_path / "zero.pth").symlink_to("/dev/zero")  # reading it would not end
    for name in "pipe.pth", "zero.pth":
        refused(tmp_path / name, "is not a regular file$")


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "x.pth").write_bytes(bytes(100))
    monkeypatch.setattr(checkpoints, "MAX_FILE", 99)
    refused(tmp_path / "x.pth", "is larger than 99 bytes$")


def small(tmp_path: Path) -> Path:
    """A checkpoint with all kinds of entries."""
    net = models.build("resnet20", 10).state_dict()
    content = {"net": net, "acc": 50.0, "zeros": 0, "settings": SETTINGS, "history": [{"epoch": 1, "lr": 0.1}]}
    checkpoints.save(tmp_path / "x.pth", content)
    return tmp_path / "x.pth"


@pytest.mark.parametrize("part", ["anywhere", "outside the tensors"])
def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path, part):
    """PyTorch itself does not look at the checksums in its files."""
    path = small(tmp_path)
    content = path.read_bytes()
    expected = checkpoints.load_checkpoint(path)
    moments = random.Random(0)
    size = 8 * len(content)
    # The directory of the archive is at its end, and its first entry, with everything but tensors, at its beginning.
    ends = [*range(8 * 20_000), *range(size - 8 * 8_000, size)]
    noticed = 0
    for _ in range(100):
        bit = moments.randrange(size) if part == "anywhere" else moments.choice(ends)
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = checkpoints.load_checkpoint(path)
        except utils.Failure as failure:
            assert failure.code == 2 and str(path) in str(failure)
            noticed += 1
            continue
        assert checkpoints.digest(found.pop("net")) == checkpoints.digest(expected["net"]), bit
        assert found == {name: value for name, value in expected.items() if name != "net"}, bit
    assert noticed > (90 if part == "anywhere" else 30)


def test_a_damaged_directory_of_an_archive_loses_no_content(tmp_path):
    """PyTorch's reader takes an entry that is marked as a folder for an empty one, and leaves the tensor unset."""
    path = small(tmp_path)
    expected, content = checkpoints.digest(checkpoints.load_checkpoint(path)["net"]), path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start, entries = archive.start_dir, len(archive.namelist())
    damaged, place = bytearray(content), start
    for _ in range(entries):
        damaged[place + 38] ^= 0x10  # of the external attributes, which no checksum covers
        lengths = (int.from_bytes(content[place + field : place + field + 2], "little") for field in (28, 30, 32))
        place += 46 + sum(lengths)
    path.write_bytes(damaged)
    assert checkpoints.digest(checkpoints.load_checkpoint(path)["net"]) == expected


def test_entries_that_overlap_are_refused(tmp_path):
    """Each names the bytes of the next one, too: a small file that would be large in memory."""
    content, directory = b"", b""
    for number in range(30):
        inner, name = content, f"archive/data/{number}".encode()
        crc, size = zlib.crc32(inner), len(inner)
        fields = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, crc, size, size, len(name), 0)
        content = b"PK\x03\x04" + fields + name + inner
    start = 0
    for number in reversed(range(30)):
        name = f"archive/data/{number}".encode()
        size = len(content) - start - 30 - len(name)
        crc = zlib.crc32(content[start + 30 + len(name) :])
        fields = struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 33, crc, size, size, len(name), 0, 0, 0, 0, 0, start)
        directory += b"PK\x01\x02" + fields + name
        start += 30 + len(name)
    end = struct.pack("<HHHHIIH", 0, 0, 30, 30, len(directory), len(content), 0)
    (tmp_path / "x.pth").write_bytes(content + directory + b"PK\x05\x06" + end)
    refused(tmp_path / "x.pth", "damaged: (its entries overlap|Overlapped entries)")


class Doubling:
    """A value that PyTorch's reader would compute: each level is twice as long as the one in it."""

    def __init__(self, inner: object):
        self.inner = inner

    def __reduce__(self):
        return codecs.encode, (self.inner, "hex")


def test_values_that_double_in_size_are_refused(tmp_path):
    value = Doubling(b"x")
    torch.save({"net": value}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", r"it asks for _codecs\.encode for more than a number")


def test_compressed_entries_are_refused(tmp_path):
    """A thousand times smaller than what they would be in memory."""
    path = small(tmp_path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    refused(path, "its entries are compressed")


def test_two_writers_of_one_path_do_not_meet(tmp_path, monkeypatch):
    """The second writes while the first is in the middle: both files are whole, and the last rename wins."""
    path, fsync, inner = tmp_path / "x", os.fsync, []

    def write_another(file: int) -> None:
        if not inner:
            inner.append(1)
            checkpoints.write(path, b"second")
            assert path.read_bytes() == b"second"
        fsync(file)

    monkeypatch.setattr(os, "fsync", write_another)
    checkpoints.write(path, b"first")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["x"]
