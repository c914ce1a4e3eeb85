"""Bad input: one line on standard error, exit code 2, no traceback, nothing written."""

import resource
import shutil
import sys

import pytest
import torch
from conftest import command, write_images

import main
import utils

PRUNE = ("-pr", "0.5", "-shot", "single")
DATA = ("--dataset", "images", "--image-size", "16", "--arch", "resnet20", "--epochs", "1", "--device", "cpu")
BAD = [
    *[
        (("-pr", value, "-shot", "single"), f"-pr: '{value}' is not a sparsity")
        for value in ("1", "1.5", "-0.2", "nan", "ninety", "inf")
    ],
    (
        ("-pr", "0.999", "-shot", "iter", "--allocation", "uniform"),
        "than the 269804 that --allocation uniform can prune",
    ),
    (("-pr", "0.99999", "-shot", "iter", "--allocation", "lamp"), "than the 270362 that --allocation lamp can prune"),
    (("-pr", "0.5", "-shot", "iter", "--allocation", "layer"), "invalid choice: 'layer'"),
    (("-pr", "0.999999", "-shot", "iter"), "of 270384 weights leaves none"),
    (("-pr", "0.99999999", "-shot", "iter"), "more than six digits"),
    (("-pr", "1e-8", "-shot", "iter"), "more than six digits"),
    (("-pr", "0", "-0.0", "-shot", "iter"), "-pr: the same value twice"),
    (("-pr", "0.5", "-pr", "0.5", "-shot", "iter"), "-pr: the same value twice"),
    (("--image-size", "10000000"), "--image-size: '10000000' is not a"),
    (("--device", "cuda:" + "1" * 5000), "is not auto, cpu, cuda or cuda:N"),
    (("--dataset", "x" * 300), "File name too long"),
    (("--checkpoint-dir", "x" * 300), "File name too long"),
    (("-pr", "0.5", "-shot", "sngle"), "invalid choice: 'sngle'"),
    (("-pr", "0.5"), "-pr and -shot go together"),
    (("-shot", "iter"), "-pr and -shot go together"),
    (("-pr", "0.5", "0.9", "0.50", "-shot", "iter"), "-pr: the same value twice"),
    (("-pr", "0.5", "-shot", "iter", "iter"), "-shot: the same value twice"),
    (("-pr", "-shot", "iter"), "-pr: expected at least one argument"),
    *[
        ((flag, value), f"{flag}: '{value}' is not a")
        for flag in ("--epochs", "--batch-size", "--retrain-epochs", "--step-epochs", "--final-epochs")
        for value in ("0", "-3", "1.5", "many")
    ],
    *[(("--lr", value), f"--lr: '{value}' is not a") for value in ("0", "-0.1", "nan", "inf", "fast")],
    *[(("--step", value), f"--step: '{value}' is not a") for value in ("0", "1", "-0.1", "nan")],
    (("--seed", "-1"), "--seed: '-1' is not a"),
    (("--image-size", "8"), "--image-size: '8' is not a"),
    (("--arch", "vgg"), "invalid choice: 'vgg'"),
    (("--precision", "fp8"), "invalid choice: 'fp8'"),
    (("--device", "cuda:99"), "cuda:99 is not there"),
    (("--device", "tpu"), "'tpu' is not auto, cpu, cuda or cuda:N"),
    (("--device", "cuda:-1"), "'cuda:-1' is not auto, cpu, cuda or cuda:N"),
    (("--epoch", "3"), "unrecognized arguments: --epoch"),
    (("--dataset", "nowhere"), "nowhere is neither cifar10, cifar100 or digits nor a folder"),
    (("--dataset", "file"), "file is neither cifar10, cifar100 or digits nor a folder"),
    (("--dataset", "empty"), "empty has no folder train/"),
    (("--checkpoint-dir", "file"), "file cannot be written"),
    (("--checkpoint-dir", "file/below"), "file/below cannot be written"),
    (("--checkpoint-dir", "text"), "text/ckpt.pth is not a checkpoint"),
    (
        (*PRUNE, "--checkpoint-dir", "other"),
        "other/ckpt.pth is of another experiment (arch resnet18 there, resnet20 asked)",
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_images(folder / "images", train=4, test=2)
    (folder / "file").write_text("hello")
    for name in ("empty", "text", "other"):
        (folder / name).mkdir()
    (folder / "text" / "ckpt.pth").write_text("hello")
    network = main.models.build("resnet18", 2)
    torch.save({"net": network.state_dict(), "acc": 50.0, "epoch": 1}, folder / "other" / "ckpt.pth")
    return folder


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_main_refuses_bad_input_in_one_line_and_writes_nothing(place, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["main.py", *DATA, *arguments])
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    with pytest.raises(SystemExit) as end:
        utils.run(main.main)
    printed, errors = capsys.readouterr()
    assert end.value.code == 2
    assert message in errors
    assert errors.startswith("main.py: ")
    assert errors.count("\n") == 1
    assert not printed
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("main.py", ("-pr", "2", "-shot", "iter"), "'2' is not a sparsity"),
        ("main.py", (*DATA, "--dataset", "no test"), "has no folder test/"),
        ("test.py", ("--checkpoint-dir", "nowhere"), "nowhere is not a directory"),
        ("test.py", ("--checkpoint-dir", "file"), "file is not a directory"),
        ("test.py", ("--checkpoint-dir", "empty"), "empty holds no checkpoint"),
        ("test.py", ("--epochs", "3"), "unrecognized arguments: --epochs 3"),
    ],
)
def test_as_a_process_it_takes_less_than_five_seconds_and_shows_no_traceback(place, script, arguments, message):
    if not (place / "no test").exists():
        shutil.copytree(place / "images", place / "no test")
        shutil.rmtree(place / "no test" / "test")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(script, *arguments, cwd=place)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor: the time on the wall depends on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout
