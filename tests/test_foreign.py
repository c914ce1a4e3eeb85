"""Files that other people's scripts write: each form is taken, or refused with what it is and what to do about it."""

import argparse
import gzip
import io
import json
import pickle
import shlex
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from conftest import SMALL, call, load_script, succeed
from torch import Tensor, nn
from torch.nn.utils import prune

import checkpoints
import data
import engine
import models
import pruning
import utils
from formats import foreign, refusals


def trained(arch: str = "resnet20") -> nn.Module:
    """A network whose statistics are not those of a new one."""
    torch.manual_seed(3)
    network = models.build(arch, 10)
    with torch.no_grad():
        network(torch.randn(4, 3, 16, 16))
    return network


def saved(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def repickled(content: bytes, old: bytes, new: bytes) -> bytes:
    """A file of torch.save with other bytes in its pickle, as another version or machine writes them."""
    if not content.startswith(b"PK"):
        return content.replace(old, new)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(buffer, "w") as copy:
        for name in archive.namelist():
            found = archive.read(name)
            assert not name.endswith("data.pkl") or old in found
            copy.writestr(name, found.replace(old, new) if name.endswith("data.pkl") else found)
    return buffer.getvalue()


def prefixed(prefix: str) -> Callable[[dict], bytes]:
    return lambda net: saved({"state_dict": {prefix + name: value for name, value in net.items()}})


def cast(dtype: torch.dtype) -> Callable[[dict], bytes]:
    return lambda net: saved({"net": {name: value.to(dtype) for name, value in net.items()}})


def beside(**more: object) -> Callable[[dict], bytes]:
    return lambda net: saved({"state_dict": net, **more})


def bare(net: dict) -> bytes:
    state = OrderedDict(net)
    state._metadata = OrderedDict({"": {"version": 1}})  # as nn.Module.state_dict returns it
    return saved(state)


def on_cuda(legacy: bool) -> Callable[[dict], bytes]:
    def make(net: dict) -> bytes:
        content = saved({"net": net}, _use_new_zipfile_serialization=not legacy)
        return repickled(content, b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")

    return make


def numpy_1(net: dict) -> bytes:
    content = saved({"net": net, "acc": np.float64(91.5)})
    return repickled(content, b"numpy._core.multiarray", b"numpy.core.multiarray")


def after_training(net: dict) -> bytes:
    """Optimizer and scheduler with their states, as resuming needs them."""
    network = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "rng": torch.get_rng_state()}
    return saved({"epoch": 7, "arch": "resnet20", "state_dict": net, "args": {"lr": 0.1}, **states})


# How a file is made from the state_dict of a resnet20, and what is said to be taken.
FORMS: dict[str, tuple[Callable[[dict], bytes], str]] = {
    **{name: (lambda net, name=name: saved({name: net}), f"{name} of resnet20") for name in foreign.CONTAINERS},
    "nested": (lambda net: saved({"model": {"state_dict": net}, "epoch": 3}), "state_dict in model of resnet20"),
    "nested wrapper": (lambda net: saved({"state_dict": {"model": net}}), "model in state_dict of resnet20"),
    "bare": (bare, "bare state_dict of resnet20"),
    "a loss beside the network": (
        lambda net: saved({f"model.{name}": net[name] for name in net} | {"criterion.weight": torch.ones(2)}),
        "bare state_dict of resnet20, without criterion.weight",
    ),
    "a normalization before it": (
        lambda net: saved(
            {f"1.{name}": net[name] for name in net} | {"0.mean": torch.ones(3), "0.std": torch.ones(3)}
        ),
        "bare state_dict of resnet20, without 0.mean, 0.std",
    ),
    "masks in an entry of their own": (
        lambda net: saved({"net": net, "mask": {"conv1.weight": torch.ones(16, 3, 3, 3)}}),
        "net of resnet20, not mask",
    ),
    "numbers among the tensors": (lambda net: saved({"net": net | {"epoch": 3, "none": None}}), "net of resnet20"),
    "bare, with more": (lambda net: saved(net | {"epoch": 3, "acc": 90.0}), "bare state_dict of resnet20, 90.00 %"),
    "a name of its own": (lambda net: saved({"student": net, "ema": net, "epoch": 3}), "student of resnet20"),
    "several": (lambda net: saved({"model": {}, "state_dict": net, "network": net}), "state_dict of resnet20, not net"),
    "a network's name": (lambda net: saved({"model": "resnet20", "state_dict": net}), "state_dict of resnet20"),
    "safetensors": (safetensors.torch.save, "safetensors of resnet20"),
    "safetensors, half": (
        lambda net: safetensors.torch.save({f"module.{n}": v.bfloat16() for n, v in net.items()}, {"format": "pt"}),
        "safetensors of resnet20",
    ),
    **{
        prefix: (prefixed(prefix), "state_dict of resnet20")
        for prefix in ("module.", "_orig_mod.", "model.", "net.", "module.backbone.", "model.module._orig_mod.")
    },
    "a compiled stage": (
        lambda net: saved({n.replace("layer1.", "layer1._orig_mod."): v for n, v in net.items()}),
        "bare state_dict of resnet20",
    ),
    "fc": (
        lambda net: saved({name.replace("linear.", "module.fc."): value for name, value in net.items()}),
        "bare state_dict of resnet20",
    ),
    **{str(dtype): (cast(dtype), "net of resnet20") for dtype in (torch.float64, torch.bfloat16, torch.float16)},
    "parameters": (
        lambda net: saved({"net": {n: nn.Parameter(v, False) for n, v in net.items() if "num_" not in n}}),
        "net of resnet20",
    ),
    "legacy": (lambda net: saved({"net": net, "acc": 9}, _use_new_zipfile_serialization=False), "net of resnet20, 9."),
    "cuda": (on_cuda(legacy=False), "net of resnet20"),
    "cuda, legacy": (on_cuda(legacy=True), "net of resnet20"),
    "NumPy 1": (numpy_1, "net of resnet20, 91.50 % by its file"),
    "after training": (after_training, "state_dict of resnet20"),
    "profiled": (
        lambda net: saved({"net": net | {f"{part}.total_ops": torch.zeros(1).double() for part in ("conv1", "bn1")}}),
        "net of resnet20",
    ),
    **{
        f"accuracy {value!r:.30}": (beside(best_acc1=value, epoch=5), f"state_dict of resnet20, {said}")
        for value, said in (
            (91.73, "91.73 % by its file"),
            (0.9173, "91.73 % by its file"),
            (torch.tensor(91.73), "91.73 % by its file"),
            (torch.tensor([91.73]), "91.73 % by its file"),
            (np.float64(91.73), "91.73 % by its file"),
            (np.float32(0.9173), "91.73 % by its file"),
            (np.int64(91), "91.00 % by its file"),
        )
    },
    # Keys that share our names, in other forms than ours, and what is no accuracy.
    **{
        f"{name} is {value!r:.20}": (beside(**{name: value}), "state_dict of resnet20")
        for name, value in (
            ("acc", None), ("acc", "91 %"), ("acc", [91.0, 92.0]), ("acc", -1.0), ("acc", 9173.0), ("acc", True),
            ("acc", float("nan")), ("acc", torch.zeros(2)), ("acc", {"top1": 91.0}), ("acc", 0), ("loss", [1.0, 0.5]),
            ("loss", None), ("epoch", "last"), ("zeros", "none"), ("settings", [1]), ("settings", {"lr": 0.1}),
            ("settings", {"arch": "resnet20", "dataset": "cifar10", "image_size": "32"}), ("classes", 10),
            ("classes", ["cat", "dog"]), ("history", {"acc": [1]}), ("history", 3), ("mean", "0.5"), ("std", [0.2] * 3),
            ("mean", torch.zeros(3)), ("dtype", "float32"), ("format", "v1"), ("format", None), ("parent", 7),
            ("test_images", 10_000), ("dense_acc", [1]), ("exclude", []), ("taken", 3), ("arch", ["resnet"]),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("few")
def test_every_form_of_a_checkpoint_is_taken(tmp_path, form):
    make, said = FORMS[form]
    network = trained()
    net = network.state_dict()
    (tmp_path / "x.bin").write_bytes(make(net))
    checkpoint = checkpoints.load_checkpoint(tmp_path / "x.bin")
    taken = checkpoints.taken(checkpoint)
    assert taken.startswith(said) if "," in said else taken == said
    assert checkpoint.keys() <= {"net", "arch", "taken", "acc", "epoch"}
    found = checkpoints.build_network(checkpoint).state_dict()
    half = {"torch.bfloat16": torch.bfloat16, "safetensors, half": torch.bfloat16, "torch.float16": torch.float16}
    for name, value in net.items():
        if "num_batches" not in name:
            expected = value.to(half[form]).float() if form in half else value
            assert found[name].dtype == torch.float32 and torch.equal(found[name], expected), name


def test_counters_that_half_precision_cannot_hold_do_no_harm(tmp_path):
    net = trained().state_dict()
    net["bn1.num_batches_tracked"] += 100_000
    (tmp_path / "x.pth").write_bytes(cast(torch.float16)(net))
    assert checkpoints.load_checkpoint(tmp_path / "x.pth")["net"]["bn1.num_batches_tracked"] == 0


# --- Masks ---------------------------------------------------------------------------------------------------------


def masked(network: nn.Module, how: str) -> dict[str, Tensor]:
    """The state_dict of a network that torch.nn.utils.prune holds at half its weights, in three ways to save it."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            prune.l1_unstructured(module, "weight", amount=0.5)
    net = network.state_dict()
    if how == "orig and mask":
        prune.random_unstructured(network.linear, "bias", amount=3)
        return network.state_dict()
    net = {name.removesuffix("_orig"): value for name, value in net.items()}
    return {name: value.bool() if how == "bool" and "mask" in name else value for name, value in net.items()}


@pytest.mark.parametrize("how", ["orig and mask", "mask alone", "bool"])
def test_masks_are_applied(tmp_path, how):
    network = trained()
    plain = {name: value.clone() for name, value in network.state_dict().items()}
    net = masked(network, how)
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.items()}}, tmp_path / "x.pth")
    checkpoint = checkpoints.load_checkpoint(tmp_path / "x.pth")
    layers = 21 if how == "orig and mask" else 20
    assert checkpoint["taken"] == f"state_dict of resnet20, masks of {layers} layers applied".replace(
        "21 layers", "21 layers"
    )
    for name, value in checkpoint["net"].items():
        mask = net.get(f"{name}_mask", torch.ones(()))
        assert torch.equal(value, plain[name] * mask) and not value.float().signbit().logical_and(value == 0).any()
    zeros = pruning.count_zeros(checkpoints.build_network(checkpoint))
    assert all(2 * found == weights for found, weights in zeros.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv1.weight_mask": torch.ones(16)}, "conv1.weight_mask, and no conv1.weight of the same shape"),
        ({"conv1.weight_mask": torch.full((16, 3, 3, 3), 0.5)}, "conv1.weight_mask with values other than 0 and 1"),
        (
            {"conv1.weight_mask": torch.full((16, 3, 3, 3), torch.nan)},
            "conv1.weight_mask with values other than 0 and 1",
        ),
        ({"conv1.weight_mask": torch.ones(1).expand(16, 3, 3, 3)}, "conv1.weight_mask .* claims more values"),
        ({"conv2.weight_mask": torch.ones(1)}, "conv2.weight_mask, and no conv2.weight"),
        ({"conv1.weight_orig": torch.ones(16, 3, 3, 3)}, "conv1.weight_orig (beside conv1.weight|without conv1)"),
        (
            {"conv1.weight_orig": torch.ones(16, 3, 3, 3), "conv1.weight_mask": torch.ones(16, 3, 3, 3)},
            "conv1.weight_orig beside conv1.weight",
        ),
    ],
)
def test_masks_that_fit_no_weight_are_refused(tmp_path, change, message):
    torch.save({"net": trained().state_dict() | change}, tmp_path / "x.pth")
    with pytest.raises(utils.Failure, match=message):
        checkpoints.load_checkpoint(tmp_path / "x.pth")


# --- What is refused -----------------------------------------------------------------------------------------------


def archive(kind: str, **entries: bytes) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            for name, content in entries.items():
                file.writestr(name.replace("__", "/"), content)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as file:
            for name, content in entries.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # that it is deprecated
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.zeros(3))
    return buffer.getvalue()


def small(**more: object) -> dict:
    return {"state_dict": {"conv1.weight": torch.zeros(3)}, **more}


def onnx_model() -> bytes:
    return onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])).SerializeToString()


SAFELY = "just for tensors and plain values: save its weights alone by "
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is empty$"),
    "Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS pointer.*git lfs"),
    "HTML": (lambda: b"\n<!DOCTYPE html>\n<html><head>", "it is an HTML or XML page, not the file that it leads"),
    "XML": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "it is an HTML or XML page"),
    "text": (lambda: b"Not Found\n", "it is a text that begins with 'Not Found'$"),
    "JSON": (lambda: json.dumps({"message": "Not Found"}).encode(), "it is a text that begins with '{\"message"),
    "TorchScript": (torchscript, r"it is a TorchScript archive, .*torch\.jit\.load\(.*\" .*x\.pth$"),
    "a network": (lambda: saved(nn.Linear(2, 2)), r"whole network, pickled as torch.nn.modules.linear.Linear, .*False"),
    "our network": (lambda: saved(trained()), r"a whole network, pickled as models.resnet.ResNet, .*only if you trust"),
    "a network in a dictionary": (
        lambda: saved({"net": trained(), "acc": 90.0}),
        r"network, pickled as models.resnet.ResNet.*\(torch.load\(.*False\)\['net'\].state_dict\(\), .*weights.pth'\)",
    ),
    "a network, legacy": (
        lambda: saved(nn.DataParallel(trained()), _use_new_zipfile_serialization=False),
        "a whole network, pickled as models.resnet.ResNet",
    ),
    "a namespace": (
        lambda: saved(small(args=argparse.Namespace(lr=0.1))),
        rf"it asks for argparse.Namespace, not {SAFELY}.*torch.load\(.*\)\['state_dict'\], .*weights.pth'\)\" .*, only",
    ),
    "a namespace, legacy": (
        lambda: saved(small(args=argparse.Namespace(lr=0.1)), _use_new_zipfile_serialization=False),
        "it asks for argparse.Namespace",
    ),
    "a NumPy array": (lambda: saved(small(losses=np.zeros(3))), r"for numpy\._?core\.multiarray\._reconstruct"),
    "a NumPy text": (lambda: saved(small(name=np.str_("x"))), "it asks for values of NumPy of type 'U1'"),
    "a path": (lambda: saved(small(file=Path("x"))), r"it asks for pathlib\.\w+, not"),
    "protocol 4": (lambda: saved(small(), pickle_protocol=4), "is pickled by protocol 4: load and save it again"),
    "a pickle": (lambda: pickle.dumps({"a.b": [1.0]}), "a pickle that torch.save did not write: save its tensors with"),
    "a pickle of arrays": (
        lambda: pickle.dumps({"a.b": np.zeros(3)}),
        r"a pickle that torch.save did not write and that asks for numpy\._?core\.\w+\.\w+: save its tensors",
    ),
    "PyTorch 0.1": (lambda: archive("tar", sys_info=b"", pickle=b"", storages=b"", tensors=b""), "first versions of"),
    "tar": (lambda: archive("tar", README=b"x", weights=b"x"), "it is a tar archive of README, weights: unpack"),
    "zip": (lambda: archive("zip", a=b"x", b=b"x", c=b"x"), "it is a zip archive of a, b and 1 more: unpack it first"),
    "gzip": (lambda: gzip.compress(saved(small())), "it is a gzip archive: unpack it first"),
    "NumPy": (npz, "it is an archive of NumPy arrays"),
    "ONNX": (onnx_model, "it is an ONNX model: save the state_dict"),
    "Keras": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "it is an HDF5 file, as Keras writes it"),
    "Keras 3": (lambda: archive("zip", **{"config.json": b"", "model.weights.h5": b""}), "it is a Keras model"),
    "torch.export": (lambda: archive("zip", x__models__model__json=b"").replace(b"l/json", b"l.json"), "torch.export"),
    "TensorFlow": (lambda: b"\x08\x01\x12\xd5\x03\n", "it is a file of TensorFlow"),
    "TensorFlow, an index": (lambda: bytes(40) + refusals.TABLE_END, "it is a file of TensorFlow"),
    "TensorFlow Lite": (lambda: b"\x1c\0\0\0TFL3" + bytes(20), "it is a file of TensorFlow"),
    "Flax": (lambda: b"\x82\xa6params\x81\xa5Dense\xc0", "it is a MessagePack file, as Flax"),
    "an image": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(20), "it is an image$"),
    "noise": (lambda: np.random.default_rng(0).bytes(3000), "damaged or not one$"),
    "a cut safetensors file": (lambda: safetensors.torch.save({"a.b": torch.zeros(9)})[:-3], "damaged or not one$"),
    "no dictionary": (lambda: saved([1]), "holds a list, not a dictionary with the weights of a network$"),
    "the averaged weights alone": (lambda: saved({"ema": small()["state_dict"]}), "it has 'ema': to take 'ema', sa"),
    "two unknown names": (
        lambda: saved({"a": small()["state_dict"], "b": small()["state_dict"]}),
        "it has 'a', 'b': to take 'a', save it alone$",
    ),
    "another network": (lambda: saved(small()), r"is like none of them; it begins with conv1.weight \(3,\)$"),
    "a variance below zero": (
        lambda: saved({"net": trained().state_dict() | {"bn1.running_var": torch.full((16,), -1.0)}}),
        "has variances below zero in bn1.running_var$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.usefixtures("few")
def test_what_is_refused_is_named_with_what_to_do(tmp_path, kind):
    make, message = REFUSED[kind]
    (tmp_path / "x.pth").write_bytes(make())
    with pytest.raises(utils.Failure, match=message) as failure:
        checkpoints.load_checkpoint(tmp_path / "x.pth")
    assert failure.value.code == 2 and "\n" not in str(failure.value)
    assert str(failure.value).startswith(str(tmp_path / "x.pth"))


@pytest.mark.parametrize("kind", ["namespace", "network", "TorchScript"])
def test_the_command_that_a_refusal_names_saves_what_is_taken(tmp_path, monkeypatch, kind):
    network = trained()
    path = tmp_path / "it's x.pth"
    with warnings.catch_warnings(action="ignore"):  # that TorchScript is deprecated
        if kind == "TorchScript":
            torch.jit.save(torch.jit.trace(network.eval(), torch.zeros(1, 3, 16, 16)), path)
        else:
            options = {"state_dict": network.state_dict(), "args": argparse.Namespace(lr=0.1)}
            torch.save(options if kind == "namespace" else {"net": network}, path)
        with pytest.raises(utils.Failure, match=r" by python -c ") as failure:
            checkpoints.load_checkpoint(path)
        monkeypatch.chdir(tmp_path)
        code, argument = shlex.split(str(failure.value).partition(" -c ")[2].partition(", only")[0])
        monkeypatch.setattr(sys, "argv", ["-c", argument])
        exec(code, {})
    again = checkpoints.load_checkpoint(tmp_path / f"{path.name}.weights.pth")
    assert checkpoints.taken(again) == "bare state_dict of resnet20"


@pytest.mark.usefixtures("few")
def test_the_first_difference_is_that_after_renaming(tmp_path):
    net = {f"module.{name.replace('linear', 'fc')}": value for name, value in trained().state_dict().items()}
    net["module.conv1.weight"] = torch.zeros(16, 1, 3, 3)
    torch.save({"state_dict": net}, tmp_path / "x.pth")
    message = r"closest is resnet20, but conv1.weight has shape \(16, 1, 3, 3\), not \(16, 3, 3, 3\)$"
    with pytest.raises(utils.Failure, match=message):
        checkpoints.load_checkpoint(tmp_path / "x.pth")


# --- Numbers of NumPy ----------------------------------------------------------------------------------------------


class Call:
    """Makes a pickle call a function."""

    def __init__(self, *call: object):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_only_numbers_are_rebuilt(tmp_path):
    """Nothing of NumPy is called with what a file says, and no call makes more than a few bytes."""
    import _codecs

    long, doubled = Call(_codecs.encode, "x" * 10**6, "latin1"), Call(_codecs.encode, "x", "hex")
    scalar = np.float64(1).__reduce__()[0]
    for value, message in (
        (long, "_codecs.encode for more than a number"),
        (doubled, "_codecs.encode for more than a number"),
        (Call(np.dtype, "V1000000000"), "values of NumPy of type 'V1000000000'"),
        (Call(scalar, np.dtype("f8"), b"x" * 9), "a value of NumPy that is no number, not just"),
        (Call(scalar, "f8", b"x" * 8), "a value of NumPy that is no number, not just"),
    ):
        torch.save({"net": value}, tmp_path / "x.pth")
        with pytest.raises(utils.Failure, match=message):
            checkpoints.load(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "i8", "u1", "u8", "b1", ">f4", ">i8"])
def test_numbers_of_numpy_become_plain_numbers(tmp_path, kind):
    value = np.array([1.0], kind)[0]
    torch.save({"a": value, "b": {"c": [value]}}, tmp_path / "x.pth")
    found = checkpoints.load(tmp_path / "x.pth")
    assert found == {"a": 1, "b": {"c": [1]}} and type(found["a"]) is type(value.item())


def test_texts_of_python_2_are_the_bytes_of_a_number():
    assert foreign.scalar(foreign.ScalarType("f8"), "\x00\x00\x00\x00\x00\xe0V@") == 91.5


# --- The commands --------------------------------------------------------------------------------------------------

PRUNING = ("-pr", "0.5", "-shot", "single", "--retrain-epochs", "1", "--retrain", "plain")
DIGITS = ("--dataset", "digits", "--image-size", "16", "--device", "cpu")
OWN = ("--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> dict[str, Tensor]:
    """The weights of a network whose answers depend on the constants: BatchNorm has seen images with its own."""
    network = trained()
    digits = data.load("digits", tmp_path_factory.mktemp("nothing"), 16).test
    batches = data.TestBatches(
        data.Split(digits.images[:100], digits.labels[:100]), [0.5] * 3, [0.25] * 3, torch.device("cpu")
    )
    with torch.no_grad():
        for _ in range(30):
            network(next(iter(batches))[0])
    return network.state_dict()


def test_training_normalizes_by_constants_of_the_command_line(tmp_path, images):
    small = ("--dataset", images, *SMALL, "--epochs", "1", "--checkpoint-dir", tmp_path)
    succeed("main.py", *small, *OWN)
    checkpoint = checkpoints.load_checkpoint(tmp_path / "ckpt.pth")
    assert (checkpoint["mean"], checkpoint["std"]) == ([0.5] * 3, [0.25] * 3)
    assert checkpoint["settings"]["mean"] == "0.5 0.5 0.5" and checkpoint["settings"]["std"] == "0.25 0.25 0.25"
    done = call("main.py", *small)
    assert done.returncode == 2 and "mean 0.5 0.5 0.5 there, None asked" in done.stderr
    args = argparse.Namespace(mean=[0.5] * 3, std=[0.25] * 3)
    own = data.with_constants(data.load(str(images), tmp_path, 16), args)
    inputs, _ = next(data.TrainBatches(own, 16, 0, torch.device("cpu")).epoch("x", 1))
    assert inputs.min() >= -2 and inputs.max() <= 2  # (black - 0.5) / 0.25 and white


def test_a_network_with_constants_of_its_own_is_pruned_and_measured_by_them(tmp_path, dense):
    net = {f"module.{name}": value for name, value in dense.items()}
    torch.save({"state_dict": net, "best_acc": 20.0}, tmp_path / "ckpt.pth")
    arguments = (*DIGITS, "--arch", "resnet20", "--checkpoint-dir", tmp_path, *PRUNING)
    lines = succeed("main.py", *arguments, *OWN)
    pruned = checkpoints.load_checkpoint(tmp_path / "50percent_single_plain_ckpt.pth")
    assert (pruned["mean"], pruned["std"]) == ([0.5] * 3, [0.25] * 3)
    accuracy = f"{pruned['dense_acc']:.2f} "
    assert f"ckpt.pth (state_dict of resnet20, 20.00 % by its file): test accuracy {accuracy}" in lines
    assert "\nnote: its file says 20.00 %, and " in lines
    # Without the flags it would be another experiment.
    done = call("main.py", *arguments)
    assert done.returncode == 2 and "mean 0.5 0.5 0.5 there, None asked" in done.stderr
    # The constants are known from the network that was pruned from it.
    report = succeed("test.py", "--checkpoint-dir", tmp_path, *DIGITS[2:])
    assert "state_dict of resnet20, normalized as 50percent_single_plain_ckpt.pth, 20.00 % by its file\n" in report
    assert accuracy in report
    assert accuracy not in succeed("test.py", tmp_path / "ckpt.pth", *DIGITS)
    flags = succeed("test.py", "--checkpoint-dir", tmp_path, *DIGITS, *OWN)
    assert "--mean and --std are for files without constants of their own, which 1 of 2 have\n" in flags
    assert accuracy in flags


def test_a_network_is_never_pruned_with_other_constants_than_its_own(tmp_path, dense):
    torch.save({"net": dense, "mean": [0.5] * 3, "std": [0.25] * 3}, tmp_path / "ckpt.pth")
    for flags in ((), ("--mean", "0.1", "0.1", "0.1", "--std", "0.25", "0.25", "0.25")):
        done = call("main.py", *DIGITS, "--arch", "resnet20", "--checkpoint-dir", tmp_path, *PRUNING, *flags)
        assert done.returncode == 2 and done.stderr.endswith(
            "normalized by other constants: --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25 are its own\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pth"]


def test_a_dense_network_of_another_name_is_refused_with_the_flag_that_it_needs(tmp_path, dense):
    torch.save({"net": dense}, tmp_path / "ckpt.pth")
    done = call("main.py", *DIGITS, "--arch", "resnet18", "--checkpoint-dir", tmp_path, *PRUNING)
    assert done.returncode == 2 and done.stderr.endswith("choose another --checkpoint-dir, or --arch resnet20\n")


@pytest.mark.parametrize("script", ["main.py", "test.py", "deploy.py"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mean", "0.5", "0.5", "0.5"), "--mean and --std go together"),
        (("--std", "0.5", "0.5", "0.5"), "--mean and --std go together"),
        (("--std", "0.5", "0", "0.5", "--mean", "0", "0", "0"), "argument --std: '0' is not a fraction above 0"),
        (("--mean", "125", "0", "0", "--std", "1", "1", "1"), "argument --mean: '125' is not a fraction from 0 to 1"),
    ],
)
def test_constants_come_in_pairs_of_fractions(script, flags, message):
    done = call(script, *(["x.pth"] if script == "deploy.py" else []), *flags)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_an_exported_network_is_a_checkpoint(tmp_path, dense):
    deploy = load_script("deploy.py")
    images = data.load("digits", tmp_path, 16)
    batches = data.TestBatches(images.test, [0.5] * 3, [0.25] * 3, torch.device("cpu"))
    strided = {n: v.to(memory_format=torch.channels_last) if v.dim() == 4 else v for n, v in dense.items()}
    torch.save({"net": strided, "acc": 91.25}, tmp_path / "x.pth")
    checkpoint = checkpoints.load_checkpoint(tmp_path / "x.pth")
    target = deploy.write_safetensors(tmp_path / "x.pth", checkpoint, images, batches)
    with safetensors.safe_open(target, "pt") as file:
        assert set(file.keys()) == set(dense)
        metadata = file.metadata()
    assert json.loads(metadata.pop("classes")) == images.classes
    constants = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]"}
    assert metadata == {"format": "pt", "arch": "resnet20", "accuracy": "91.25", **constants}
    again = checkpoints.load_checkpoint(target)
    assert checkpoints.digest(again["net"]) == checkpoints.digest(checkpoint["net"])
    assert checkpoints.taken(again) == "safetensors of resnet20, 91.25 % by its file"
    assert (again["mean"], again["std"], again["classes"]) == ([0.5] * 3, [0.25] * 3, images.classes)
    deploy.write_safetensors(tmp_path / "x.pth", checkpoint, images, batches)  # over its own file
    target.write_bytes(safetensors.torch.save(dense))
    with pytest.raises(utils.Failure, match=r"x\.safetensors exists, and deploy.py did not write it: move it away"):
        deploy.write_safetensors(tmp_path / "x.pth", checkpoint, images, batches)


def test_a_safetensors_file_is_not_exported_again():
    done = call("deploy.py", "x.safetensors", "--safetensors")
    assert done.returncode == 2 and "argument --safetensors: x.safetensors is such a file already" in done.stderr


def test_a_claim_is_judged_by_the_margin_of_the_images():
    score = engine.Score(correct=90, images=100, loss=0.3, close=0)
    assert not engine.doubt(None, score) and not engine.doubt(90.0, score) and not engine.doubt(85.0, score)
    assert "says 97.00 %, and 90.00 % were measured, more than the margin of 5.9" in engine.doubt(97.0, score)
