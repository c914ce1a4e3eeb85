"""Images in, batches out; and every way in which images can be missing or broken."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_images
from PIL import Image

import data
import utils

CPU = torch.device("cpu")


def coordinates(size: int = 32) -> data.Dataset:
    """One image whose pixel at row y and column x is (y + 1, x + 1, 7): every crop says where it came from."""
    rows, columns = torch.meshgrid(torch.arange(size) + 1, torch.arange(size) + 1, indexing="ij")
    image = torch.stack([rows, columns, torch.full_like(rows, 7)], -1).to(torch.uint8)
    split = data.Split(image.repeat(8100, 1, 1, 1), torch.zeros(8100, dtype=torch.long))
    return data.Dataset("coordinates", "", ["a", "b"], split, split)


def test_augmentation_is_random_crop_of_padded_images_and_mirroring():
    images = coordinates()
    batches = data.TrainBatches(images, 900, 0, CPU)
    padded = F.pad(images.train.images[0].permute(2, 0, 1), (4, 4, 4, 4))
    seen = Counter()
    for inputs, _ in batches.epoch("a", 0):
        pixels = (inputs * batches.std[:, None, None] + batches.mean[:, None, None]) * 255
        for crop in pixels.round().to(torch.uint8):
            middle = crop[:, 16, 16]  # never padding: its values are row and column of the original image
            mirrored = bool(crop[1, 16, 17] < middle[1])
            top = int(middle[0]) - 1 + 4 - 16
            left = int(middle[1]) - 1 + 4 - (15 if mirrored else 16)
            expected = padded[:, top : top + 32, left : left + 32]
            assert torch.equal(crop, expected.flip(2) if mirrored else expected)
            seen[top, left, mirrored] += 1
    assert len(seen) == 9 * 9 * 2
    # 8,100 draws over 162 outcomes: 50 each; the bound is 5.7 standard deviations of the Poisson distribution.
    assert all(10 <= count <= 90 for count in seen.values()), seen


def test_digits_are_not_mirrored():
    images = coordinates()
    batches = data.TrainBatches(data.Dataset("x", "", ["a", "b"], images.train, images.test, mirror=False), 900, 0, CPU)
    for inputs, _ in batches.epoch("a", 0):
        assert (inputs[:, 1, 16, 17] > inputs[:, 1, 16, 16]).all()
    assert not data.load("digits", Path("unused"), 16).mirror


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    split = data.Split(torch.zeros(50, 16, 16, 3, dtype=torch.uint8), torch.arange(50))
    images = data.Dataset("numbers", "", [str(i) for i in range(50)], split, split)
    batches = data.TrainBatches(images, 16, 0, CPU)
    orders = {key: torch.cat([labels for _, labels in batches.epoch(*key)]) for key in (("a", 0), ("a", 1), ("b", 0))}
    assert all(torch.equal(order.sort().values, split.labels) for order in orders.values())
    assert len({tuple(order.tolist()) for order in orders.values()}) == 3
    again = torch.cat([labels for _, labels in batches.epoch("a", 1)])
    assert torch.equal(again, orders["a", 1])
    assert len(batches) == 4
    rest = torch.cat([labels for _, labels in batches.epoch("a", 1, first=3)])
    assert torch.equal(rest, again[48:])


def test_mean_and_deviation_are_those_of_the_training_images():
    images = data.load("digits", Path("unused"), 16)
    mean, std = images.mean_and_std()
    pixels = images.train.images.double() / 255
    torch.testing.assert_close(mean, pixels.mean((0, 1, 2)).float())
    torch.testing.assert_close(std, pixels.std((0, 1, 2), correction=0).float())
    inputs = torch.cat([inputs for inputs, _ in data.TestBatches(images, CPU)])
    assert inputs.shape == (360, 3, 16, 16)
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_digits_are_the_real_ones_split_in_proportion():
    images = data.load("digits", Path("unused"), 32)
    assert images.train.images.shape == (1437, 32, 32, 3)
    assert images.test.images.shape == (360, 32, 32, 3)
    assert images.train.images.max() == 255
    assert min(Counter(images.test.labels.tolist()).values()) >= 34


def test_a_folder_of_mixed_images_becomes_rgb_of_one_size(images):
    loaded = data.load(str(images), Path("unused"), 16)
    assert loaded.name == "shades"
    assert loaded.classes == ["dark", "light"]
    assert loaded.train.images.shape == (80, 16, 16, 3)
    assert loaded.train.images.dtype == torch.uint8
    assert loaded.test.labels.tolist() == [0] * 11 + [1] * 11
    grey = loaded.train.images[0]  # image 0 is grey and 20x24
    assert torch.equal(grey[..., 0], grey[..., 2])


def test_grey_images_of_16_bits_keep_their_range(tmp_path):
    pixels = np.full((16, 16), 0x8000, np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert set(data._read([str(tmp_path / "a.png")], 16)[0].flatten().tolist()) == {128}


def test_held_out_images_are_training_images_that_are_not_trained_on():
    whole, part = (data.load("digits", Path("unused"), 16, fraction) for fraction in (0.0, 0.25))
    assert (len(part.train.labels), len(part.test.labels)) == (1437 - 359, 359)

    def pictures(*splits: data.Split) -> Counter:
        return Counter(image.numpy().tobytes() for split in splits for image in split.images)

    assert pictures(part.train, part.test) == pictures(whole.train)
    assert not pictures(part.test) & pictures(whole.test)
    again = data.load("digits", Path("unused"), 16, 0.25)
    assert torch.equal(again.test.labels, part.test.labels)
    with pytest.raises(utils.Failure, match="--val-fraction"):
        data.load("digits", Path("unused"), 16, 1e-5)


def test_a_folder_is_known_by_its_files_wherever_it_is(tmp_path):
    one = data.load(str(write_images(tmp_path / "1" / "x")), Path("unused"), 16)
    changed = write_images(tmp_path / "2" / "x") / "train" / "dark" / "1.png"
    Image.new("RGB", (16, 16), "red").save(changed)
    two = data.load(str(tmp_path / "2" / "x"), Path("unused"), 16)
    assert one.name == two.name
    assert one.identity != two.identity
    shutil.move(tmp_path / "1" / "x", tmp_path / "y")
    assert data.load(str(tmp_path / "y"), Path("unused"), 16).identity == one.identity


def test_hidden_files_and_folders_are_not_images(tmp_path):
    folder = write_images(tmp_path / "x", train=3, test=2)
    for part in "train", "test":
        shutil.copytree(folder / part / "light", folder / part / ".ipynb_checkpoints")
        shutil.copytree(folder / part / "light", folder / part / "dark" / ".ipynb_checkpoints")
        (folder / part / "light" / "._0.png").write_text("not an image")
    loaded = data.load(str(folder), Path("unused"), 16)
    assert loaded.classes == ["dark", "light"]
    assert (len(loaded.train.labels), len(loaded.test.labels)) == (6, 4)


def broken(folder: Path, how: str) -> None:
    image = folder / "train" / "dark" / "1.png"
    if how == "no test":
        shutil.rmtree(folder / "test")
    elif how == "other classes":
        (folder / "test" / "light").rename(folder / "test" / "bright")
    elif how == "one class":
        shutil.rmtree(folder / "train" / "light")
        shutil.rmtree(folder / "test" / "light")
    elif how == "empty class":
        shutil.rmtree(folder / "train" / "light")
        (folder / "train" / "light").mkdir()
    elif how == "truncated image":
        image.write_bytes(image.read_bytes()[:200])
    elif how == "dangling link":
        image.unlink()
        image.symlink_to("nowhere.png")
    elif how == "not an image":
        image.write_text("hello")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no test", "has no folder test/"),
        ("other classes", "classes in only one of train/ and test/: bright, light"),
        ("one class", "one class only, dark"),
        ("empty class", "light"),
        ("truncated image", "train/dark/1.png cannot be read"),
        ("dangling link", "train/dark/1.png cannot be read"),
        ("not an image", "train/dark/1.png cannot be read"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path, how, message):
    folder = write_images(tmp_path / "x", train=3, test=2)
    broken(folder, how)
    with pytest.raises(utils.Failure) as failure:
        data.load(str(folder), Path("unused"), 16)
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_args, **_more):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(utils.Failure) as failure:
        data.load("cifar10", tmp_path / "data", 32)
    for word in (str(tmp_path / "data"), "cifar-10-python.tar.gz", "--dataset FOLDER", "digits", "no network"):
        assert word in str(failure.value)
    assert not (tmp_path / "data").exists()
