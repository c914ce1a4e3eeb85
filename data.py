"""Data sets, and batches of their images.

A data set is held in memory as bytes, 3 kB for a 32x32 image. Batches are cropped, flipped and normalized on the
device that trains: many times faster than one image at a time, with the same distribution.
"""

import argparse
import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import utils
from image_files import list_images, read_images, to_pixels
from utils import Failure, derive_seed, difference

NAMES = ("cifar10", "cifar100", "digits")
PADDING = 4  # black pixels on each side before a random crop
CROPPED_AT_ONCE = 2**25  # bytes of images


@dataclass(frozen=True)
class Split:
    """Images (N, size, size, 3), uint8 RGB; labels (N,), int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """A data set. `identity` distinguishes it from others: a well-known name, or for a folder a digest of its files.

    `test_identity` is that of the test images alone. `train` is None where only the test images were read.
    `horizontal_flip` says that a flipped image still shows its class, which holds for objects and not for digits.
    `left_out` describes the files that were not used, and why.
    """

    name: str
    identity: str
    classes: list[str]
    train: Split | None
    test: Split
    horizontal_flip: bool = True
    val_fraction: float = 0.0  # of the training images, held out and measured in place of the test images
    test_identity: str = ""
    left_out: str = ""
    warning: str = ""  # for the user, about the images
    held_out_scores: bool = True  # whether accuracies in files of main.py are of the images in `test`

    def training_images(self) -> Split:
        """The training images; Failure where only the test images were read."""
        if self.train is None:
            raise Failure(f"{self.name} was read without its training images")
        return self.train

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the training images; fractions of full scale."""
        # From exact counts of the 256 values: no rounding, and no copy of the images in floats.
        images = self.training_images().images
        counts = torch.stack([torch.bincount(images[..., c].flatten(), minlength=256) for c in range(3)])
        share = counts.double() / counts.sum(1, keepdim=True)
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ values
        variance = share @ values.square() - mean.square()
        # A constant channel carries no information: one level of 255 avoids a division by zero.
        std = variance.clamp(min=255.0**-2).sqrt()
        return mean.float().tolist(), std.float().tolist()

    def summary(self) -> str:
        """One line: how many images of how many classes are used, and what was left out."""
        train, test = len(self.training_images().labels), len(self.test.labels)
        measured = "held-out training" if self.val_fraction else "test"
        left_out = f"; left out: {self.left_out}" if self.left_out else ""
        left_out += f"\nwarning: {self.warning}" if self.warning else ""
        images = f"{train:,} training and {test:,} {measured} images of {len(self.classes)} classes"
        return utils.printable(f"{self.name}: {images}") + left_out


def load(name: str, data_dir: Path, image_size: int, val_fraction: float = 0.0, train: bool = True) -> Dataset:
    """Load `cifar10`, `cifar100`, `digits`, or a folder with train/<class>/ and test/<class>/ images.

    With `val_fraction` that fraction of the training images is held out and takes the place of the test images, which
    are not used: tune on them. Without `train` a folder needs no train/. Failure says what the user can do.
    """
    if name in ("cifar10", "cifar100"):
        utils.check_memory(3 * 60_000 * image_size**2 * 2, f"60,000 images of --image-size {image_size}")
        dataset = _cifar(name, data_dir, image_size)
    elif name == "digits":
        dataset = _digits(image_size)
    else:
        dataset = _folder(Path(name), image_size, ("train", "test") if train or val_fraction else ("test",))
    return split_validation(dataset, val_fraction) if val_fraction else dataset


def split_validation(dataset: Dataset, fraction: float) -> Dataset:
    """Hold out a fraction of the training images, the same for every seed, in place of the test images."""
    whole = dataset.training_images()
    images, labels = whole.images, whole.labels
    count = round(fraction * len(labels))
    if not 0 < count < len(labels):
        raise Failure(f"argument --val-fraction: {fraction} of {len(labels)} images leaves none on one side")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed("hold out")))
    test, train = (Split(images[part], labels[part]) for part in (order[:count], order[count:]))
    return replace(dataset, train=train, test=test, val_fraction=fraction, test_identity=f"held out of {dataset.name}")


def _cifar(name: str, data_dir: Path, image_size: int) -> Dataset:
    from torchvision import datasets

    kind, archive, unpacked = {
        "cifar10": (datasets.CIFAR10, "cifar-10-python.tar.gz", "cifar-10-batches-py"),
        "cifar100": (datasets.CIFAR100, "cifar-100-python.tar.gz", "cifar-100-python"),
    }[name]
    existed = data_dir.exists()
    there = [path for path in (data_dir / archive, data_dir / unpacked) if path.exists()]
    socket.setdefaulttimeout(30)  # seconds: a network that swallows packets would otherwise hang the program
    try:
        train, test = (kind(str(data_dir), train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        if not existed and data_dir.exists() and not any(data_dir.iterdir()):
            data_dir.rmdir()
        found = f"{there[0]} is damaged" if there else f"{name} is not in {data_dir}"
        raise Failure(
            f"{found} and it cannot be downloaded ({getattr(error, 'reason', error)}): put {archive} into {data_dir}, "
            "or use --dataset FOLDER (with train/ and test/), or --dataset digits"
        ) from None
    finally:
        socket.setdefaulttimeout(None)

    def split(source: "datasets.CIFAR10") -> Split:
        images = source.data
        if image_size != images.shape[1]:
            images = np.stack([to_pixels(Image.fromarray(image), image_size) for image in images])
        return Split(torch.from_numpy(images), torch.tensor(source.targets))

    return Dataset(name, name, train.classes, split(train), split(test), test_identity=name)


def _digits(image_size: int) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    utils.check_memory(2 * len(digits.images) * image_size**2 * 3, f"the digits at --image-size {image_size}")
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = np.stack([to_pixels(Image.fromarray(image), image_size) for image in grey])
    # scikit-learn defines no split. This one is always the same: 1,437 and 360 images, classes in proportion.
    parts = train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return Dataset(
        "digits",
        "digits",
        [str(digit) for digit in digits.target_names],
        Split(train_images, train_labels.long()),
        Split(test_images, test_labels.long()),
        horizontal_flip=False,
        test_identity="digits",
    )


def _folder(folder: Path, image_size: int, parts: tuple[str, ...]) -> Dataset:
    if not folder.is_dir():
        raise Failure(f"--dataset {folder} is neither cifar10, cifar100 or digits nor a folder")
    for part in parts:
        if not (folder / part).is_dir():
            raise Failure(f"{folder} has no folder {part}/: it needs train/<class>/ and test/<class>/ with images")
    hidden, others = 0, []
    classes, samples = {}, {}
    for part in parts:
        classes[part], samples[part], found_hidden, found_others = list_images(folder / part)
        hidden += found_hidden
        others += found_others
    if len(parts) == 2 and classes["train"] != classes["test"]:
        alone = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise Failure(f"{folder} has classes in only one of train/ and test/: {', '.join(alone[:5])}")
    names = classes["test"]
    if len(names) < 2:
        raise Failure(f"{folder} has only the class {names[0]}: training needs two or more")
    splits: dict[str, Split] = {}
    identities: dict[str, str] = {}
    digests: dict[str, list[bytes]] = {}
    whole = hashlib.sha256()
    for part in parts:
        paths = [path for path, _ in samples[part]]
        images, digests[part] = read_images(paths, image_size)
        splits[part] = Split(images, torch.tensor([label for _, label in samples[part]]))
        entries = [
            os.fsencode(Path(path).relative_to(folder).as_posix()) + digest
            for path, digest in zip(paths, digests[part])
        ]
        whole.update(b"".join(entries))
        identities[part] = f"folder {hashlib.sha256(b''.join(entries)).hexdigest()[:16]}"
    left_out = [f"{hidden} hidden files or folders"] if hidden else []
    left_out += [f"{len(others)} files that are not images, such as {others[0]}"] if others else []
    warning = f"{seen} of the test images are training images, too" if (seen := _count_seen(digests)) else ""
    return Dataset(
        folder.resolve().name,
        f"folder {whole.hexdigest()[:16]}" if len(parts) == 2 else "",
        names,
        splits.get("train"),
        splits["test"],
        test_identity=identities["test"],
        left_out=utils.printable(", ".join(left_out)),
        warning=warning,
    )


def _count_seen(digests: dict[str, list[bytes]]) -> int:
    """How many test files are training files, byte for byte."""
    known = set(digests.get("train", []))
    return sum(digest in known for digest in digests["test"])


def of_checkpoints(args: argparse.Namespace, checkpoints: dict[Path, dict]) -> Dataset:
    """The data set of the command line, by default that of the checkpoints.

    Its training images are read only where they are needed: for held-out images, and for checkpoints that do not say
    by which mean and standard deviation their images were normalized. With --val-fraction 0, networks that main.py
    measured on held-out images are measured on the test images.
    """
    settings: dict = next((c["settings"] for c in checkpoints.values() if "settings" in c), {})
    name = args.dataset or settings.get("dataset", "cifar10")
    if not args.dataset and name not in NAMES:  # no file decides which folder is read
        raise Failure("these checkpoints were made with a folder of images: name it with --dataset")
    size, fraction = args.image_size or settings.get("image_size", 32), args.val_fraction
    held_out = settings.get("val_fraction", 0.0)
    complete = all("mean" in checkpoint and "test_images" in checkpoint for checkpoint in checkpoints.values())
    if fraction is None or fraction or not held_out:
        return load(name, args.data_dir, size, held_out if fraction is None else fraction, train=not complete)
    whole = load(name, args.data_dir, size, train=not complete)
    if complete:
        return replace(whole, val_fraction=held_out, held_out_scores=False)
    part = split_validation(whole, held_out)  # its mean and standard deviation are those of the training
    return replace(part, test=whole.test, held_out_scores=False)


def check(path: Path, checkpoint: dict, dataset: Dataset) -> None:
    """Failure when a network cannot be measured on these images."""
    classes = len(checkpoint["net"]["linear.weight"])
    if classes != len(dataset.classes):
        raise Failure(f"{path} has {classes} outputs, and {dataset.name} has {len(dataset.classes)} classes")
    settings = checkpoint.get("settings", {})
    mine: dict = {"image_size": dataset.test.images.shape[1], "val_fraction": dataset.val_fraction}
    theirs = {name: settings.get(name, 0.0) for name in mine}
    if dataset.train is not None:
        mine["dataset"], theirs["dataset"] = dataset.identity, settings.get("dataset")
    elif dataset.held_out_scores:
        mine["test_images"], theirs["test_images"] = dataset.test_identity, checkpoint.get("test_images")
    if settings and (other := difference(theirs, mine)):
        raise Failure(f"{path} was made with other images: {other}")


def test_batches(checkpoint: dict, dataset: Dataset, device: torch.device) -> "TestBatches":
    """The test images as the network of a checkpoint expects them: normalized by its own constants, where it has
    them, else by those of the training images."""
    if "mean" in checkpoint:
        return TestBatches(dataset.test, checkpoint["mean"], checkpoint["std"], device)
    return TestBatches(dataset.test, *dataset.mean_and_std(), device)


class TestBatches:
    """Images in their order, normalized: (B, 3, size, size) float32, channels_last, and labels (B,)."""

    __test__ = False  # for pytest, which takes the name for a test

    def __init__(self, split: Split, mean: list[float], std: list[float], device: torch.device):
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        # It bounds the memory for any image size. A CPU is fastest while activations stay in its caches: with 128
        # images of 32x32 an image took a fifth of the time that it took with 1,024.
        pixels = 2**17 if device.type == "cpu" else 2**20
        self.batch_size = max(1, pixels // self.images.shape[1] ** 2)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size)):
            yield _normalize(images, self.mean, self.std), labels


class TrainBatches:
    """The training images in random order, each padded, randomly cropped and flipped, and normalized."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, device: torch.device):
        padding = (0, 0, PADDING, PADDING, PADDING, PADDING)
        train = dataset.training_images()
        self.images = F.pad(train.images, padding).to(device)
        self.labels = train.labels.to(device)
        self.mean, self.std = (torch.tensor(value, device=device) for value in dataset.mean_and_std())
        self.size, self.horizontal_flip = train.images.shape[1], dataset.horizontal_flip
        self.batch_size, self.seed, self.device = batch_size, seed, device

    def __len__(self) -> int:
        """Batches per epoch; the last one may be short."""
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, stage: str, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from number `first` on, in the form of TestBatches.

        Every random choice is a function of (seed, stage, epoch), the same on every device.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, stage, epoch))
        images = len(self.labels)
        order = torch.randperm(images, generator=generator).to(self.device)
        corners = torch.randint(2 * PADDING + 1, (2, images, 1), generator=generator).to(self.device)
        flipped = torch.randint(2, (images, 1), generator=generator).bool().to(self.device) & self.horizontal_flip
        pixels = torch.arange(self.size, device=self.device)
        # Crop many batches at once: a GPU takes hardly longer for them than for one.
        block = self.batch_size * max(1, CROPPED_AT_ONCE // (self.batch_size * self.size**2 * 3))
        for start in range(first * self.batch_size, images, block):
            here = slice(start, start + block)
            rows = corners[0, here] + pixels
            columns = corners[1, here] + torch.where(flipped[here], pixels.flip(0), pixels)
            chosen = order[here]
            crops = self.images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
            for inputs, labels in zip(crops.split(self.batch_size), self.labels[chosen].split(self.batch_size)):
                yield _normalize(inputs, self.mean, self.std), labels


def _normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in channels_last layout, each channel with mean 0 and deviation 1."""
    return (images / 255).sub_(mean).div_(std).permute(0, 3, 1, 2)
