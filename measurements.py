"""What test.py found in a file before, so that it is not measured twice.

A measurement is a function of the file's bytes, the test images, the arithmetic and this program, and a digest of all
four is its key. It is kept in the user's own cache directory and not beside the checkpoints: who gives a checkpoint
away could add any measurement to it. Each is one small file with a digest of its content.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

import checkpoints
from data import Dataset
from utils import Failure

HERE = Path(__file__).resolve().parent
SOURCES = ("*.py", "formats/*.py", "images/*.py", "models/*.py")


def sources() -> list[Path]:
    """What a measurement may depend on: test.py, and what it imports. Imports stand at the top of each module."""
    modules = [vars(module) for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    files = [module["__file__"] for module in modules if module.get("__file__")]
    loaded = {HERE / "test.py", *(Path(file).resolve() for file in files)}
    return sorted(path for pattern in SOURCES for path in HERE.glob(pattern) if path in loaded)


@functools.cache
def program() -> str:
    """A digest of these sources and PyTorch's version: another version measures anew."""
    sha = hashlib.sha256(torch.__version__.encode())
    for path in sources():
        sha.update(path.read_bytes())
    return sha.hexdigest()


def identity_of(images: Dataset) -> str:
    """A digest of the test images, pixel by pixel, and of what decides whether a checkpoint belongs to them."""
    names = (images.identity, images.test_identity, images.val_fraction, images.held_out_scores, images.classes)
    sha = hashlib.sha256(json.dumps([*names, images.train is None, list(images.test.images.shape)]).encode())
    sha.update(images.test.images.numpy().tobytes())
    sha.update(images.test.labels.numpy().tobytes())
    return sha.hexdigest()


class Cache:
    """Measurements by key. A `fresh` one knows nothing yet, and replaces what it had."""

    def __init__(self, fresh: bool = False):
        self.fresh = fresh
        self.folder: Path | None = None
        with contextlib.suppress(RuntimeError):  # a user without a home has no cache
            home = os.environ.get("XDG_CACHE_HOME", "")
            self.folder = (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "pruning-measurements"

    def get(self, key: list) -> dict | None:
        """The measurement of a key; None if there is none, or the file is damaged or of another key."""
        if self.fresh or self.folder is None:
            return None
        name = digest_of([program(), key])
        try:
            entry = json.loads(checkpoints.read(self.folder / f"{name}.json"))
            good = entry["key"] == name and entry["sha256"] == digest_of([name, entry["value"]])
            return entry["value"] if good else None
        except (Failure, ValueError, KeyError, TypeError, RecursionError):
            return None

    def put(self, key: list, value: dict) -> None:
        """Keep a measurement. Where that is impossible it is made again the next time."""
        if self.folder is None:
            return
        name = digest_of([program(), key])
        entry = {"key": name, "value": value, "sha256": digest_of([name, value])}
        with contextlib.suppress(OSError, Failure):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            checkpoints.write(self.folder / f"{name}.json", json.dumps(entry).encode())


def digest_of(value: list) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
