"""deploy.py: what it writes computes the same, what it prints is what it found."""

import argparse
import csv
import io
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import onnxruntime
import pytest
import torch
from conftest import SMALL, SMALL_PRUNING, succeed

import data
import deploy
import forms
import models
import packed
import pruning
import store
import utils


@pytest.fixture(scope="module")
def deployed(images, tmp_path_factory) -> tuple[Path, str]:
    """A dense and a pruned network, deployed; and what was printed."""
    directory = tmp_path_factory.mktemp("deploy")
    succeed(
        "main.py", "--dataset", images, "--checkpoint-dir", directory, "-pr", "0.9", "-shot", "single",
        *SMALL, *SMALL_PRUNING,
    )  # fmt: skip
    printed, errors = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(errors):
        # Compiling takes half a minute, and has a test of its own.
        patch.setattr(torch, "compile", lambda *_, **__: fail("no compiler\nis there"))
        arguments = [directory, "--dataset", images, "--values", "bf16", "--onnx", "--rounds", "2"]
        patch.setattr(sys, "argv", ["deploy.py", *map(str, arguments)])
        deploy.main()
    torch.set_num_threads(threads)
    assert "torch.compile is not measured, it does not work here: no compiler\n" in errors.getvalue()
    assert "compiled" not in printed.getvalue()
    return directory, printed.getvalue()


def fail(reason: str) -> None:
    raise RuntimeError(reason)


def table(path: Path) -> list[dict[str, str]]:
    """The rows of both tables in deploy.csv."""
    files, forms = path.read_text().split("\n\n")
    return [row for part in (files, forms) for row in csv.DictReader(part.splitlines())]


def test_files_hold_the_same_network(deployed):
    directory, _ = deployed
    for name in "ckpt.pth", "90percent_single_ckpt.pth":
        path = directory / name
        net = store.load_checkpoint(path)["net"]
        assert store.digest(store.load_checkpoint(packed.name(path))["net"]) == store.digest(net)
        rounded = store.load_checkpoint(packed.name(path, "bf16"))["net"]
        assert all(torch.equal(value == 0, net[key] == 0) for key, value in rounded.items())
        session = onnxruntime.InferenceSession(path.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
        network = store.network_of(store.load_checkpoint(path)).eval()
        for count in (1, 5):
            pixels = torch.randn(count, 3, 16, 16)
            logits = torch.from_numpy(session.run(None, {"images": pixels.numpy()})[0])
            torch.testing.assert_close(logits, network(pixels).detach(), rtol=1e-4, atol=1e-4)


def test_tables(deployed):
    directory, printed = deployed
    rows = table(directory / "deploy.csv")
    sizes = {(Path(row["checkpoint"]).name, row["file"]): int(row["bytes"]) for row in rows if "file" in row}
    pruned = "90percent_single_ckpt.pth"
    assert sizes[pruned, "packed, fp32"] == packed.name(directory / pruned).stat().st_size
    assert sizes[pruned, "packed, bf16 (lossy)"] < sizes[pruned, "packed, fp32"] < sizes[pruned, "gzip -9"]
    forms = {(Path(row["checkpoint"]).name, row["form"]): row for row in rows if "form" in row}
    assert {form for name, form in forms if name == pruned} >= {"PyTorch fp32", "sparse engine"}
    assert {form for name, form in forms if name == "ckpt.pth"} >= {"PyTorch fp32", "onnxruntime fp32"}
    net = store.load_checkpoint(directory / pruned)["net"]
    found = forms[pruned, "PyTorch fp32"]
    parameters = {key: value for key, value in net.items() if key.endswith(("weight", "bias"))}
    assert int(found["nonzeros"]) == sum(int(value.count_nonzero()) for value in parameters.values())
    assert (
        float(found["largest_difference"]) == 0 and float(forms[pruned, "sparse engine"]["largest_difference"]) < 1e-5
    )
    assert found["accuracy"] == forms[pruned, "sparse engine"]["accuracy"]
    assert float(found["accuracy"]) == pytest.approx(store.load_checkpoint(directory / pruned)["acc"])
    for row in forms.values():
        for batch in (1, 64):
            assert float(row[f"seconds_batch{batch}_threads1"]) > 0
    counts = pruning.multiply_adds(store.network_of(store.load_checkpoint(directory / pruned)), 16).values()
    assert int(found["multiply_adds"]) == sum(nonzero for _, nonzero in counts) < sum(every for every, _ in counts)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    smaller = next(
        float(row["times_smaller"]) for row in rows if row.get("file") == "packed, fp32" and pruned in row["checkpoint"]
    )
    assert smaller == pytest.approx(len(buffer.getvalue()) / sizes[pruned, "packed, fp32"])
    assert "lossy" in printed and "multiply-" in printed
    assert (directory / "deploy.png").read_bytes().startswith(b"\x89PNG")


def test_a_packed_file_is_not_packed_again(deployed, images, tmp_path):
    """What it was rounded from is not in it: another file would claim more than it holds."""
    directory, _ = deployed
    path = tmp_path / "small_ckpt.bf16.packed"
    path.write_bytes((directory / "90percent_single_ckpt.bf16.packed").read_bytes())
    checkpoint = store.load_checkpoint(path)
    batches = data.TestBatches(data.load(str(images), tmp_path, 16), torch.device("cpu"))
    args = argparse.Namespace(values="fp16", onnx=False)
    rows = deploy.make_files(path, checkpoint, store.network_of(checkpoint).eval(), 16, args, batches)
    assert [row.form for row in rows if "packed" in row.form] == []
    assert list(tmp_path.iterdir()) == [path]


def small_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build("resnet20", 2).eval()


def test_what_is_written_is_compared(deployed, tmp_path, monkeypatch):
    """A packed file with other weights, and an ONNX model with other logits, are not let through."""
    directory, _ = deployed
    path = tmp_path / "90percent_single_ckpt.pth"
    path.write_bytes((directory / path.name).read_bytes())
    checkpoint = store.load_checkpoint(path)
    other = packed.pack(checkpoint | {"net": {**checkpoint["net"], "linear.bias": torch.ones(2)}})
    args = argparse.Namespace(values="fp32", onnx=False)
    with monkeypatch.context() as patch, pytest.raises(utils.Failure, match="does not hold the weights"):
        patch.setattr(packed, "pack", lambda *_: other)
        deploy.make_files(path, checkpoint, store.network_of(checkpoint).eval(), 16, args, [])
    with monkeypatch.context() as patch, pytest.raises(utils.Failure, match="other logits than PyTorch"):
        patch.setattr(forms, "onnx_session", lambda *_: lambda images: torch.full((len(images), 2), float("nan")))
        forms.export_onnx(small_network(), 16)


def test_a_form_that_is_wrong_or_nan_is_not_measured():
    for wrong in (lambda x: small_network()(x).detach() * 1.2, lambda x: torch.full((len(x), 2), float("nan"))):
        reference = forms.in_pytorch(small_network())
        form = forms.Form("x", "wrong", 0, 0, 0, lambda _, wrong=wrong: wrong, reference, False)
        with pytest.raises(utils.Failure, match="wrong of x: logits are off"):
            forms.time_forms([form], 16, [1], 1)


def test_a_network_that_computes_nan_is_refused():
    network = small_network()
    network.layer1[0].bn1.running_var[0] = -1
    with pytest.raises(utils.Failure, match="not finite"):
        deploy.check_logits(Path("x"), network, 16)


def test_what_cannot_be_told_apart_is_refused(tmp_path):
    (tmp_path / "ckpt.pth").touch()
    assert deploy.find([tmp_path, tmp_path / "ckpt.pth", tmp_path / ".." / tmp_path.name / "ckpt.pth"]) == [
        tmp_path / "ckpt.pth"
    ]
    with pytest.raises(utils.Failure, match="and of another checkpoint"):
        deploy.find([tmp_path / "ckpt.pth", tmp_path / "ckpt.pt"])


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    pixels = torch.randn(64, 3, 16, 16)
    torch.testing.assert_close(forms.compile_or_say_why(network, 16)(pixels), network(pixels).detach())


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["nowhere.pth"], "nowhere.pth does not exist"),
        (["."], "holds no checkpoint"),
        (["broken_ckpt.pth"], "broken_ckpt.pth"),
        ([], "CHECKPOINT"),
        (["x", "--values", "int8"], "--values"),
        (["x", "--rounds", "0"], "--rounds"),
        (["x", "--threads", "0"], "--threads"),
        (["x", "--threads", "100000"], "--threads"),
    ],
)
def test_bad_input(arguments, complaint, tmp_path, monkeypatch, capsys):
    if "broken_ckpt.pth" in arguments:
        (tmp_path / "broken_ckpt.pth").write_bytes(b"PK\x03\x04 and so on")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["deploy.py", *arguments])
    with pytest.raises(SystemExit) as end:
        utils.run(deploy.main)
    printed, errors = capsys.readouterr()
    assert end.value.code == 2 and not printed
    assert complaint in errors and errors.startswith("deploy.py: ") and errors.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
