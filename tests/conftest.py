"""Small data sets and a way to run the commands as a user types them."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
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


# Imports once, then forks for each command: that saves each three seconds. It says the number of the process, then
# its exit code.
COMMANDS = """
import json, os, runpy, signal, sys
import torch, torchvision.datasets.folder, torch._dynamo, data, engine, models, pruning, store, utils
sys.path[0] = os.getcwd()
for line in sys.stdin:
    order = json.loads(line)
    process = os.fork()
    if process == 0:
        signal.alarm(240)
        for number, name in (1, "stdout"), (2, "stderr"):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(order["cwd"])
        engine.KEEP_SECONDS = order["keep_seconds"]
        sys.argv = order["argv"]
        runpy.run_path(sys.argv[0], run_name="__main__")
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Commands:
    """Runs scripts of the project, each as a process of its own, as a user does."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp())
        self.forks = subprocess.Popen(
            [sys.executable, "-c", COMMANDS],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        )

    def start(self, script: str, *arguments: object, cwd: Path = ROOT, keep_seconds: float = 30) -> int:
        """Returns the number of the process. `keep_seconds`: see engine.KEEP_SECONDS."""
        argv = [str(part) for part in (ROOT / script, *arguments)]
        files = {name: str(self.folder / name) for name in ("stdout", "stderr")}
        order = {"argv": argv, "cwd": str(cwd), "keep_seconds": keep_seconds, **files}
        self.forks.stdin.write(json.dumps(order) + "\n")
        self.forks.stdin.flush()
        return int(self.forks.stdout.readline())

    def wait(self) -> subprocess.CompletedProcess:
        """The end of what was started last."""
        code = int(self.forks.stdout.readline())
        return subprocess.CompletedProcess([], code, *((self.folder / n).read_text() for n in ("stdout", "stderr")))

    def close(self) -> None:
        self.forks.communicate()
        shutil.rmtree(self.folder)


@functools.cache
def commands() -> Commands:
    made = Commands()
    atexit.register(made.close)
    return made


def command(script: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script of the project as a process of its own."""
    commands().start(script, *arguments, cwd=cwd)
    return commands().wait()


def succeed(script: str, *arguments: object) -> str:
    """Run a script that must succeed; returns what it printed."""
    done = command(script, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=20, help="how often the kill test kills the run")
