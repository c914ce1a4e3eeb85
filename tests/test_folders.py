"""Folders of images: what is read, what is left out, what is refused, what is warned of."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, call, succeed, write_images
from PIL import Image

import data
import memory
import utils
from images import pixels

NOWHERE = Path("unused")


def test_a_folder_of_mixed_images_becomes_rgb_of_one_size(images):
    loaded = data.load(str(images), NOWHERE, 16)
    assert loaded.name == "shades"
    assert loaded.classes == ["dark", "light"]
    assert loaded.train.images.shape == (80, 16, 16, 3)
    assert loaded.train.images.dtype == torch.uint8
    assert loaded.test.labels.tolist() == [0] * 11 + [1] * 11
    grey = loaded.train.images[0]  # image 0 is grey and 20x24
    assert torch.equal(grey[..., 0], grey[..., 2])
    assert loaded.summary() == "shades: 80 training and 22 test images of 2 classes"


def test_a_folder_can_be_measured_without_its_training_images(tmp_path):
    folder = write_images(tmp_path / "x", train=3, test=2)
    whole = data.load(str(folder), NOWHERE, 16)
    shutil.rmtree(folder / "train")
    alone = data.load(str(folder), NOWHERE, 16, train=False)
    assert torch.equal(alone.test.images, whole.test.images)
    assert (alone.classes, alone.test_identity) == (whole.classes, whole.test_identity)
    assert (alone.train, alone.identity) == (None, "")
    with pytest.raises(utils.Failure, match=r"^x was read without its training images$"):
        alone.mean_and_std()
    for more in {}, {"val_fraction": 0.5, "train": False}:
        with pytest.raises(utils.Failure, match="has no folder train/"):
            data.load(str(folder), NOWHERE, 16, **more)


def test_a_folder_is_identified_by_its_files_wherever_it_is(tmp_path):
    one = data.load(str(write_images(tmp_path / "1" / "x", train=3, test=2)), NOWHERE, 16)
    changed = write_images(tmp_path / "2" / "x", train=3, test=2) / "train" / "dark" / "1.png"
    Image.new("RGB", (16, 16), "red").save(changed)
    two = data.load(str(tmp_path / "2" / "x"), NOWHERE, 16)
    assert one.name == two.name
    assert one.identity != two.identity
    assert one.test_identity == two.test_identity
    (tmp_path / "2" / "x" / "test" / "dark" / "0.png").rename(tmp_path / "2" / "x" / "test" / "dark" / "a.png")
    assert data.load(str(tmp_path / "2" / "x"), NOWHERE, 16).test_identity != one.test_identity
    shutil.move(tmp_path / "1" / "x", tmp_path / "y")
    moved = data.load(str(tmp_path / "y"), NOWHERE, 16)
    assert (moved.identity, moved.test_identity) == (one.identity, one.test_identity)


def test_hidden_files_and_files_that_are_not_images_are_left_out_and_named(tmp_path):
    folder = write_images(tmp_path / "x", train=3, test=2)
    whole = data.load(str(folder), NOWHERE, 16)
    for part in "train", "test":  # 3 hidden entries in each
        shutil.copytree(folder / part / "light", folder / part / ".ipynb_checkpoints")
        shutil.copytree(folder / part / "light", folder / part / "dark" / ".ipynb_checkpoints")
        (folder / part / "light" / "._0.png").write_text("not an image")
    loaded = data.load(str(folder), NOWHERE, 16)
    assert loaded.summary() == ("x: 6 training and 4 test images of 2 classes; left out: 6 hidden items")
    (folder / "train" / "notes.txt").write_text("between the classes")
    (folder / "test" / "light" / "Thumbs.db").write_text("among the images")
    loaded = data.load(str(folder), NOWHERE, 16)
    assert loaded.summary() == (
        "x: 6 training and 4 test images of 2 classes; left out: 6 hidden items, "
        "2 files without the ending of an image, such as notes.txt"
    )
    assert loaded.classes == ["dark", "light"]
    assert loaded.identity == whole.identity


def test_images_in_folders_below_a_class_belong_to_it(tmp_path):
    folder = write_images(tmp_path / "x", train=3, test=2)
    (folder / "train" / "dark" / "below").mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "train" / "dark" / "below" / "A.JPEG")
    assert data.load(str(folder), NOWHERE, 16).train.labels.tolist() == [0] * 4 + [1] * 3


# --- Images that cannot be used ------------------------------------------------------------------------------------


def broken(folder: Path, how: str) -> None:
    image = folder / "train" / "dark" / "1.png"
    if how == "no test":
        shutil.rmtree(folder / "test")
    elif how == "no classes":
        shutil.rmtree(folder / "test")
        (folder / "test").mkdir()
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
    elif how == "PostScript":  # Pillow would start Ghostscript for it
        image.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n")
    elif how == "pipe":
        image.unlink()
        os.mkfifo(image)
    elif how == "endless":
        image.unlink()
        image.symlink_to("/dev/zero")
    elif how == "loop":
        (folder / "train" / "dark" / "again").symlink_to(folder / "train" / "dark")
    elif how == "not a number":
        Image.fromarray(np.full((16, 16), np.nan, np.float32)).save(folder / "train" / "dark" / "a.tiff")
    elif how == "other formats":
        for file in (folder / "train" / "light").iterdir():
            file.rename(file.with_suffix(".heic"))
    elif how == "flat":
        shutil.rmtree(folder / "test")
        (folder / "test").mkdir()
        shutil.copy(image, folder / "test")
    elif how == "validation":
        (folder / "test").rename(folder / "Val")
    elif how == "training":
        (folder / "train").rename(folder / "training")
    elif how == "deeper":
        (folder / "all").mkdir()
        for part in "train", "test":
            (folder / part).rename(folder / "all" / part)
    elif how == "classes only":
        for name in "dark", "light":
            (folder / "train" / name).rename(folder / name)
        shutil.rmtree(folder / "train")
        shutil.rmtree(folder / "test")
    elif how == "nested":
        for part in "train", "test":
            (folder / part).rename(folder / "x")
            (folder / part).mkdir()
            (folder / "x").rename(folder / part / part)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no test", "has no folder test/: it needs train/<class>/ and test/<class>/ with images; it has train/"),
        ("validation", "with images; it has Val/: rename that to test/ if it holds the images to test with"),
        ("training", "with images; it has training/: rename that to train/ if it holds the images to train with"),
        ("deeper", "/x/all looks like it: --dataset "),
        ("classes only", "if dark, light are classes, split the images of each into train/<class>/ and test/<class>/"),
        (
            "nested",
            "train has only the class train: training needs two or more; dark, light in it look like classes: move",
        ),
        ("flat", "test has no class folders, only files such as 1.png: it needs a folder of images for each class"),
        (
            "other formats",
            "train/light has no images that can be read here (.jpg, .png, .webp, ...), only 3 such as 2.heic",
        ),
        ("no classes", "test has no class folders"),
        ("other classes", "has classes in only one of train/ and test/: bright, light"),
        ("one class", "has only the class dark: training needs two or more"),
        ("empty class", "train/light has no images that can be read here (.jpg, "),
        ("truncated image", "train/dark/1.png cannot be read as an image: "),
        ("dangling link", "train/dark/1.png cannot be read as an image: "),
        ("not an image", "train/dark/1.png cannot be read as an image: cannot identify image file"),
        ("PostScript", "train/dark/1.png cannot be read as an image: cannot identify image file"),
        ("pipe", "train/dark/1.png cannot be read as an image: it is not a regular file"),
        ("endless", "train/dark/1.png cannot be read as an image: it is not a regular file"),
        ("loop", "train/dark/again leads back to "),
        ("not a number", "train/dark/a.tiff cannot be read as an image: it has values that are not finite"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path, how, message):
    folder = write_images(tmp_path / "x", train=3, test=2)
    broken(folder, how)
    with pytest.raises(utils.Failure) as failure:
        data.load(str(folder), NOWHERE, 16)
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


def test_an_image_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "x", train=3, test=2)
    monkeypatch.setattr(pixels, "LARGEST_FILE", 10)
    with pytest.raises(utils.Failure, match=r"cannot be read as an image: it is larger than 10 bytes"):
        data.load(str(folder), NOWHERE, 16)


def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "x", train=3, test=2)
    # 10 images, and 6 of them again with 4 pixels more on each side.
    needed = 3 * (10 * 64**2 + 6 * 72**2)
    monkeypatch.setattr(memory, "available", lambda: needed)
    data.load(str(folder), NOWHERE, 64)
    monkeypatch.setattr(memory, "available", lambda: needed - 1)
    monkeypatch.setattr(pixels, "read_file", None)
    with pytest.raises(utils.Failure) as failure:
        data.load(str(folder), NOWHERE, 64)
    line = "10 images of --image-size 64 need 216,192 bytes of memory, and 216,191 are left: try a smaller --image-size"
    assert str(failure.value) == line


def test_several_broken_files_are_named_at_once(tmp_path):
    folder = write_images(tmp_path / "x", train=3, test=2)
    for number in range(7):
        (folder / ("train" if number < 3 else "test") / "dark" / f"broken{number}.png").write_text("hello")
    with pytest.raises(utils.Failure) as failure:
        data.load(str(folder), NOWHERE, 16)
    names = [f"/broken{number}.png cannot be read as an image: cannot identify image file" for number in range(5)]
    assert all(name in str(failure.value) for name in names) and "broken5" not in str(failure.value)
    assert str(failure.value).endswith("; and 2 more")


# --- What a folder may be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_in_place_of_the_folder_is_answered_by_the_folder(tmp_path, part):
    folder = write_images(tmp_path / "x", train=3, test=2)
    with pytest.raises(utils.Failure, match=rf"; {folder} has both: --dataset {folder}$"):
        data.load(str(folder / part), NOWHERE, 16)


def test_what_systems_and_people_leave_beside_images_is_left_out(tmp_path):
    folder = write_images(tmp_path / "x", train=3, test=2)
    whole = data.load(str(folder), NOWHERE, 16)
    for place in folder, folder / "train", folder / "test" / "dark":
        (place / "__MACOSX").mkdir()
        (place / "__MACOSX" / "._0.png").write_text("not an image")
        (place / ".DS_Store").write_text("")
    (folder / "labels.csv").write_text("")
    (folder / "train" / "dark" / "3.HEIC").write_text("")
    shutil.copytree(folder / "test", folder / "val")
    loaded = data.load(str(folder), NOWHERE, 16)
    assert loaded.summary() == (
        "x: 6 training and 4 test images of 2 classes; left out: 4 hidden items, "
        "1 image in a format that is not read here, such as 3.HEIC, val/ beside train/ and test/"
    )
    assert loaded.identity == whole.identity


def test_a_folder_without_peculiarities_has_no_settings_and_no_warnings(images):
    loaded = data.load(str(images), NOWHERE, 16)
    assert (loaded.settings, loaded.warnings, loaded.left_out, loaded.rendering) == ({}, (), "", "")


def test_large_letters_in_endings_and_several_formats_are_read(tmp_path):
    folder = write_images(tmp_path / "x", train=3, test=2)
    for suffix in "JPG", "jfif", "Tga", "mpo":
        Image.new("RGB", (20, 10), "red").save(folder / "train" / "dark" / f"a.{suffix}")
    assert len(data.load(str(folder), NOWHERE, 16).train.labels) == 10


# --- What ruins a data set -----------------------------------------------------------------------------------------


def test_images_of_one_color_are_reported(tmp_path):
    folder = write_images(tmp_path / "x", train=3, test=2)
    for name in "a", "b":
        Image.new("RGB", (30, 20), "red").save(folder / "test" / "dark" / f"{name}.bmp")
    (warning,) = data.load(str(folder), NOWHERE, 16).warnings
    assert warning == f"2 images of one single color, such as {folder}/test/dark/a.bmp"


def test_a_file_in_two_classes_is_reported(tmp_path):
    folder = write_images(tmp_path / "x", train=3, test=2)
    shutil.copy(folder / "train" / "dark" / "1.png", folder / "train" / "light" / "again.png")
    shutil.copy(folder / "train" / "dark" / "1.png", folder / "train" / "dark" / "2.png")  # in one class: harmless
    (warning,) = data.load(str(folder), NOWHERE, 16).warnings
    files = f"{folder}/train/dark/1.png, which equals {folder}/train/light/again.png"
    assert warning == f"1 image in two classes, such as {files}"


def test_a_class_that_is_a_link_to_another_is_reported(tmp_path):
    folder = write_images(tmp_path / "x", train=3, test=2)
    shutil.rmtree(folder / "train" / "light")
    (folder / "train" / "light").symlink_to("dark")
    first, second = data.load(str(folder), NOWHERE, 16).warnings
    assert first == "the class light of train/ is the same folder as the class dark"
    assert second.startswith("3 images in two classes, such as ")


def test_test_images_that_are_training_images_are_reported(tmp_path):
    folder = write_images(tmp_path / "x", train=3, test=2)
    shutil.rmtree(folder / "test")
    (folder / "test").symlink_to("train")
    loaded = data.load(str(folder), NOWHERE, 16)
    assert loaded.summary().endswith(
        f"2 classes\nwarning: 6 test images that the training images have, too, such as {folder}/test/dark/0.png"
    )


# --- Names ---------------------------------------------------------------------------------------------------------

NAMES = [os.fsdecode(b"caf\xe9"), "$l_{\n" + "\u05e9\u05dc"]


@pytest.mark.skipif(os.name != "posix", reason="other systems refuse such names")
def test_names_may_be_any_bytes(tmp_path):
    place = tmp_path / os.fsdecode(b"\xff")
    folder = write_images(place, train=1, test=1, classes=(NAMES[0], NAMES[1]))
    (folder / "train" / NAMES[0] / os.fsdecode(b"\xfe.txt")).write_text("")
    loaded = data.load(str(folder), NOWHERE, 16)
    assert loaded.classes == sorted(NAMES)
    assert loaded.summary() == (
        "\\udcff: 2 training and 2 test images of 2 classes; "
        "left out: 1 file without the ending of an image, such as \\udcfe.txt"
    )
    (folder / "train" / NAMES[0] / os.fsdecode(b"\xfd.png")).write_text("")
    with pytest.raises(utils.Failure, match=r"/caf\\udce9/\\udcfd.png cannot be read as an image"):
        data.load(str(folder), NOWHERE, 16)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="other systems refuse such names")
def test_commands_run_on_such_names_and_on_images_of_any_kind(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda _, text, **more: titles.append((text, more)))
    folder = write_images(tmp_path / os.fsdecode(b"\xff") / ("$x_{1$\n" + "y" * 150), train=20, test=6, classes=NAMES)
    for index, path in enumerate(sorted(folder.rglob("*.png"))):  # 12-bit grey, and black ink on nothing
        grey = Image.open(path).convert("L")
        deep = Image.fromarray(np.asarray(grey, np.uint16) * 16)
        ink = Image.merge("LA", (Image.new("L", grey.size), grey))
        (deep if index % 2 else ink).save(path)
    place = ("--dataset", folder, "--checkpoint-dir", tmp_path / os.fsdecode(b"c\xfd"))
    command = ("main.py", *SMALL, *place, "--epochs", "1", "--retrain-epochs", "1", "-pr", "0.5", "-shot", "single")
    assert "transparency on white" in succeed(*command, "--no-flip")
    done = call(*command)
    assert done.returncode == 2 and "horizontal_flip" in done.stderr
    shutil.rmtree(folder / "train")
    assert "50percent_single_ckpt.pth" in succeed("test.py", *place, "--device", "cpu")  # it compares accuracies
    ((title, more),) = titles
    assert title.startswith("resnet20 on $x_{1$\\nyyy") and len(title) == 90 and more == {"parse_math": False}


# --- Mirroring -----------------------------------------------------------------------------------------------------


def test_a_folder_is_mirrored_unless_the_command_line_says_no(images):
    assert data.load(str(images), NOWHERE, 16).horizontal_flip
    straight = data.load(str(images), NOWHERE, 16, flip=False)
    assert not straight.horizontal_flip and straight.settings == {"horizontal_flip": False}


def test_digits_have_no_such_setting_because_they_are_never_mirrored():
    assert data.load("digits", NOWHERE, 16, flip=False).settings == data.load("digits", NOWHERE, 16).settings == {}
