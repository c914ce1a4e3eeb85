"""Programs for other devices: the same logits as PyTorch's, under qemu; and what bad input gets."""

import ctypes
import io
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, call, succeed
from networks import one_thread, pruned, randomize, resize  # noqa: F401 (an automatic fixture)
from PIL import Image, ImageOps
from torchvision.models import mobilenet_v2

import checkpoints
from deployment import model_file, packing
from deployment.devices import targets
from deployment.graph import lower
from deployment.program import Operation, Program
from deployment.simplification import without_dead_channels

EMULATORS = {
    "aarch64-linux": "qemu-aarch64-static",
    "arm-linux": "qemu-arm-static",
    "riscv64-linux": "qemu-riscv64-static",
}
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
NETWORKS = {
    "resnet20": (lambda: pruned("resnet20", 0.1), 32),
    "resnet18": (lambda: pruned("resnet18", 0.1), 16),  # small images: qemu takes a hundred times as long
    "mobilenet_v2": (lambda: randomize(mobilenet_v2(num_classes=7), 0.3), 32),
}

pytestmark = pytest.mark.slow  # compiling a program takes up to a minute the first time


def emulator(target: str) -> list[str]:
    found = shutil.which(EMULATORS[target])
    if not found:
        pytest.skip(f"{EMULATORS[target]} is not installed")
    return [found]


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, channels), np.uint8)


@pytest.fixture(scope="module")
def program() -> Path:
    """The program for this processor."""
    return targets.compile_for("x86_64-linux")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, and images of two sizes."""
    folder = tmp_path_factory.mktemp("devices")
    for name, (make, size) in NETWORKS.items():
        network = make()
        program = without_dead_channels(lower(network, size))
        names = [f"class {i} é" for i in range(program.shapes()[-1][0])]
        (folder / f"{name}.model").write_bytes(model_file.write(program, MEAN, STD, names))
        torch.save(network, folder / f"{name}.pt")
    for size in ((32, 32), (45, 31)):
        Image.fromarray(noise(*size)).save(folder / f"{size[0]}.png")
    return folder


def expected(folder: Path, name: str, file: str) -> torch.Tensor:
    """PyTorch's logits of an image that Pillow read and resized."""
    network, size = torch.load(folder / f"{name}.pt", weights_only=False), NETWORKS[name][1]
    image = resize(Image.open(folder / file).convert("RGB"), size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        return network((pixels - mean) / std)[0]


def run(command: list, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=200, check=False)


def logits_of(done: subprocess.CompletedProcess) -> list[torch.Tensor]:
    assert done.returncode == 0, done.stderr
    return [
        torch.tensor([float(x) for x in line.split(": ")[1].split("  ")[0].split()])
        for line in done.stdout.splitlines()
    ]


def check_logits(command: list, folder: Path, name: str, *options: object) -> None:
    files = ["32.png", "45.png"]
    found = logits_of(run(command, folder / f"{name}.model", *(folder / file for file in files), "--logits", *options))
    for file, logits in zip(files, found, strict=True):
        reference = expected(folder, name, file)
        assert (logits - reference).abs().max() <= 1e-4 * reference.abs().max(), (name, file)


@pytest.mark.qemu
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("target", EMULATORS)
def test_logits_under_qemu(folder, target, name):
    check_logits([*emulator(target), targets.compile_for(target)], folder, name, "--threads", 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_on_this_processor(folder, program, name):
    check_logits([program], folder, name, "--threads", 2)


@pytest.mark.qemu
def test_a_layer_too_large_for_32_bits(folder, tmp_path):
    """The engine's copies of the image would be 2^32 + 2^14 floats long."""
    weight = torch.zeros(1, 3, 1, 1024)
    weight[..., 0] = 1
    layer = Operation("convolve", [0], 1, weight=weight, bias=torch.zeros(1), kernel=(1, 1024))
    model = tmp_path / "large.model"
    model.write_bytes(model_file.write(Program([layer, Operation("adaptive_pool", [1], 2)], (2048, 3071))))
    command = [*emulator("arm-linux"), targets.compile_for("arm-linux")]
    refused(run(command, model, folder / "32.png"), "the network needs too much memory")


@pytest.mark.qemu
def test_threads_and_bench_under_qemu(folder):
    command = [*emulator("aarch64-linux"), targets.compile_for("aarch64-linux")]
    done = run(command, folder / "resnet20.model", folder / "32.png", "--logits", "--threads", 2)
    reference = expected(folder, "resnet20", "32.png")
    assert (logits_of(done)[0] - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_arm_program_multiplies_vectors():
    """fmla v.4s, by vector and by element: the inner loops have hundreds, and a scalar build has none."""
    words = np.frombuffer(targets.compile_for("aarch64-linux").read_bytes(), np.uint8)
    words = words[: len(words) // 4 * 4].view("<u4")
    by_vector = (words & 0xFFE0FC00) == 0x4E20CC00
    by_element = (words & 0xFFC0F400) == 0x4F801000
    assert by_vector.sum() + by_element.sum() > 500


@pytest.mark.parametrize("target", EMULATORS)
def test_linux_programs_need_no_libraries(target):
    content = targets.compile_for(target).read_bytes()
    assert content[:4] == b"\x7fELF" and b"ld-musl" not in content and b"ld-linux" not in content


# The pixels: Pillow's arithmetic, photographs that lie on their side, and transparency.


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """pixels.c and photo.c for this process."""
    made = tmp_path_factory.mktemp("pixels") / "pixels.so"
    sources = [str(targets.HERE / name) for name in ("pixels.c", "photo.c")]
    command = [sys.executable, "-m", "ziglang", "cc", "-O2", "-shared", "-fPIC", "-o", str(made), *sources]
    subprocess.run(command, check=True, capture_output=True)
    found = ctypes.CDLL(str(made))
    found.decode_photo.restype = ctypes.POINTER(ctypes.c_uint8)
    return found


SIZES = [(32, 32), (16, 16), (1, 1), (7, 5), (45, 31), (640, 480), (33, 1000), (3, 2001)]


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize("to", [(32, 32), (17, 29), (1, 1), (64, 32)])
@pytest.mark.parametrize("size", SIZES)
def test_resize_is_pillows(library, size, to, step):
    pixels, resized = noise(*size, step), np.empty((to[1], to[0], 3), np.uint8)
    assert library.resize(pixels.tobytes(), step, *size, resized.ctypes.data_as(ctypes.c_void_p), *to)
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    assert np.array_equal(resized, np.array(resize(image, *to)))
    assert np.abs(resized.astype(int) - np.array(image.resize(to, Image.Resampling.BILINEAR))).max() <= 1


def decode(library, content: bytes, black: bool = False) -> np.ndarray | str:
    """RGB pixels, or why there are none."""
    width, height, why = ctypes.c_int(), ctypes.c_int(), ctypes.c_char_p()
    size = ctypes.c_size_t(len(content))
    found = library.decode_photo(content, size, black, *map(ctypes.byref, (width, height, why)))
    if not found:
        return why.value.decode()
    return np.ctypeslib.as_array(found, (height.value, width.value, 4))[..., :3].copy()


def written(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_png_pixels_are_exact(library, mode):
    image = Image.fromarray(noise(13, 9)).convert(mode)
    assert np.array_equal(decode(library, written(image, "PNG")), np.array(image.convert("RGB")))


@pytest.mark.parametrize("background", ["white", "black"])
def test_transparency_is_in_front_of_the_background_of_training(library, background):
    image = Image.fromarray(noise(19, 23, 4), "RGBA")
    reference = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    found = decode(library, written(image, "PNG"), background == "black")
    assert np.abs(found.astype(int) - np.array(reference)).max() <= 1


def test_a_model_says_what_is_behind_transparent_pixels(program, tmp_path):
    """A white square that fades away: on black its edges are grey, on white nothing is left of it."""
    pixels = np.full((32, 32, 4), 255, np.uint8)
    pixels[..., 3] = np.linspace(0, 255, 32).astype(np.uint8)
    picture = Image.fromarray(pixels, "RGBA")
    picture.save(tmp_path / "faded.png")
    network = pruned("resnet20", 0.1)
    for background in "white", "black":
        model = tmp_path / f"{background}.model"
        model.write_bytes(model_file.write(lower(network, 32), MEAN, STD, background=background))
        done = subprocess.run(
            [program, model, tmp_path / "faded.png", "--logits", "--threads", "1"], capture_output=True, text=True
        )
        found = np.array(re.search(r"faded.png: (.*?)  \(", done.stdout)[1].split(), float)
        seen = np.array(Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB"))
        images = torch.from_numpy((seen / 255 - MEAN) / STD).permute(2, 0, 1).float()
        expected = network(images[None])[0].detach().numpy()
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max(), background


def test_networks_for_images_of_more_than_8_bits_are_refused(tmp_path):
    path = tmp_path / "grey_ckpt.pth"
    network = {"net": pruned("resnet20", 0.1).state_dict(), "acc": 50.0, "zeros": 0, "format": checkpoints.FORMAT}
    settings = {"arch": "resnet20", "dataset": "x", "image_size": 32, "grey_black": 0.0, "grey_white": 4095.0}
    checkpoints.save(
        path, network | {"settings": settings, "mean": [0.5] * 3, "std": [0.2] * 3, "classes": list("0123456789")}
    )
    done = call("deploy.py", path, "--target", "x86_64-linux", "--out", tmp_path / "out")
    reason = "was trained on images of more than 8 bits, which programs for devices do not read"
    assert (done.returncode, done.stderr) == (2, f"deploy.py: {path} {reason}\n")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(library, orientation):
    image, exif = Image.fromarray(noise(3, 2).repeat(16, 0).repeat(16, 1)), Image.Exif()
    exif[0x0112] = orientation
    content = written(image, "JPEG", quality=95, subsampling=0, exif=exif)
    reference = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    found = decode(library, content)
    assert found.shape == reference.shape and np.abs(found.astype(int) - reference).max() <= 4


def test_damaged_images_have_a_reason(library):
    content = written(Image.fromarray(noise(20, 20)), "PNG")
    assert decode(library, b"") and isinstance(decode(library, b"text"), str)
    random = np.random.default_rng(0)
    for _ in range(300):  # none of them may crash
        damaged = bytearray(content if random.random() < 0.5 else written(Image.fromarray(noise(20, 20)), "JPEG"))
        for place in random.integers(0, len(damaged), 3):
            damaged[place] = random.integers(256)
        found = decode(library, bytes(damaged[: random.integers(1, len(damaged) + 1)]))
        assert isinstance(found, np.ndarray) or found


# What bad input gets.


def refused(done: subprocess.CompletedProcess, text: str) -> None:
    assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_classes_and_probabilities(folder, program):
    done = run([program], folder / "resnet20.model", folder / "32.png", "--top", 10)
    assert done.returncode == 0
    shares = [float(part.split()[-2]) for part in done.stdout.split(": ", 1)[1].split("  (")[0].split(", ")]
    reference = expected(folder, "resnet20", "32.png").softmax(0).sort(descending=True)
    assert shares == pytest.approx((100 * reference.values).tolist(), abs=0.06)
    assert f" class {int(reference.indices[0])} é " in done.stdout and done.stdout.rstrip().endswith("ms)")


def test_bad_input_is_one_line(folder, program, tmp_path):
    model, image = folder / "resnet20.model", folder / "32.png"
    usage = run([program])
    assert usage.returncode == 2 and usage.stderr.startswith("usage: classify MODEL IMAGE...")
    refused(run([program], model), "no image is named")
    refused(run([program], model, image, "--threads", "no"), "--threads needs a whole number")
    refused(run([program], model, image, "--fast"), "--fast is no option")
    refused(run([program], tmp_path / "none.model", image), "No such file")
    refused(run([program], image, image), "the CRC-32 of the model file is wrong")
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "damaged.model").write_bytes(content)
    refused(run([program], tmp_path / "damaged.model", image), "the CRC-32 of the model file is wrong")
    (tmp_path / "newer.model").write_bytes(of_version(model.read_bytes(), model_file.VERSION + 1))
    refused(run([program], tmp_path / "newer.model", image), "not a model file of this version")
    done = run([program], model, model, image)
    refused(done, "resnet20.model cannot be read as an image: it is neither PNG nor JPEG")
    assert done.stdout.startswith(f"{image}: class ")  # the others are classified


def of_version(content: bytes, version: int) -> bytes:
    head, rest = content[:8], struct.pack("<I", version) + content[16:]
    return head + struct.pack("<I", zlib.crc32(rest, zlib.crc32(head))) + rest


# deploy.py


@pytest.fixture(scope="module")
def checkpoint(images, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    succeed("main.py", "--dataset", images, "--checkpoint-dir", directory, *SMALL)
    return directory / "ckpt.pth"


def test_deploy_writes_program_and_model(checkpoint, images, tmp_path):
    out = tmp_path / "new" / "device"
    printed = succeed("deploy.py", checkpoint, "--target", "x86_64-linux", "--out", out, "--dataset", images)
    assert "on the device: ./classify ckpt.model IMAGE..." in printed
    assert sorted(path.name for path in out.iterdir()) == ["ckpt.model", "classify"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["device"]
    done = run([out / "classify"], out / "ckpt.model", next((images / "test" / "dark").iterdir()))
    assert done.returncode == 0 and "dark" in done.stdout
    succeed("deploy.py", checkpoint, "--target", "x86_64-linux", "--out", out, "--dataset", images)  # once more


def test_model_files_are_named_as_their_checkpoints(checkpoint, tmp_path):
    content = packing.pack(checkpoints.load_checkpoint(checkpoint), "bf16")
    names = "90percent_single_ckpt.bf16.packed", "90percent_single_macs0.15_ckpt.packed", "my_ckpts.packed"
    for name in names:
        (tmp_path / name).write_bytes(content)
    succeed("deploy.py", *(tmp_path / name for name in names), "--target", "x86_64-linux", "--out", tmp_path / "out")
    models = "90percent_single.bf16.model", "90percent_single_macs0.15.model", "my_ckpts.model"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*models, "classify"}


def test_model_files_are_small():
    for name, (make, size) in NETWORKS.items():
        if name == "mobilenet_v2":
            continue  # not an architecture of main.py
        network = make()
        state = {"net": network.state_dict(), "arch": name, "acc": 0.0, "epoch": 0}
        size_of_model = len(model_file.write(without_dead_channels(lower(network, size))))
        assert size_of_model <= 1.5 * len(packing.pack(state, "fp32"))


def test_deploy_refuses(checkpoint, images, tmp_path):
    for arguments, text in (
        (("--target", "toaster", "--out", tmp_path / "out"), "argument --target: invalid choice: 'toaster'"),
        (("--target", "web"), "--target and --out need each other"),
        (("--out", tmp_path / "out"), "--target and --out need each other"),
        (("--target", "aarch64-linux", "--out", checkpoint), "is not a folder"),
        (("--target", "aarch64-linux", "--out", "/proc/out"), "/proc"),
    ):
        done = call("deploy.py", checkpoint, "--dataset", images, *arguments)
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_is_half_written(checkpoint, images, tmp_path, monkeypatch):
    def fail(_target: str) -> Path:
        raise targets.Failure("no compiler")

    monkeypatch.setattr(targets, "compile_for", fail)
    done = call("deploy.py", checkpoint, "--dataset", images, "--target", "web", "--out", tmp_path / "page")
    assert done.returncode == 2 and not list(tmp_path.iterdir())
