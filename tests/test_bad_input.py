"""Bad input: one line on standard error, exit code 2, no traceback, nothing written."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, call, process, write_images

import models

DATA = (*SMALL, "--dataset", "images", "--checkpoint-dir", "new")
SINGLE, ITER = ("-shot", "single"), ("-shot", "iter")
BAD = [
    (("-pr", "0.5"), "-pr and -shot go together"),
    (ITER, "-pr and -shot go together"),
    (("--control",), "--control needs -pr and -shot"),
    (("-pr", "1.5", *SINGLE), "argument -pr: '1.5' is not a sparsity between 0 and 1"),
    (("-pr", "0.99999999", *ITER), "argument -pr: '0.99999999' in percent has more than the six digits"),
    (("-pr", "0.5", "0.9", "0.50", *ITER), "argument -pr: the same value twice"),
    (("-pr", "0.5", *ITER, "-shot", "iter"), "argument -shot: the same value twice"),
    (("-pr", "0.5", "-shot", "sngle"), "invalid choice: 'sngle'"),
    (("-pr", "0.5", *SINGLE, "--rewind", "1"), "argument --rewind: only -shot iter rewinds"),
    (("-pr", "0.5", *ITER, "--rewind", "2"), "argument --rewind: 2 is not before the last of 2 epochs"),
    (("--macs", "0.5"), "--macs needs -pr and -shot"),
    (("--ms", "1.2"), "--ms needs -pr and -shot"),
    (("-pr", "0.5", *SINGLE, "--macs", "1e-5"), "argument --macs: '1e-5' is not a share from 0.0001 to 1"),
    (("-pr", "0.5", *SINGLE, "--ms", "0"), "argument --ms: '0' is not a time in milliseconds"),
    (("-pr", "0.5", *SINGLE, "--ms", "1.2345678"), "with at most six digits"),
    (("-pr", "0.5", *SINGLE, "--ms", "1", "--macs", "0.5"), "--macs and --ms exclude each other"),
    (("-pr", "0.5", *SINGLE, "--profile", "x.json"), "--profile needs --ms"),
    (("-pr", "0.5", *SINGLE, "--macs", "0.5", "--allocation", "erk"), "--macs and --allocation exclude each other"),
    (("--epoch", "3"), "unrecognized arguments: --epoch 3"),
    (("--device", "cuda:99"), "argument --device: no cuda:99 here"),
    (
        ("-pr", "0.5", *SINGLE, "--exclude", "conv1", "layer1", "layer2", "layer3", "linear"),
        "argument --exclude: this leaves no layer to prune",
    ),
    (
        ("-pr", "0.5", *SINGLE, "--exclude", "conv9"),
        "argument --exclude: the network has no convolution or linear layer",
    ),
    (
        ("-pr", "0.998", *ITER, "--allocation", "uniform"),
        "argument -pr: 0.998 of 267824 weights is more than --allocation uniform can prune, 267246",
    ),
    (("-pr", "0.999999", *SINGLE), "argument -pr: 0.999999 of 267824 weights is more than --allocation global can"),
    (
        ("-pr", "0.5", *ITER, "--step", "1e-9"),
        "--step: steps of 1e-09 of the weights left take more than 1,000",
    ),
    (("--batch-size", str(2**63 - 1)), f"--batch-size: '{2**63 - 1}' is not a whole number from 1 to 1,000,000"),
    (("-pr", "0.5", *ITER, "--final-epochs", "1" + "0" * 400), "is not a whole number from 1 to 1,000,000"),
    (("foo\nbar\x1b[31m",), "unrecognized arguments: foo bar\\x1b[31m"),
    (("--checkpoint-dir", ""), "argument --checkpoint-dir: an empty name is not a directory"),
    (("--dataset", "cifar10", "--image-size", "1024"), "60,000 images of --image-size 1024 need "),
    (("--dataset", "nowhere"), "--dataset nowhere is neither cifar10, cifar100 or digits nor a folder"),
    (("--dataset", "x" * 300), "File name too long"),
    (("--dataset", "no test"), "no test has no folder test/"),
    (("--val-fraction", "0.001"), "argument --val-fraction: 0.001 of 8 images leaves none on one side"),
    (("--checkpoint-dir", "file"), "file is not a directory"),
    (("--checkpoint-dir", "file/below"), "file/below cannot be written"),
    (("--checkpoint-dir", "text"), "text/ckpt.pth is not a checkpoint"),
    (("-pr", "0.5", *SINGLE, "--checkpoint-dir", "text"), "text/ckpt.pth is not a checkpoint"),
    (
        ("-pr", "0.5", *SINGLE, "--checkpoint-dir", "other"),
        "other/ckpt.pth is of another experiment (arch resnet20-projection there, resnet20 asked)",
    ),
    (("-pr", "0.5", *SINGLE, "--checkpoint-dir", "more"), "(classes 10 there, 2 asked)"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_images(folder / "images", train=4, test=2)
    shutil.copytree(folder / "images" / "train", folder / "no test" / "train")
    (folder / "file").write_text("hello")
    for name in ("empty", "text", "other", "more", "foreign"):
        (folder / name).mkdir()
    (folder / "text" / "ckpt.pth").write_text("hello")
    (folder / "foreign" / "net.safetensors").write_text("hello")
    for name, arch, classes in ("other", "resnet20-projection", 2), ("more", "resnet20", 10):
        net = models.build(arch, classes).state_dict()
        torch.save({"net": net, "acc": 50.0, "epoch": 1}, folder / name / "ckpt.pth")
    return folder


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file with its bytes, and every folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_main_refuses_bad_input_in_one_line_and_writes_nothing(place, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    before = contents(place)
    done = call("main.py", *DATA, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("main.py: ") and done.stderr.endswith("\n") and done.stderr.count("\n") == 1
    assert not done.stdout
    assert contents(place) == before


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("main.py", ("-pr", "2", "-shot", "iter"), "'2' is not a sparsity"),
        pytest.param("main.py", (*DATA, "--dataset", "no test"), "has no folder test/", marks=pytest.mark.slow),
        pytest.param("test.py", ("--checkpoint-dir", "empty"), "empty holds no checkpoint", marks=pytest.mark.slow),
    ],
)
def test_as_a_process_it_shows_no_traceback(place, script, arguments, message):
    before = contents(place)
    done = process(script, *arguments, cwd=place)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1
    assert not done.stdout
    assert contents(place) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint-dir", "nowhere"), "--checkpoint-dir nowhere is not a directory"),
        (("--checkpoint-dir", "file"), "--checkpoint-dir file is not a directory"),
        (("--checkpoint-dir", "empty"), "empty holds no checkpoint (*.pth, *.packed): python main.py makes them"),
        (("--epochs", "3"), "unrecognized arguments: --epochs"),
        (("other/ckpt.pth", "--checkpoint-dir", "other"), "name files or --checkpoint-dir, not both"),
        (("other",), "other is a directory: --checkpoint-dir other"),
        (("--checkpoint-dir", "."), "name those below it: --checkpoint-dir more other"),
        (("--checkpoint-dir", "foreign"), "name other files on the command line: python test.py foreign/net.s"),
        (("--checkpoint-dir", "other", "--dataset", "nowhere"), "--dataset nowhere is neither"),
    ],
)
def test_test_refuses_bad_input_in_one_line_and_writes_nothing(place, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    before = contents(place)
    done = call("test.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("test.py: ") and done.stderr.count("\n") == 1
    assert not done.stdout
    assert contents(place) == before
