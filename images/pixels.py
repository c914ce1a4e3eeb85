"""One image file -> bytes of RGB, and what decides about them for the whole data set."""

import functools
import hashlib
import io
import math
import os
import stat
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils import Failure

# Formats that Pillow decodes itself. The others stay closed: for some it starts other programs (EPS, WMF), some it
# only identifies (HDF5, GRIB, BUFR, MPEG). Files of the common ones are recognized whatever their names say.
# fmt: off
COMMON = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000", "AVIF")
RARE = ("BLP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "ICNS", "ICO", "IM", "MSP", "PCD", "PCX",
        "PIXAR", "PSD", "QOI", "SGI", "SUN", "TGA", "XBM", "XPM")
# Endings of images that are not read, or not by every Pillow.
CLOSED = (".heic", ".heif", ".jxl", ".svg", ".exr", ".dcm", ".dng", ".cr2", ".nef", ".arw", ".npy", ".eps", ".ps",
          ".wmf", ".emf", ".pdf", ".avif", ".webp", ".jp2", ".qoi")
# fmt: on
LARGEST_FILE = 2**28  # bytes of an image file
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@functools.cache
def suffixes() -> dict[str, str]:
    """The endings of the files that are read, in lower case, each with Pillow's name of the format."""
    Image.init()
    formats = {suffix: name for suffix, name in Image.registered_extensions().items() if name in COMMON + RARE}
    return {".mpo": "JPEG"} | {suffix: name for suffix, name in formats.items() if name in Image.OPEN}


@dataclass(frozen=True)
class Rendering:
    """What an image file leaves open, decided once for a data set so that all its images stay comparable.

    `grey`: the values of an image of more than 8 bits that become black and white, the range over all such training
    images. `background`: behind transparent pixels, "white", or "black" where the ink is white. Each is None where no
    image needs it.
    """

    grey: tuple[float, float] | None = None
    background: str | None = None

    def settings(self) -> dict[str, float | str]:
        """As settings of a result, without what no image needs."""
        grey = dict(zip(("grey_black", "grey_white"), self.grey)) if self.grey else {}
        return grey | ({"background": self.background} if self.background else {})

    @classmethod
    def of(cls, settings: dict) -> "Rendering":
        """Of the settings of a result; what is not in the form that `settings` writes counts as absent."""
        black, white, background = (settings.get(name) for name in ("grey_black", "grey_white", "background"))
        grey = None
        if isinstance(black, float) and isinstance(white, float) and math.isfinite(white - black):
            grey = black, white
        return cls(grey, background if background in ("white", "black") else None)

    def __str__(self) -> str:
        grey = f"grey values {self.grey[0]:g} to {self.grey[1]:g} scaled to 8 bits" if self.grey else ""
        return ", ".join(filter(None, (grey, f"transparency on {self.background}" if self.background else "")))


@dataclass
class Look:
    """What a first look at an image found.

    `grey` is the range of its values where it has more than 8 bits. `ink` is the sum of the luminance of its pixels
    weighted by their opacity, and the sum of the opacity, where some are transparent.
    """

    digest: bytes = b""
    turned: bool = False
    grey: tuple[float, float] | None = None
    ink: tuple[int, int] | None = None


@dataclass
class Pictures:
    """Images (N, size, size, 3) uint8; the SHA-256 of each file; and a key for each image, equal for equal pixels:
    the digest and, where the file alone does not say, how it was rendered."""

    images: Tensor
    digests: list[bytes]
    keys: list[bytes]
    rendering: Rendering
    uniform: list[int] = field(default_factory=list)  # the images of one single color


def read_images(paths: list[str], size: int, train: int = 0, rendering: Rendering | None = None) -> Pictures:
    """Read image files, the first `train` of which decide about the rendering unless it is given.

    Failure names the first broken files and says how many there are.
    """
    images = np.empty((len(paths), size, size, 3), np.uint8)
    looks = [Look() for _ in paths]

    def first(index: int, content: bytes) -> None:
        image, turned = decode(content, paths[index])
        look = looks[index] = Look(hashlib.sha256(content).digest(), turned)
        if is_deep(image):
            look.grey = grey_range(image)
        elif is_transparent(image):
            look.ink = weigh_ink(image)
        if not (look.grey or look.ink):
            images[index] = to_pixels(image, size)

    def again(index: int, content: bytes) -> None:
        images[index] = to_pixels(decode(content, paths[index])[0], size, rendering)

    _for_each(first, list(range(len(paths))), paths)
    # Where no training image has more than 8 bits or transparency, those that have decide.
    choices = [rendering or Rendering(), choose_rendering(looks[:train]), choose_rendering(looks)]
    greys, backgrounds = [c.grey for c in choices if c.grey], [c.background for c in choices if c.background]
    rendering = Rendering(greys[0] if greys else None, backgrounds[0] if backgrounds else None)
    _for_each(again, [index for index, look in enumerate(looks) if look.grey or look.ink], paths)
    keys = [look.digest + _how(look, rendering).encode() for look in looks]
    uniform = [index for index, image in enumerate(images) if (image == image[0, 0]).all()]
    return Pictures(torch.from_numpy(images), [look.digest for look in looks], keys, rendering, uniform)


def _for_each(do: Callable[[int, bytes], None], indices: list[int], paths: list[str]) -> None:
    """Call `do` with the number and the content of files, in threads. Failure names the files for which it fails."""
    broken: dict[int, str] = {}

    def some(start: int) -> None:
        for index in indices[start : start + chunk]:
            try:
                do(index, read_file(paths[index]))
            except MemoryError:
                raise
            except Exception as error:  # Pillow's decoders raise many kinds of error
                broken[index] = str(error).split(" <_io")[0]  # without the address of a buffer

    chunk = 500  # handing a small image to a thread costs more than reading it
    starts = range(0, len(indices), chunk)
    with ThreadPoolExecutor() as pool, warnings.catch_warnings(action="ignore"):  # about transparency and large images
        for _ in tqdm(pool.map(some, starts), "reading images", len(starts), leave=False, disable=None):
            pass
    lines = [f"{paths[index]} cannot be read as an image: {reason}" for index, reason in sorted(broken.items())]
    if lines:
        more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise Failure("; ".join(lines[:5]) + more)


def read_file(path: str) -> bytes:
    """The content of a regular file of bounded size; ValueError for anything else, as for a pipe."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE:,} bytes")
    with open(path, "rb") as file:
        return file.read()


def decode(content: bytes, path: str) -> tuple[Image.Image, bool]:
    """The first frame of an image file, and whether it had to be turned upright by its EXIF orientation."""
    own = suffixes()[os.path.splitext(path)[1].lower()]  # some rare formats can only be told by the name
    with Image.open(io.BytesIO(content), formats=[name for name in {*COMMON, own} if name in Image.OPEN]) as image:
        image.load()  # which turns a TIFF, and removes its tag
        try:
            turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        except Exception:  # damaged metadata do not make an image unreadable
            turn = None
        return (image.transpose(turn), True) if turn is not None else (image, False)


def is_deep(image: Image.Image) -> bool:
    """Whether an image has one channel of more than 8 bits: integers (I) or floating-point numbers (F)."""
    return image.mode[0] in "IF"


def is_transparent(image: Image.Image) -> bool:
    """Whether some pixel of an image is not opaque."""
    return image.has_transparency_data and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255


def grey_range(image: Image.Image) -> tuple[float, float]:
    """The least and the greatest value. ValueError for NaN and inf."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError("it has values that are not finite")
    return low, high


def weigh_ink(image: Image.Image) -> tuple[int, int]:
    """The sum of luminance times opacity, each 0 to 255, over the pixels of an image; and the sum of the opacity."""
    rgba = image.convert("RGBA")
    luminance = np.asarray(rgba.convert("RGB").convert("L"), np.int64)
    opacity = np.asarray(rgba.getchannel("A"), np.int64)
    return int((luminance * opacity).sum()), int(opacity.sum())


def choose_rendering(looks: list[Look]) -> Rendering:
    """The range of all grey values; and the background from which the mean ink is farther, white if there is none."""
    ranges = [look.grey for look in looks if look.grey]
    inks = [look.ink for look in looks if look.ink]
    grey = (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None
    luminance, opacity = sum(ink for ink, _ in inks), sum(opacity for _, opacity in inks)
    background = ("black" if 2 * luminance > 255 * opacity else "white") if inks else None
    return Rendering(grey, background)


def _how(look: Look, rendering: Rendering) -> str:
    """Nothing for an image that looks the same whatever the others are."""
    parts = ["turned"] if look.turned else []
    parts += [f"grey {rendering.grey}"] if look.grey else []
    parts += [f"on {rendering.background}"] if look.ink else []
    return " ".join(parts)


def to_pixels(image: Image.Image, size: int, rendering: Rendering | None = None) -> np.ndarray:
    """Any image -> (size, size, 3) uint8 RGB. One of more than 8 bits or with transparency needs a rendering."""
    if is_deep(image):
        assert rendering and rendering.grey
        low, high = rendering.grey
        values = (np.asarray(image, np.float64).clip(low, high) - low) * (255 / max(high - low, 1e-300))
        image = Image.fromarray(np.rint(values).astype(np.uint8))
    elif is_transparent(image):
        assert rendering and rendering.background
        image = Image.alpha_composite(Image.new("RGBA", image.size, rendering.background), image.convert("RGBA"))
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)
