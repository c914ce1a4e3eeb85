"""Where images come from, and the batches made of them.

A data set is held in memory as bytes, 3 kB an image of 32x32. Batches are cropped, flipped and normalised on
the device that trains: many times faster than one image at a time, with the same distribution.
"""

import argparse
import hashlib
import io
import os
import socket
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils import Failure, derive_seed, difference

PADDING = 4  # pixels on each side, black, before a random crop
CROPPED_AT_ONCE = 2**25  # bytes of images


@dataclass(frozen=True)
class Split:
    """Images (N, size, size, 3), uint8 RGB; labels (N,), int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """A data set. `identity` tells it from others: a well-known name, or for a folder what files are in it.

    `mirror` says that a mirrored image still shows its class, which is so for objects and not for digits.
    """

    name: str
    identity: str
    classes: list[str]
    train: Split
    test: Split
    mirror: bool = True
    val_fraction: float = 0.0  # of the training images that are held out
    unseen: bool = False  # the test images of networks that main.py measured on held-out ones

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Of each colour over all pixels of the training images, (3,) float32, in units of the brightest."""
        # From exact counts of the 256 values: no rounding, and no copy of the images in floats.
        counts = torch.stack([torch.bincount(self.train.images[..., c].flatten(), minlength=256) for c in range(3)])
        share = counts.double() / counts.sum(1, keepdim=True)
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ values
        variance = share @ values.square() - mean.square()
        # A colour that never changes carries no information: one step of grey keeps it from dividing by zero.
        return mean.float(), variance.clamp(min=255.0**-2).sqrt().float()


def load(name: str, data_dir: Path, image_size: int, val_fraction: float = 0.0) -> Dataset:
    """`cifar10`, `cifar100`, `digits`, or the path of a folder with train/<class>/ and test/<class>/ images.

    With `val_fraction` that share of the training images is held out and takes the place of the test images, which
    are not looked at: for choices. Failure when it cannot be had, with what the user can do about it.
    """
    if name in ("cifar10", "cifar100"):
        dataset = _cifar(name, data_dir, image_size)
    elif name == "digits":
        dataset = _digits(image_size)
    else:
        dataset = _folder(Path(name), image_size)
    return hold_out(dataset, val_fraction) if val_fraction else dataset


def hold_out(dataset: Dataset, fraction: float) -> Dataset:
    """A part of the training images, the same for every seed, in place of the test images."""
    images, labels = dataset.train.images, dataset.train.labels
    count = round(fraction * len(labels))
    if not 0 < count < len(labels):
        raise Failure(f"argument --val-fraction: {fraction} of {len(labels)} images leaves none on one side")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed("hold out")))
    test, train = (Split(images[part], labels[part]) for part in (order[:count], order[count:]))
    name = f"{count:,} of the training images of {dataset.name}"
    return replace(dataset, name=name, train=train, test=test, val_fraction=fraction)


def _cifar(name: str, data_dir: Path, image_size: int) -> Dataset:
    from torchvision import datasets

    kind, archive = {
        "cifar10": (datasets.CIFAR10, "cifar-10-python.tar.gz"),
        "cifar100": (datasets.CIFAR100, "cifar-100-python.tar.gz"),
    }[name]
    existed = data_dir.exists()
    socket.setdefaulttimeout(30)  # seconds: a network that swallows packets would otherwise hang the program
    try:
        train, test = (kind(str(data_dir), train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        if not existed and data_dir.exists() and not any(data_dir.iterdir()):
            data_dir.rmdir()
        raise Failure(
            f"{name} is not in {data_dir} and cannot be downloaded ({getattr(error, 'reason', error)}): put {archive} "
            f"into {data_dir}, or use --dataset FOLDER (with train/ and test/), or --dataset digits"
        ) from None
    finally:
        socket.setdefaulttimeout(None)

    def split(source: "datasets.CIFAR10") -> Split:
        images = source.data
        if image_size != images.shape[1]:
            images = np.stack([_pixels(Image.fromarray(image), image_size) for image in images])
        return Split(torch.from_numpy(images), torch.tensor(source.targets))

    return Dataset(name, name, train.classes, split(train), split(test))


def _digits(image_size: int) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = np.stack([_pixels(Image.fromarray(image), image_size) for image in grey])
    # scikit-learn has no split of its own; this one is always the same: 1,437 and 360 images, classes in proportion.
    parts = train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return Dataset(
        "digits",
        "digits",
        [str(digit) for digit in digits.target_names],
        Split(train_images, train_labels.long()),
        Split(test_images, test_labels.long()),
        mirror=False,
    )


def _folder(folder: Path, image_size: int) -> Dataset:
    from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

    if not folder.is_dir():
        raise Failure(f"--dataset {folder} is neither cifar10, cifar100 or digits nor a folder")
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise Failure(f"{folder} has no folder {part}/: it needs train/<class>/ and test/<class>/ with images")

    class Visible(ImageFolder):
        """Hidden folders and files, as notebooks and file managers leave them, are not images."""

        def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
            classes = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != ".")
            if not classes:
                raise FileNotFoundError(f"{directory} has no class folders")
            return classes, {name: index for index, name in enumerate(classes)}

    def visible(path: str) -> bool:
        hidden = any(part.startswith(".") for part in Path(path).relative_to(folder).parts)
        return path.lower().endswith((*IMG_EXTENSIONS, ".gif")) and not hidden

    try:
        train, test = (Visible(str(folder / part), is_valid_file=visible) for part in ("train", "test"))
    except OSError as error:
        raise Failure(f"{folder} is not a folder of images: {error}") from None
    if train.classes != test.classes:
        alone = sorted(set(train.classes) ^ set(test.classes))
        raise Failure(f"{folder} has classes in only one of train/ and test/: {', '.join(alone[:5])}")
    if len(train.classes) < 2:
        raise Failure(f"{folder} has one class only, {train.classes[0]}: there is nothing to tell apart")
    sha = hashlib.sha256()
    splits = []
    for part in (train, test):
        paths = [path for path, _ in part.samples]
        images, digests = _read(paths, image_size)
        splits.append(Split(images, torch.tensor(part.targets)))
        for path, digest in zip(paths, digests):
            sha.update(os.fsencode(Path(path).relative_to(folder).as_posix()) + digest)
    return Dataset(folder.resolve().name, f"folder {sha.hexdigest()[:16]}", train.classes, *splits)


def _read(paths: list[str], size: int) -> tuple[Tensor, list[bytes]]:
    """Image files -> (N, size, size, 3) uint8, and a digest of each file. Failure names a file that is broken."""
    images = np.empty((len(paths), size, size, 3), np.uint8)
    digests = [b""] * len(paths)

    def read(start: int) -> None:
        for index, path in enumerate(paths[start : start + chunk], start):
            try:
                content = Path(path).read_bytes()
                digests[index] = hashlib.sha256(content).digest()
                with Image.open(io.BytesIO(content)) as image:
                    images[index] = _pixels(image, size)
            except Exception as error:  # Pillow's decoders raise many kinds on a broken file
                reason = str(error).split(" <_io")[0]  # the address of a buffer helps nobody
                raise Failure(f"{path} cannot be read as an image: {reason}") from None

    chunk = 500  # small images cost less to read than to hand to a thread one by one
    starts = range(0, len(paths), chunk)
    with ThreadPoolExecutor() as pool, warnings.catch_warnings(action="ignore"):  # of transparency and of large images
        for _ in tqdm(pool.map(read, starts), "reading images", len(starts), leave=False, disable=None):
            pass
    return torch.from_numpy(images), digests


def _pixels(image: Image.Image, size: int) -> np.ndarray:
    """Any image -> (size, size, 3) uint8 RGB."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # more than 8 bits of grey, which Pillow would clip and not scale
        grey = np.asarray(image, np.int64).clip(0, 65535)
        image = Image.fromarray((grey // 256 if image.mode != "I" or grey.max() > 255 else grey).astype(np.uint8))
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def of_checkpoints(args: argparse.Namespace, checkpoints: dict[Path, dict]) -> Dataset:
    """The data set asked for; without a word from the user, the one that the checkpoints were made with.

    Asked to hold out nothing, of checkpoints that were: the test images, by the mean and deviation of the training."""
    settings = next((c["settings"] for c in checkpoints.values() if "settings" in c), {})
    name = args.dataset or settings.get("dataset", "cifar10")
    if not args.dataset and name.startswith("folder "):
        raise Failure("these checkpoints were made with a folder of images: say where it is with --dataset")
    size, fraction = args.image_size or settings.get("image_size", 32), args.val_fraction
    held_out = settings.get("val_fraction", 0.0)
    if fraction is None or fraction or not held_out:
        return load(name, args.data_dir, size, held_out if fraction is None else fraction)
    whole = load(name, args.data_dir, size)
    return replace(hold_out(whole, held_out), name=whole.name, test=whole.test, unseen=True)


def check(path: Path, checkpoint: dict, images: Dataset) -> None:
    """Failure when a network cannot be measured on these images."""
    classes = len(checkpoint["net"]["linear.weight"])
    if classes != len(images.classes):
        raise Failure(f"{path} tells {classes} classes apart, and {images.name} has {len(images.classes)}")
    settings = checkpoint.get("settings", {})
    mine = {
        "dataset": images.identity,
        "image_size": images.test.images.shape[1],
        "val_fraction": images.val_fraction,
    }
    if settings and (other := difference(settings, mine)):
        raise Failure(f"{path} was made with other images: {other}")


class TestBatches:
    """The test images in their order, normalised: (B, 3, size, size) float32, channels_last, and labels (B,)."""

    def __init__(self, dataset: Dataset, device: torch.device):
        self.images, self.labels = dataset.test.images.to(device), dataset.test.labels.to(device)
        self.mean, self.std = (value.to(device) for value in dataset.mean_and_std())
        # Bounds the memory at any image size. A CPU is fastest while activations stay in its caches: 128 images of
        # 32x32 took a fifth of the time an image that 1,024 took.
        pixels = 2**17 if device.type == "cpu" else 2**20
        self.batch_size = max(1, pixels // self.images.shape[1] ** 2)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size)):
            yield _normalise(images, self.mean, self.std), labels


class TrainBatches:
    """The training images in random order, each padded, cropped at random, mirrored or not, and normalised."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, device: torch.device):
        padding = (0, 0, PADDING, PADDING, PADDING, PADDING)
        self.images = F.pad(dataset.train.images, padding).to(device)
        self.labels = dataset.train.labels.to(device)
        self.mean, self.std = (value.to(device) for value in dataset.mean_and_std())
        self.size, self.mirror = dataset.train.images.shape[1], dataset.mirror
        self.batch_size, self.seed, self.device = batch_size, seed, device

    def __len__(self) -> int:
        """Batches an epoch; the last one may be short."""
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, stage: str, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from number `first` on, as TestBatches yields them.

        Every random choice is a function of (seed, stage, epoch), the same on every device.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, stage, epoch))
        images = len(self.labels)
        order = torch.randperm(images, generator=generator).to(self.device)
        corners = torch.randint(2 * PADDING + 1, (2, images, 1), generator=generator).to(self.device)
        mirrored = torch.randint(2, (images, 1), generator=generator).bool().to(self.device) & self.mirror
        pixels = torch.arange(self.size, device=self.device)
        # Many batches are cut out at once: a GPU takes hardly longer for them than for one.
        block = self.batch_size * max(1, CROPPED_AT_ONCE // (self.batch_size * self.size**2 * 3))
        for start in range(first * self.batch_size, images, block):
            here = slice(start, start + block)
            rows = corners[0, here] + pixels
            columns = corners[1, here] + torch.where(mirrored[here], pixels.flip(0), pixels)
            chosen = order[here]
            crops = self.images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
            for inputs, labels in zip(crops.split(self.batch_size), self.labels[chosen].split(self.batch_size)):
                yield _normalise(inputs, self.mean, self.std), labels


def _normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in channels_last layout, mean 0 and deviation 1 a colour."""
    return (images / 255).sub_(mean).div_(std).permute(0, 3, 1, 2)
