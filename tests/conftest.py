"""Small data sets, and ways to run the commands."""

import contextlib
import functools
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
import pruning
import utils
from models import torchvision_networks

ROOT = Path(__file__).parent.parent
# Networks this small are as fast on one thread, and two test runs side by side do not slow each other down.
torch.set_num_threads(1)
# Everything in a run is small: a whole experiment takes a second or two of training.
SMALL = ("--arch", "resnet20", "--image-size", "16", "--batch-size", "16", "--device", "cpu", "--epochs", "2")
SMALL_PRUNING = ("--retrain-epochs", "2", "--step", "0.4", "--step-epochs", "1", "--final-epochs", "1")


def write_images(folder: Path, train: int = 40, test: int = 11, classes: tuple[str, ...] = ("dark", "light")) -> Path:
    """An image folder whose classes differ in brightness, with mixed sizes and color modes."""
    noise = np.random.default_rng(0)
    for part, images in ("train", train), ("test", test):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for index in range(images):
                size = (16, 16, 3) if index % 3 else (20, 24)
                level = 60 + 130 * label / (len(classes) - 1)
                pixels = noise.normal(level, 30, size).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory) -> None:
    """Measurements that test.py keeps: not those of the user who runs the tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "shades")


@functools.cache
def load_script(name: str):
    """A script as a module. By path, because test.py shares its name with a package of the standard library."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(name).stem}", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run main(argv) of a script in this process, as `utils.run` would run it in one of its own."""
    argv = [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    module = load_script(script)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *argv])
        try:
            utils.run(lambda: module.main(argv))
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def succeed(script: str, *arguments: object) -> str:
    """Run a script that must succeed; returns what it printed."""
    done = call(script, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def process(script: str, *arguments: object, **more) -> subprocess.CompletedProcess:
    """Run a script as a process of its own, where that is the point."""
    line = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, text=True, timeout=240, env=environment, **more)


def invented_profile(arch: str = "resnet20", size: int = 16) -> dict:
    """A profile in which the layers of a network differ by much in the time of a weight."""
    network = models.build(arch, 2)
    layers = {}
    for place, (name, weight) in enumerate(pruning.prunable(network).items()):
        kept = [max(1, weight.numel() // 100), weight.numel() // 5, weight.numel() // 2, weight.numel()]
        each = 1e-5 * (1 + place % 7)
        ms = [0.01 + each * kept[0], 0.01 + each * kept[1], 0.01 + each * kept[2], 0.01 + each * kept[2]]
        layers[name.removesuffix(".weight")] = {"kept": kept, "ms": ms}
    return {"profile": 1, "device": "a board", "threads": 1, "arch": arch, "image_size": size, "other_ms": 0.1} | {
        "layers": layers
    }


def contents(folder: Path) -> dict[str, bytes]:
    """The results in a directory, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.pth"))}


class Killed(BaseException):
    """Stands for a SIGKILL at a named point: no handler of the program catches it."""


def kill_at(number: int) -> Callable[..., None]:
    """A function that raises Killed when it is called for the `number`-th time, from 1."""
    left = [number]

    def count(*_args: object, **_more: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return count


@pytest.fixture
def few(monkeypatch) -> None:
    """Building all networks of torchvision, to find the closest one, takes seconds."""
    monkeypatch.setattr(torchvision_networks, "names", lambda: ("torchvision:alexnet", "torchvision:vgg16_bn"))


def find_program(name: str) -> str | None:
    """The path of a program, also of one that is for root."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what this machine cannot run."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slurm") and not all(map(find_program, ("slurmctld", "slurmd", "munged", "sbatch"))):
            item.add_marker(pytest.mark.skip(reason="needs SLURM and munge: apt-get install slurm-wlm"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--histories", type=int, default=2, help="how many random histories of commands are killed")
    parser.addoption("--kills", type=int, default=6, help="how often the kill test kills the run")
