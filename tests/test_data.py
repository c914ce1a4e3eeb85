"""Images in, batches out; and every way in which images can be missing or broken."""

import argparse
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import write_images

import data
import utils

CPU = torch.device("cpu")
NOWHERE = Path("unused")


def coordinates(size: int = 32) -> data.Dataset:
    """One image whose pixel at row y and column x is (y + 1, x + 1, 7): every crop says where it came from."""
    rows, columns = torch.meshgrid(torch.arange(size) + 1, torch.arange(size) + 1, indexing="ij")
    image = torch.stack([rows, columns, torch.full_like(rows, 7)], -1).to(torch.uint8)
    split = data.Split(image.repeat(8100, 1, 1, 1), torch.zeros(8100, dtype=torch.long))
    return data.Dataset("coordinates", "", ["a", "b"], split, split)


def numbers(count: int) -> data.Dataset:
    """Images whose label is their number, from 0."""
    split = data.Split(torch.zeros(count, 16, 16, 3, dtype=torch.uint8), torch.arange(count))
    return data.Dataset("numbers", "", [str(i) for i in range(count)], split, split)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits", NOWHERE, 16)


# --- Batches -------------------------------------------------------------------------------------------------------


def test_augmentation_is_a_random_crop_of_padded_images_and_a_horizontal_flip():
    images = coordinates()
    batches = data.TrainBatches(images, 900, 0, CPU)
    padded = F.pad(images.train.images[0].permute(2, 0, 1), (4, 4, 4, 4))
    seen = Counter()
    for inputs, _ in batches.epoch("a", 0):
        pixels = (inputs * batches.std[:, None, None] + batches.mean[:, None, None]) * 255
        for crop in pixels.round().to(torch.uint8):
            middle = crop[:, 16, 16]  # never padding: its values are row and column of the original image
            flipped = bool(crop[1, 16, 17] < middle[1])
            top = int(middle[0]) - 1 + 4 - 16
            left = int(middle[1]) - 1 + 4 - (15 if flipped else 16)
            expected = padded[:, top : top + 32, left : left + 32]
            assert torch.equal(crop, expected.flip(2) if flipped else expected)
            seen[top, left, flipped] += 1
    assert len(seen) == 9 * 9 * 2
    # 8,100 draws over 162 outcomes: 50 each; the bound is 5.7 standard deviations of the Poisson distribution.
    assert all(10 <= count <= 90 for count in seen.values()), seen


def test_digits_are_not_flipped(digits):
    batches = data.TrainBatches(replace(coordinates(), horizontal_flip=False), 900, 0, CPU)
    for inputs, _ in batches.epoch("a", 0):
        assert (inputs[:, 1, 16, 17] > inputs[:, 1, 16, 16]).all()
    assert not digits.horizontal_flip


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    batches = data.TrainBatches(numbers(50), 16, 0, CPU)
    keys = ("a", 0), ("a", 1), ("b", 0)
    orders = [torch.cat([labels for _, labels in batches.epoch(*key)]) for key in keys]
    assert all(order.sort().values.tolist() == list(range(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3
    other = data.TrainBatches(numbers(50), 16, 1, CPU)
    assert not torch.equal(torch.cat([labels for _, labels in other.epoch("a", 0)]), orders[0])
    assert len(batches) == 4
    assert [len(labels) for _, labels in batches.epoch("a", 0)] == [16, 16, 16, 2]


def test_an_epoch_continues_from_any_batch_to_the_same_bits(digits, monkeypatch):
    batches = data.TrainBatches(digits, 100, 0, CPU)
    whole = list(batches.epoch("a", 3))
    assert len(whole) == len(batches) == 15
    for at_once in data.CROPPED_AT_ONCE, 1, 250 * 16 * 16 * 3:  # all, one batch, and two
        monkeypatch.setattr(data, "CROPPED_AT_ONCE", at_once)
        for first in 0, 1, 7, 14, 15:
            rest = list(batches.epoch("a", 3, first))
            assert len(rest) == 15 - first
            for (inputs, labels), (others, same) in zip(rest, whole[first:], strict=True):
                assert torch.equal(inputs, others) and torch.equal(labels, same)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_on_the_same_crops(digits):
    ours, theirs = (data.TrainBatches(digits, 100, 0, device).epoch("a", 0) for device in (CPU, torch.device("cuda")))
    for (inputs, labels), (others, same) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(others.cpu(), inputs, rtol=1e-5, atol=1e-5)
        assert torch.equal(same.cpu(), labels)


@pytest.mark.parametrize(("size", "batch"), [(16, 512), (32, 128), (1024, 1)])
def test_a_batch_to_measure_holds_the_same_number_of_pixels_at_any_size(size, batch):
    split = data.Split(torch.zeros(1, size, size, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    assert data.TestBatches(split, [0.5] * 3, [0.5] * 3, CPU).batch_size == batch


def test_images_to_measure_come_normalized_and_in_their_order(digits):
    batches = data.TestBatches(digits.test, [0.1, 0.2, 0.3], [0.5, 0.25, 1.0], CPU)
    batches.batch_size = 100
    found = list(batches)
    assert [len(labels) for _, labels in found] == [100, 100, 100, 60]
    inputs = torch.cat([inputs for inputs, _ in found])
    assert (inputs.shape, inputs.dtype) == ((360, 3, 16, 16), torch.float32)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each, _ in found)
    assert torch.equal(torch.cat([labels for _, labels in found]), digits.test.labels)
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.25), (0.3, 1.0))):
        expected = (digits.test.images[..., channel].double() / 255 - mean) / std
        torch.testing.assert_close(inputs[:, channel].double(), expected, rtol=1e-5, atol=1e-6)


def test_mean_and_standard_deviation_are_those_of_the_training_images(digits):
    mean, std = digits.mean_and_std()
    pixels = digits.train.images.double() / 255
    assert mean == pixels.mean((0, 1, 2)).float().tolist()
    assert std == pytest.approx(pixels.std((0, 1, 2), correction=0).tolist(), rel=1e-7)
    assert all(type(value) is float for value in mean + std)


def test_a_constant_channel_has_a_standard_deviation_of_one_level():
    assert numbers(2).mean_and_std() == ([0.0] * 3, torch.full((3,), 1 / 255).tolist())


# --- Data sets -----------------------------------------------------------------------------------------------------


def test_digits_are_the_real_ones_split_in_proportion():
    images = data.load("digits", NOWHERE, 32)
    assert images.train.images.shape == (1437, 32, 32, 3)
    assert images.test.images.shape == (360, 32, 32, 3)
    assert images.train.images.max() == 255
    assert min(Counter(images.test.labels.tolist()).values()) >= 34
    assert images.classes == [str(digit) for digit in range(10)]
    assert images.summary() == "digits: 1,437 training and 360 test images of 10 classes"


def test_held_out_images_are_training_images_that_are_not_trained_on(digits):
    part = data.load("digits", NOWHERE, 16, 0.25)
    assert (len(part.train.labels), len(part.test.labels)) == (1437 - 359, 359)
    assert part.summary() == "digits: 1,078 training and 359 held-out training images of 10 classes"
    assert part.test_identity != digits.test_identity

    def pictures(*splits: data.Split) -> Counter:
        return Counter(
            (image.numpy().tobytes(), int(label)) for s in splits for image, label in zip(s.images, s.labels)
        )

    assert pictures(part.train, part.test) == pictures(digits.train)
    assert not pictures(part.test) & pictures(digits.test)
    again = data.load("digits", NOWHERE, 16, 0.25)
    assert torch.equal(again.test.images, part.test.images) and torch.equal(again.train.labels, part.train.labels)


@pytest.mark.parametrize("fraction", [1e-5, 0.9999])
def test_a_fraction_that_leaves_no_images_on_one_side_is_refused(fraction):
    message = f"^argument --val-fraction: {fraction} of 1437 images leaves none on one side$"
    with pytest.raises(utils.Failure, match=message):
        data.load("digits", NOWHERE, 16, fraction)


def test_no_file_decides_which_folder_is_read(tmp_path):
    args = argparse.Namespace(dataset=None, data_dir=NOWHERE, image_size=None, val_fraction=None)
    settings = {"dataset": str(write_images(tmp_path / "x", train=3, test=2)), "image_size": 16}
    with pytest.raises(utils.Failure, match="name it with --dataset"):
        data.of_checkpoints(args, {Path("x.pth"): {"settings": settings}})


# --- The images of a checkpoint ------------------------------------------------------------------------------------


def arguments(**changes) -> argparse.Namespace:
    nothing = {"dataset": None, "data_dir": NOWHERE, "image_size": None, "val_fraction": None, "mean": None}
    return argparse.Namespace(**nothing | changes)


def checkpoint(images: data.Dataset, **settings) -> dict:
    """As main.py writes it, as far as it concerns images."""
    mean, std = images.mean_and_std()
    size = images.train.images.shape[1]
    settings = {"dataset": images.identity, "image_size": size, "val_fraction": images.val_fraction} | settings
    net = {"linear.bias": torch.zeros(len(images.classes))}
    own = {"settings": settings, "mean": mean, "std": std, "test_images": images.test_identity}
    return {"arch": "resnet20", "net": net} | own


def foreign(checkpoint: dict) -> dict:
    """As another program writes it."""
    return {name: checkpoint[name] for name in ("arch", "net")}


FILE = Path("x.pth")


def test_images_are_by_default_those_of_the_checkpoints(digits):
    found = data.of_checkpoints(arguments(), {FILE: checkpoint(digits)})
    assert torch.equal(found.test.images, digits.test.images)
    data.check(FILE, checkpoint(digits), found)
    larger = data.of_checkpoints(arguments(image_size=20), {FILE: checkpoint(digits)})
    assert larger.test.images.shape == (360, 20, 20, 3)
    with pytest.raises(utils.Failure, match=r"x.pth was made with other images: image_size 16 there, 20 asked$"):
        data.check(FILE, checkpoint(digits), larger)
    with pytest.raises(utils.Failure, match="were made with a folder of images: name it with --dataset"):
        data.of_checkpoints(arguments(), {FILE: checkpoint(digits, dataset="folder 0123456789abcdef")})


def test_networks_tuned_on_held_out_images_are_measured_on_them_unless_asked_otherwise():
    part = data.load("digits", NOWHERE, 16, 0.25)
    found = data.of_checkpoints(arguments(), {FILE: checkpoint(part)})
    assert torch.equal(found.test.images, part.test.images) and found.held_out_scores
    data.check(FILE, checkpoint(part), found)
    tested = data.of_checkpoints(arguments(val_fraction=0.0), {FILE: checkpoint(part)})
    assert len(tested.test.labels) == 360 and not tested.held_out_scores
    data.check(FILE, checkpoint(part), tested)
    old = {name: value for name, value in checkpoint(part).items() if name not in ("mean", "std")}
    tested = data.of_checkpoints(arguments(val_fraction=0.0), {FILE: old})
    assert len(tested.test.labels) == 360 and not tested.held_out_scores
    assert tested.mean_and_std() == part.mean_and_std() != data.load("digits", NOWHERE, 16).mean_and_std()
    data.check(FILE, old, tested)


def test_training_images_are_read_only_where_a_checkpoint_needs_them(tmp_path):
    folder = write_images(tmp_path / "x", train=3, test=2)
    whole = data.load(str(folder), NOWHERE, 16)
    new, old = checkpoint(whole), foreign(checkpoint(whole)) | {"acc": 50.0}
    both = arguments(dataset=str(folder), image_size=16)
    assert data.of_checkpoints(both, {FILE: new, Path("y.pth"): old}).train is not None
    shutil.rmtree(folder / "train")
    found = data.of_checkpoints(arguments(dataset=str(folder)), {FILE: new})
    assert found.train is None
    data.check(FILE, new, found)
    with pytest.raises(utils.Failure, match=r"x.pth was made with other images: test_images folder .* there, folder"):
        data.check(FILE, new | {"test_images": "folder 0123456789abcdef"}, found)
    with pytest.raises(utils.Failure, match="has no folder train/"):
        data.of_checkpoints(both, {FILE: old})


def test_a_network_of_other_classes_or_images_is_refused(digits):
    with pytest.raises(utils.Failure, match=r"^x.pth has 3 outputs, and digits has 10 classes$"):
        data.check(FILE, {"arch": "resnet20", "net": {"linear.bias": torch.zeros(3)}}, digits)
    with pytest.raises(utils.Failure, match=r"other images: val_fraction 0.25 there, 0.0 asked, dataset mine there"):
        data.check(FILE, checkpoint(digits, val_fraction=0.25, dataset="mine"), digits)
    data.check(FILE, foreign(checkpoint(digits)), digits)  # a file of another program says nothing


def test_images_are_normalized_by_the_constants_of_the_checkpoint(digits):
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 1.0]}
    for saved, (mean, std) in (own, own.values()), ({}, digits.mean_and_std()):
        batches = data.test_batches(saved, digits, CPU)
        assert torch.equal(batches.mean, torch.tensor(mean)) and torch.equal(batches.std, torch.tensor(std))
        assert batches.images is digits.test.images
