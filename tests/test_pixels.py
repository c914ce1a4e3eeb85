"""Image files become pixels that do not depend on how they were stored."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

import data
import utils
from images import pixels

NOWHERE = Path("unused")
TRAIN, TEST = 12, 6
DEEP = ("uint16 PNG", "uint16 TIFF", "int32 TIFF", "big-endian TIFF", "float TIFF", "shifted int32 TIFF")


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """(18, 8, 8) handwritten digits, 0 to 16."""
    from sklearn.datasets import load_digits

    return load_digits().images[: TRAIN + TEST]


def plain(levels: np.ndarray) -> np.ndarray:
    return np.rint(levels * (255 / 16)).astype(np.uint8)


def picture(levels: np.ndarray, form: str) -> Image.Image:
    """A digit, bright on dark, as people store it."""
    grey = plain(levels)
    black, white, clear = np.zeros_like(grey), np.full_like(grey, 255), 255 - grey
    stacks = {
        "white ink, RGBA": [white, white, white, grey],
        "black ink, RGBA": [black, black, black, grey],
        "white ink, LA": [white, grey],
        "black ink, LA": [black, grey],
        "opaque RGBA": [grey, grey, grey, white],
        "RGB": [grey, grey, grey],
    }
    if form in stacks:
        return Image.fromarray(np.stack(stacks[form], -1))
    if form == "white ink, palette":  # index 0 is clear, and red where it is not
        image = Image.fromarray(grey, "P")
        image.putpalette([255, 0, 0, *(value for level in range(1, 256) for value in [level] * 3)])
        image.info["transparency"] = bytes([0] + [255] * 255)
        return image
    return {
        "8 bits": lambda: Image.fromarray(grey),
        "inverted": lambda: Image.fromarray(clear),
        "uint16 PNG": lambda: Image.fromarray(levels.astype(np.uint16)),
        "uint16 TIFF": lambda: Image.fromarray(levels.astype(np.uint16)),
        "big-endian TIFF": lambda: Image.frombytes("I;16B", (8, 8), levels.astype(">u2").tobytes()),
        "int32 TIFF": lambda: Image.fromarray(levels.astype(np.int32)),
        "shifted int32 TIFF": lambda: Image.fromarray(70_000 + levels.astype(np.int32) * 10),
        "float TIFF": lambda: Image.fromarray((levels / 16 - 0.5).astype(np.float32)),
    }[form]()


def write(folder: Path, digits: np.ndarray, form: str) -> Path:
    suffix = ".tiff" if form.endswith("TIFF") else ".png"
    for index, levels in enumerate(digits):
        place = folder / ("train" if index < TRAIN else "test") / "ab"[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        image = picture(levels, form)
        transparency = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
        image.save(place / f"{index:02}{suffix}", **transparency)
    return folder


def load(folder: Path, size: int = 16, **more) -> data.Dataset:
    return data.load(str(folder), NOWHERE, size, **more)


def settings_of(loaded: data.Dataset) -> pixels.Rendering:
    return pixels.Rendering.of(loaded.settings)


# --- Grey of more than 8 bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", DEEP)
def test_deep_grey_is_scaled_by_the_range_of_the_training_images(tmp_path, digits, form):
    digits = digits.copy()
    digits[3] = digits[3].clip(0, 4)  # a dark image stays dark
    expected = load(write(tmp_path / "plain", digits, "8 bits"))
    loaded = load(write(tmp_path / "deep", digits, form))
    assert torch.equal(loaded.train.images, expected.train.images)
    assert torch.equal(loaded.test.images, expected.test.images)
    low, high = {"float TIFF": (-0.5, 0.5), "shifted int32 TIFF": (70_000, 70_160)}.get(form, (0, 16))
    assert f"grey values {low:g} to {high:g} scaled to 8 bits" in loaded.summary()
    assert loaded.settings == {"grey_black": low, "grey_white": high}


def test_test_images_do_not_decide_about_the_range(tmp_path, digits):
    folder = write(tmp_path / "deep", digits, "uint16 PNG")
    Image.fromarray(np.full((8, 8), 60_000, np.uint16)).save(folder / "test" / "a" / "99.png")
    loaded = load(folder)
    assert loaded.settings == {"grey_black": 0.0, "grey_white": 16.0}
    assert loaded.test.images[3].min() == 255


def test_where_no_training_image_is_deep_the_test_images_decide(tmp_path, digits):
    folder = write(tmp_path / "x", digits, "8 bits")
    shutil.rmtree(folder / "test")
    shutil.move(write(tmp_path / "deep", digits, "uint16 PNG") / "test", folder / "test")
    expected = load(write(tmp_path / "plain", digits, "8 bits"))
    assert torch.equal(load(folder).test.images, expected.test.images)


# --- Transparency --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "same", "background"),
    [
        ("white ink, RGBA", "8 bits", "black"),
        ("white ink, LA", "8 bits", "black"),
        ("white ink, palette", "8 bits", "black"),
        ("black ink, RGBA", "inverted", "white"),
        ("black ink, LA", "inverted", "white"),
    ],
)
def test_transparent_images_lie_on_what_their_ink_is_not(tmp_path, digits, form, same, background):
    expected = load(write(tmp_path / "plain", digits, same))
    loaded = load(write(tmp_path / "clear", digits, form))
    assert torch.equal(loaded.train.images, expected.train.images)
    assert torch.equal(loaded.test.images, expected.test.images)
    assert loaded.settings == {"background": background}
    assert loaded.summary().split("\n")[0].endswith(f"of 2 classes; transparency on {background}")


def test_one_background_serves_the_whole_data_set(tmp_path, digits):
    folder = write(tmp_path / "x", digits, "black ink, RGBA")
    white = picture(digits[0], "white ink, RGBA")
    white.save(folder / "train" / "a" / "00.png")
    loaded = load(folder)
    assert loaded.settings == {"background": "white"}
    assert loaded.train.images[0].min() == 255
    assert any(warning.startswith("1 image of one single color") for warning in loaded.warnings)


def test_an_alpha_channel_without_transparency_changes_nothing(tmp_path, digits):
    loaded = load(write(tmp_path / "x", digits, "opaque RGBA"))
    expected = load(write(tmp_path / "plain", digits, "RGB"))
    assert torch.equal(loaded.train.images, expected.train.images)
    assert loaded.settings == {}


def test_a_color_key_is_transparent(tmp_path):
    # One grey value of a PNG without an alpha channel is declared transparent; the ink is the rest.
    key = np.array([[200, 0], [0, 200]], np.uint8).repeat(8, 0).repeat(8, 1)
    for mode, transparency in ("L", 200), ("RGB", (200, 200, 200)):
        path = tmp_path / f"{mode}.png"
        Image.fromarray(key).convert(mode).save(path, transparency=transparency)
        found = pixels.read_images([str(path)], 16)
        assert found.rendering.background == "white"
        assert torch.equal(found.images[0, ..., 0], torch.from_numpy(np.where(key == 200, 255, 0).astype(np.uint8)))


# --- The test images alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["uint16 PNG", "float TIFF", "white ink, RGBA", "black ink, LA", "8 bits"])
def test_test_images_alone_are_the_same_by_the_settings_of_the_checkpoint(tmp_path, digits, form):
    digits = digits.copy()
    digits[TRAIN:] = digits[TRAIN:].clip(2, 9)  # alone they would have another range, and another mean
    folder = write(tmp_path / "x", digits, form)
    whole = load(folder)
    shutil.rmtree(folder / "train")
    alone = load(folder, train=False, rendering=settings_of(whole))
    assert torch.equal(alone.test.images, whole.test.images)
    assert alone.test_identity == whole.test_identity


def test_other_pixels_have_another_identity(tmp_path, digits):
    folder = write(tmp_path / "x", digits, "uint16 PNG")
    before = load(folder)
    first = folder / "train" / "a" / "00.png"
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(first)
    after = load(folder)
    assert before.test_identity != after.test_identity  # the files are the same, and look otherwise
    shutil.copy(folder / "train" / "a" / "02.png", first)
    assert load(folder).test_identity == before.test_identity


@pytest.mark.parametrize(
    "settings",
    [
        {"grey_black": float("nan"), "grey_white": 1.0},
        {"grey_black": -1e308, "grey_white": 1e308},
        {"grey_black": "0", "grey_white": 1.0},
        {"grey_white": 1.0, "background": "red"},
    ],
)
def test_settings_of_another_form_count_as_absent(settings):
    assert pixels.Rendering.of(settings) == pixels.Rendering()


# --- Orientation and formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
def test_images_are_turned_upright(tmp_path, suffix):
    quarters = np.zeros((16, 16, 3), np.uint8)
    quarters[:8, :8], quarters[:8, 8:], quarters[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    upright = Image.fromarray(quarters)
    # Which way the camera's picture lies, by the number in the EXIF standard: what the viewer undoes.
    stored = {
        1: quarters,
        2: quarters[:, ::-1],
        3: quarters[::-1, ::-1],
        4: quarters[::-1],
        5: quarters.transpose(1, 0, 2),
        6: np.rot90(quarters),
        7: quarters[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(quarters, -1),
    }
    for orientation, lying in stored.items():
        exif = Image.Exif()
        exif[pixels.ORIENTATION] = orientation
        path = tmp_path / f"{orientation}{suffix}"
        Image.fromarray(np.ascontiguousarray(lying)).save(path, exif=exif)
        found = pixels.read_images([str(path)], 16).images[0].int()
        assert (found - torch.from_numpy(np.array(upright)).int()).abs()[2:6, 2:6].max() < 60, orientation
        corners = found[[3, 3, 12, 12], [3, 12, 3, 12]]
        assert (corners > 128).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]], orientation


def test_a_damaged_orientation_leaves_the_image_readable(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (16, 16), "red").save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert pixels.read_images([str(path)], 16).images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    "suffix",
    [".jfif", ".avif", ".jp2", ".mpo", ".tga", ".ico", ".dds", ".pcx", ".sgi", ".pbm", ".dib", ".im", ".apng", ".gif"],
)
def test_every_format_that_pillow_decodes_is_read(tmp_path, suffix):
    if not {".avif": features.check("avif"), ".jp2": features.check("jpg_2000")}.get(suffix, True):
        pytest.skip("this Pillow was built without it")
    halves = np.zeros((16, 16), np.uint8)
    halves[:, 8:] = 255
    path = tmp_path / f"a{suffix}"
    Image.fromarray(halves).convert("1" if suffix == ".pbm" else "RGB").save(path)
    found = pixels.read_images([str(path)], 16).images[0].numpy()
    assert np.abs(found[..., 1].astype(int) - halves).mean() < 8


def test_formats_that_start_programs_or_hold_no_pixels_stay_closed():
    assert not {".eps", ".ps", ".wmf", ".emf", ".pdf", ".h5", ".hdf", ".grib", ".bufr", ".mpg"} & set(pixels.suffixes())


def test_a_codec_that_is_missing_is_no_image(monkeypatch):
    formats = {suffix: name for suffix, name in Image.registered_extensions().items() if suffix != ".avif"}
    monkeypatch.setattr(Image, "registered_extensions", lambda: formats)
    pixels.suffixes.cache_clear()
    assert ".avif" not in pixels.suffixes() and ".avif" in pixels.CLOSED
    monkeypatch.undo()
    pixels.suffixes.cache_clear()


def test_an_image_is_recognized_by_its_content_and_rare_formats_by_their_names(tmp_path):
    image = Image.new("RGB", (16, 16), "red")
    image.save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.png")
    assert pixels.read_images([str(tmp_path / "a.png")], 16).images.shape == (1, 16, 16, 3)
    image.save(tmp_path / "b.tga")
    (tmp_path / "b.tga").rename(tmp_path / "b.png")
    with pytest.raises(utils.Failure, match=r"b\.png cannot be read as an image: cannot identify image file"):
        pixels.read_images([str(tmp_path / "b.png")], 16)
