"""Folders of image files: which images they hold, and their pixels."""

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import utils
from utils import Failure

# The formats of the accepted endings. Others stay closed: Pillow would start other programs for some.
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
LARGEST_FILE = 2**28  # bytes of an image file


def list_images(folder: Path) -> tuple[list[str], list[tuple[str, int]], int, list[str]]:
    """The classes of train/ or test/, its images with their class index, and what is left out: the number of hidden
    entries, as notebooks and file managers leave them, and the names of files that are not images."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    hidden = 0
    others: list[str] = []
    samples: list[tuple[str, int]] = []
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    hidden += sum(entry.name.startswith(".") for entry in entries)
    others += [entry.name for entry in entries if not entry.name.startswith(".") and not entry.is_dir()]
    classes = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not classes:
        raise Failure(f"{folder} has no class folders")
    for label, name in enumerate(classes):
        before = len(samples)
        for parent, folders, files in sorted(walk(folder / name)):
            if any(part.startswith(".") for part in Path(parent).relative_to(folder).parts):
                continue
            hidden += sum(entry.startswith(".") for entry in folders + files)
            for file in sorted(file for file in files if not file.startswith(".")):
                if file.lower().endswith((*IMG_EXTENSIONS, ".gif")):
                    samples.append((os.path.join(parent, file), label))
                else:
                    others.append(file)
        if len(samples) == before:
            raise Failure(f"{folder / name} has no images ({', '.join((*IMG_EXTENSIONS, '.gif'))})")
    return classes, samples, hidden, others


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, following links. Failure names a link that leads back to a folder above it."""
    above = {str(folder): [os.path.realpath(folder)]}
    for parent, folders, files in os.walk(folder, followlinks=True):
        for name in folders:
            path = os.path.join(parent, name)
            real = os.path.realpath(path)
            if real in above[parent]:
                raise Failure(f"{path} leads back to {real}, which contains it: a directory loop")
            above[path] = [*above[parent], real]
        yield parent, folders, files


def read_images(paths: list[str], size: int) -> tuple[Tensor, list[bytes]]:
    """Image files -> (N, size, size, 3) uint8, and a digest of each file. Failure names a broken file."""
    # The images, a padded copy of the training images, and what Python itself needs.
    utils.check_memory(2 * len(paths) * size**2 * 3, f"{len(paths):,} images of --image-size {size}")
    images = np.empty((len(paths), size, size, 3), np.uint8)
    digests = [b""] * len(paths)

    def read(start: int) -> None:
        for index, path in enumerate(paths[start : start + chunk], start):
            try:
                content = read_image(path)
                digests[index] = hashlib.sha256(content).digest()
                with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                    images[index] = to_pixels(image, size)
            except Exception as error:  # Pillow's decoders raise many kinds of error
                reason = str(error).split(" <_io")[0]  # without the address of a buffer
                raise Failure(f"{path} cannot be read as an image: {reason}") from None

    chunk = 500  # handing a small image to a thread costs more than reading it
    starts = range(0, len(paths), chunk)
    with ThreadPoolExecutor() as pool, warnings.catch_warnings(action="ignore"):  # about transparency and large images
        for _ in tqdm(pool.map(read, starts), "reading images", len(starts), leave=False, disable=None):
            pass
    return torch.from_numpy(images), digests


def read_image(path: str) -> bytes:
    """The content of a regular file of bounded size; ValueError for anything else, as for a pipe."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE:,} bytes")
    with open(path, "rb") as file:
        return file.read()


def to_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Any image -> (size, size, 3) uint8 RGB."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # more than 8 bits of grey, which Pillow would clip in place of scaling
        grey = np.asarray(image, np.int64).clip(0, 65535)
        image = Image.fromarray((grey // 256 if image.mode != "I" or grey.max() > 255 else grey).astype(np.uint8))
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)
