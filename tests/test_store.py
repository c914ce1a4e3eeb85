"""Checkpoints: both directions with pytorch-cifar, whole or not at all, and nothing runs when they are read."""

import os
import pickle

import pytest
import torch
from reference_resnet18 import ResNet18

import models
import store
import utils


def scrambled(network: torch.nn.Module) -> torch.nn.Module:
    """The network with statistics that are not those of a new one."""
    torch.manual_seed(3)
    network.train()
    with torch.no_grad():
        network(torch.randn(8, 3, 32, 32))
    return network.eval()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_pytorch_cifar_checkpoint_loads(tmp_path, prefix):
    theirs = scrambled(ResNet18())
    net = {prefix + name: value for name, value in theirs.state_dict().items()}
    torch.save({"net": net, "acc": 95.48, "epoch": 199}, tmp_path / "ckpt.pth")
    checkpoint = store.load_checkpoint(tmp_path / "ckpt.pth")
    assert (checkpoint["arch"], checkpoint["acc"], checkpoint["epoch"]) == ("resnet18", 95.48, 199)
    ours = store.network_of(checkpoint).eval()
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))


def test_ours_loads_in_pytorch_cifar(tmp_path):
    ours = scrambled(models.build("resnet18", 10)).to(memory_format=torch.channels_last)
    store.save(tmp_path / "ckpt.pth", {"net": store.plain_state(ours), "acc": 95.48, "epoch": 199})
    checkpoint = torch.load(tmp_path / "ckpt.pth", weights_only=True)
    theirs = ResNet18().eval()
    theirs.load_state_dict(checkpoint["net"], strict=True)
    assert all(value.is_contiguous() for value in checkpoint["net"].values())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("size", [16, 33])
def test_every_network_takes_images_from_16_pixels_up_and_is_recognised(arch, size):
    network = models.build(arch, 7).eval()
    assert network(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert models.identify(network.state_dict()) == arch


def test_other_float_types_and_parameters_are_read(tmp_path):
    network = models.build("resnet20", 10)
    store.save(tmp_path / "x.pth", {"net": {name: value.bfloat16() for name, value in network.state_dict().items()}})
    torch.save({"net": network.state_dict(keep_vars=True)}, tmp_path / "y.pth")
    for name in "x.pth", "y.pth":
        net = store.load_checkpoint(tmp_path / name)["net"]
        assert store.digest(net)
        assert net["conv1.weight"].dtype == torch.float32
        assert net["bn1.num_batches_tracked"].dtype == torch.int64


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.pth")
    with pytest.raises(utils.Failure, match="not a file"):
        store.load_checkpoint(tmp_path / "x.pth")


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name in ("a.pth", "b.pth"):
        store.save(tmp_path / name, {"net": {"weight": torch.arange(9.0)}, "acc": 1.5})
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    store.write(tmp_path / "a", b"old")

    def full(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(utils.Failure, match="a cannot be written: No space left on device"):
        store.write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def changed(**changes):
    def change(net: dict) -> dict:
        net = dict(net)
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del net[name]
            else:
                net[name] = value
        return {"net": net}

    return change


SETTINGS = {"arch": "resnet20", "dataset": "digits", "image_size": 16}


def ours(**settings):
    return lambda net: {"net": net, "acc": 1.0, "zeros": 0, "settings": SETTINGS | settings}


BAD_FILES = {
    "payload": (
        lambda net: {"net": net, "acc": Payload("executed")},
        "asks for .*mkdir, not just for tensors and plain values",
    ),
    "no net": (lambda net: {"state": net}, "no 'net'"),
    "a list": (lambda net: [net], "no 'net'"),
    "not tensors": (lambda _net: {"net": {"conv1.weight": 3}}, "not tensors"),
    "missing key": (changed(bn1__weight=None), "closest is resnet20, but bn1.weight is missing"),
    "extra key": (changed(extra=torch.zeros(3)), "closest is resnet20, but extra is unknown"),
    "wrong shape": (changed(bn1__weight=torch.zeros(3)), r"bn1.weight has shape \(3,\), not \(16,\)"),
    "nan": (changed(bn1__weight=torch.full((16,), torch.nan)), "bn1.weight that are not finite"),
    "whole numbers": (changed(bn1__weight=torch.zeros(16, dtype=torch.int32)), "bn1.weight in a form"),
    "sparse": (changed(linear__weight=torch.zeros(10, 64).to_sparse()), "linear.weight in a form"),
    "meta": (changed(linear__weight=torch.zeros(10, 64, device="meta")), "linear.weight in a form"),
    "huge": (changed(linear__weight=torch.zeros(1, 1).expand(10**10, 64)), "linear.bias has shape"),
    "no classes": (changed(linear__weight=torch.zeros(0, 64)), "for 0 classes"),
    "overflow": (changed(bn1__weight=torch.full((16,), 1e300, dtype=torch.float64)), "bn1.weight that are not finite"),
    "accuracy is text": (lambda net: {"net": net, "acc": "high"}, "acc is not a finite number"),
    "accuracy is huge": (lambda net: {"net": net, "acc": 10**400}, "acc is not a finite number"),
    "settings are a list": (
        lambda net: {"net": net, "acc": 1.0, "zeros": 0, "settings": [1]},
        "not what main.py writes",
    ),
    **{
        f"sparsity is {value!s:.9}": (ours(sparsity=value), "not what main.py writes")
        for value in ("0.5", None, float("nan"), 10**400, 1.5)
    },
    "no accuracy": (lambda net: {"net": net, "settings": SETTINGS, "zeros": 0}, "not what main.py writes"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_checkpoint_is_named_with_what_is_wrong(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make, message = BAD_FILES[kind]
    torch.save(make(models.build("resnet20", 10).state_dict()), "x.pth")
    with pytest.raises(utils.Failure, match=message) as failure:
        store.load_checkpoint(tmp_path / "x.pth")
    assert str(tmp_path / "x.pth") in str(failure.value)
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "executed").exists(), "reading a file ran its code"


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04 not a zip", pickle.dumps(Payload("executed"))])
def test_files_that_are_no_checkpoints_are_named(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(utils.Failure, match=r"x\.pth is not a checkpoint"):
        store.load_checkpoint(tmp_path / "x.pth")
    assert not (tmp_path / "executed").exists()


def test_a_truncated_checkpoint_is_named(tmp_path):
    store.save(tmp_path / "x.pth", {"net": models.build("resnet20", 10).state_dict()})
    content = (tmp_path / "x.pth").read_bytes()
    for size in (10, 1000, len(content) // 2, len(content) - 1):
        (tmp_path / "x.pth").write_bytes(content[:size])
        with pytest.raises(utils.Failure, match=r"x\.pth is not a checkpoint"):
            store.load_checkpoint(tmp_path / "x.pth")
