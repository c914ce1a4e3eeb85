"""Data sets, and batches of their images.

A data set is held in memory as bytes, 3 kB for a 32x32 image. Batches are cropped, flipped and normalized on the
device that trains: many times faster than one image at a time, with the same distribution.
"""

import argparse
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import memory
import models
import utils
from images import cifar, folders
from images.pixels import Rendering, read_images, to_pixels
from utils import Failure, derive_seed, difference

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

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
    `rendering` describes what was decided about all images, and `left_out` the files that were not used, and why.
    `settings` are what a result depends on beside the identity: the rendering, and what the command line changed.
    """

    name: str
    identity: str
    classes: list[str]
    train: Split | None
    test: Split
    horizontal_flip: bool = True
    val_fraction: float = 0.0  # of the training images, held out and measured in place of the test images
    test_identity: str = ""
    rendering: str = ""
    left_out: str = ""
    warnings: tuple[str, ...] = ()  # for the user, about the images
    settings: dict[str, Any] = field(default_factory=dict)
    constants: tuple[list[float], list[float]] | None = None  # mean and std of the command line
    held_out_scores: bool = True  # whether accuracies in files of main.py are of the images in `test`

    def training_images(self) -> Split:
        """The training images; Failure where only the test images were read."""
        if self.train is None:
            raise Failure(f"{self.name} was read without its training images")
        return self.train

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, fractions of full scale: those of the command line, else over
        the training images."""
        if self.constants:
            return self.constants
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
        """One line: how many images of how many classes are used, and what was left out. Then a line a warning."""
        train, test = len(self.training_images().labels), len(self.test.labels)
        measured = "held-out training" if self.val_fraction else "test"
        line = f"{self.name}: {train:,} training and {test:,} {measured} images of {len(self.classes)} classes"
        line += f"; {self.rendering}" if self.rendering else ""
        line += f"; left out: {self.left_out}" if self.left_out else ""
        return "\n".join(map(utils.printable, (line, *(f"warning: {warning}" for warning in self.warnings))))


def load(
    name: str,
    data_dir: Path,
    image_size: int,
    val_fraction: float = 0.0,
    train: bool = True,
    flip: bool = True,
    rendering: Rendering | None = None,
) -> Dataset:
    """Load `cifar10`, `cifar100`, `digits`, or a folder with train/<class>/ and test/<class>/ images.

    With `val_fraction` that fraction of the training images is held out and takes the place of the test images, which
    are not used: tune on them. Without `train` a folder needs no train/, and the training images' `rendering` is that
    of a checkpoint. Without `flip` no training image is mirrored. Failure says what the user can do.
    """
    if name in ("cifar10", "cifar100"):
        _check_memory(50_000, 10_000, image_size)
        dataset = _cifar(name, data_dir, image_size)
    elif name == "digits":
        dataset = _digits(image_size)
    else:
        parts = ("train", "test") if train or val_fraction else ("test",)
        dataset = _folder(Path(name), image_size, parts, rendering or Rendering())
    if dataset.horizontal_flip and not flip:
        settings = dataset.settings | {"horizontal_flip": False}
        dataset = replace(dataset, horizontal_flip=False, settings=settings)
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


def _check_memory(train: int, test: int, size: int) -> None:
    """Failure when so many images, and a padded copy of those for training, do not fit into memory."""
    needed = 3 * ((train + test) * size**2 + train * (size + 2 * PADDING) ** 2)
    left = memory.available()
    if left is not None and needed > left:
        images = f"{train + test:,} images of --image-size {size}"
        raise Failure(f"{images} need {needed:,} bytes of memory, and {left:,} are left: try a smaller --image-size")


def _cifar(name: str, data_dir: Path, image_size: int) -> Dataset:
    def split(source: "CIFAR10") -> Split:
        images = source.data
        if image_size != images.shape[1]:
            images = np.empty((len(source.data), image_size, image_size, 3), np.uint8)
            for index, image in enumerate(source.data):
                images[index] = to_pixels(Image.fromarray(image), image_size)
        return Split(torch.from_numpy(images), torch.tensor(source.targets))

    train, test = cifar.read(name, data_dir)
    return Dataset(name, name, train.classes, split(train), split(test), test_identity=name)


def _digits(image_size: int) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    _check_memory(len(digits.images), 0, image_size)
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


def _folder(folder: Path, image_size: int, parts: tuple[str, ...], rendering: Rendering) -> Dataset:
    found = folders.list_parts(folder, parts)
    paths = [path for listing in found.values() for path, _ in listing.samples]
    count = len(found["train"].samples) if "train" in found else 0
    _check_memory(count, len(paths) - count, image_size)
    # The training images decide how all are rendered. Where only test/ is read, the checkpoint says how.
    pictures = read_images(paths, image_size, count, Rendering() if count else rendering)
    splits: dict[str, Split] = {}
    identities: dict[str, str] = {}
    whole, start = hashlib.sha256(), 0
    for part, listing in found.items():
        here = slice(start, start := start + len(listing.samples))
        splits[part] = Split(pictures.images[here], torch.tensor([label for _, label in listing.samples]))
        names = [os.fsencode(Path(path).relative_to(folder).as_posix()) for path in paths[here]]
        entries = b"".join(name + key for name, key in zip(names, pictures.keys[here]))
        whole.update(entries)
        identities[part] = f"folder {hashlib.sha256(entries).hexdigest()[:16]}"
    return Dataset(
        folder.resolve().name,
        f"folder {whole.hexdigest()[:16]}" if len(parts) == 2 else "",
        found["test"].classes,
        splits.get("train"),
        splits["test"],
        test_identity=identities["test"],
        rendering=str(pictures.rendering),
        left_out=folders.left_out(folder, found),
        warnings=tuple(folders.warnings_about(found, pictures.digests, pictures.uniform)),
        settings=pictures.rendering.settings(),
    )


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
    # A file of another program does not say which images it was made with.
    complete = all("test_images" in c or "settings" not in c for c in checkpoints.values())
    own = sum("mean" in checkpoint for checkpoint in checkpoints.values())
    if args.mean and own:
        print(f"--mean and --std are for files without constants of their own, which {own} of {len(checkpoints)} have")
    complete &= all("mean" in c for c in checkpoints.values()) or bool(args.mean)
    if fraction is None or fraction or not held_out:
        fraction = held_out if fraction is None else fraction
        images = load(name, args.data_dir, size, fraction, not complete, rendering=Rendering.of(settings))
        return with_constants(images, args)
    whole = load(name, args.data_dir, size, train=not complete, rendering=Rendering.of(settings))
    if complete:
        return with_constants(replace(whole, val_fraction=held_out, held_out_scores=False), args)
    part = split_validation(whole, held_out)  # its mean and standard deviation are those of the training
    return with_constants(replace(part, test=whole.test, held_out_scores=False), args)


def with_constants(dataset: Dataset, args: argparse.Namespace) -> Dataset:
    """The data set, normalized by --mean and --std where the command line has them: then they are settings, too."""
    if not args.mean:
        return dataset
    settings = {name: " ".join(map(str, values)) for name, values in (("mean", args.mean), ("std", args.std))}
    return replace(dataset, constants=(args.mean, args.std), settings=dataset.settings | settings)


def check(path: Path, checkpoint: dict, dataset: Dataset) -> None:
    """Failure when a network cannot be measured on these images."""
    classes = models.outputs(checkpoint["arch"], checkpoint["net"])
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
    try:
        models.check_size(checkpoint["arch"], classes, dataset.test.images.shape[1])
    except ValueError as error:
        raise Failure(f"{path}: {error}") from None


def test_batches(checkpoint: dict, dataset: Dataset, device: torch.device) -> "TestBatches":
    """The test images as the network of a checkpoint expects them: normalized by its own constants, where it has
    them, else by those of the command line or of the training images."""
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
