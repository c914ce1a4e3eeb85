"""Small data sets and a way to run the commands as a user types them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
# Everything a run needs that is small: a whole experiment takes a second or two of training.
SMALL = ("--arch", "resnet20", "--image-size", "16", "--batch-size", "16", "--device", "cpu", "--epochs", "2")
SMALL_PRUNING = ("--retrain-epochs", "2", "--step", "0.4", "--step-epochs", "1", "--final-epochs", "1")


def write_images(folder: Path, train: int = 40, test: int = 11, classes: tuple[str, ...] = ("dark", "light")) -> Path:
    """An image folder whose classes differ in brightness, with sizes and colour modes mixed."""
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


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "shades")


def command(script: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a script of the project as a process of its own."""
    line = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240)


def succeed(script: str, *arguments: object) -> str:
    """Run a script that must succeed; returns what it printed."""
    done = command(script, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=20, help="how often the kill test kills the run")
