"""The page of --target web in a real browser: Debian's Chromium, headless, driven by playwright."""

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, SMALL_PRUNING, succeed
from networks import one_thread, resize  # noqa: F401 (an automatic fixture)
from PIL import Image

import checkpoints

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

READ = """canvas => {
    const copy = new OffscreenCanvas(16, 16).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    return [...copy.getImageData(0, 0, 16, 16).data];
}"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium"),
]


@pytest.fixture(scope="module")
def made(images, tmp_path_factory) -> Path:
    """Two checkpoints, and the page of both in page/."""
    directory = tmp_path_factory.mktemp("web")
    flags = ("--dataset", images, "--checkpoint-dir", directory, "-pr", "0.9", "-shot", "single")
    succeed("main.py", *flags, *SMALL, *SMALL_PRUNING)
    succeed("deploy.py", directory, "--target", "web", "--out", directory / "page", "--dataset", images)
    return directory


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


def serve(folder: Path) -> tuple[http.server.ThreadingHTTPServer, str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, made) -> Iterator:
    """The page, ready. What it reports or asks of other servers fails the test."""
    server, address = serve(made / "page")
    context = browser.new_context(viewport={"width": 360, "height": 700})
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: r.url.startswith((address, "blob:", "data:")) or problems.append(r.url))
    page.goto(address)
    page.get_by_text("Ready: choose a picture.").wait_for()
    yield page
    assert not problems
    context.close()
    server.shutdown()


def answer(page, text: str = "the network says") -> list[float]:
    """Wait for an answer; the logits."""
    page.locator("#status").get_by_text(text).wait_for()
    return json.loads(page.locator("body").get_attribute("data-logits"))


def expected(checkpoint: Path, image: Path) -> torch.Tensor:
    """PyTorch's logits of an image that Pillow read and resized."""
    loaded = checkpoints.load_checkpoint(checkpoint)
    picture = resize(Image.open(image).convert("RGB"), 16)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(loaded[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return checkpoints.build_network(loaded).eval()((pixels - mean) / std)[0]


def write_picture(path: Path, width: int, height: int) -> Path:
    noise = np.random.default_rng(width).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def test_logits_are_pytorchs_for_each_network(page, made, tmp_path):
    radios = page.get_by_role("radio")
    assert radios.count() == 2
    for size in ((16, 16), (45, 31), (300, 700), (2100, 2050)):  # the last one is drawn in strips
        picture = write_picture(tmp_path / f"{size[0]}.png", *size)
        for index, name in enumerate(("ckpt.pth", "90percent_single_ckpt.pth")):
            radios.nth(index).check()
            page.set_input_files("#file", picture)
            found, reference = (
                torch.tensor(answer(page, f"{size[0]}.png: the network says")),
                expected(made / name, picture),
            )
            assert (found - reference).abs().max() <= 1e-4 * reference.abs().max(), (size, name)
    dense, sparse = (page.locator(".network").nth(i).inner_text() for i in (0, 1))
    assert dense.startswith("0.0 % zeros") and sparse.startswith("90.0 % zeros") and "% accurate" in sparse


def test_jpeg_gets_the_same_class_and_bars(page, made, tmp_path):
    picture = write_picture(tmp_path / "photo.jpg", 640, 480)
    page.set_input_files("#file", picture)
    logits = answer(page)
    reference = expected(made / "90percent_single_ckpt.pth", picture)
    assert int(np.argmax(logits)) == int(reference.argmax())
    shares = [float(text.removesuffix(" %")) for text in page.locator("tbody td:last-child").all_inner_texts()]
    widths = [bar.bounding_box()["width"] for bar in page.locator(".bar").all()]
    whole = page.locator("tbody td:nth-child(2)").first.bounding_box()["width"]
    assert shares == pytest.approx(
        (100 * torch.tensor(logits).softmax(0)).sort(descending=True).values.tolist(), abs=0.06
    )
    assert widths == pytest.approx([share / 100 * whole for share in shares], abs=2)
    assert "ms" in page.locator("#time").inner_text() and "kB" in page.locator("#bytes").inner_text()


def test_photographs_and_transparency_are_as_in_python(page, tmp_path):
    """The canvas shows what Pillow makes of a picture that lies on its side, and of a transparent one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(write_picture(tmp_path / "upright.png", 160, 80))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=98, subsampling=0, exif=exif)
    clear = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8), "RGBA")
    clear.save(tmp_path / "clear.png")
    white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    for name, picture in (("turned.jpg", upright), ("clear.png", white)):
        page.set_input_files("#file", tmp_path / name)
        answer(page, f"{name}: the network says")
        canvas = page.locator("#seen").evaluate(READ)
        found = np.array(canvas).reshape(16, 16, 4)[..., :3]
        reference = np.array(picture.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))
        assert np.abs(found - reference).max() <= 6, name


def test_samples_by_keyboard_and_names_for_screen_readers(page):
    sample = page.get_by_role("button", name="Sample of light")
    sample.focus()
    page.keyboard.press("Enter")
    answer(page, "Sample of light: the network says")
    assert page.get_by_role("group", name="Network").count() == 1
    assert page.get_by_role("img", name="The picture as the network sees it").is_visible()
    assert page.get_by_role("status").inner_text().startswith("Sample of light")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    page.locator("#file").focus()
    assert page.locator("#file").evaluate("e => e === document.activeElement")
    assert page.locator("#camera").get_attribute("capture") == "environment"


def test_a_dropped_picture(page, tmp_path):
    content = list(write_picture(tmp_path / "drop.png", 20, 20).read_bytes())
    page.evaluate(
        """content => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(content)], "drop.png", { type: "image/png" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        content,
    )
    answer(page, "drop.png: the network says")


def test_what_is_no_picture_gets_a_sentence_and_the_page_lives_on(page, tmp_path):
    (tmp_path / "no.png").write_text("text")
    page.set_input_files("#file", tmp_path / "no.png")
    page.get_by_role("alert").get_by_text("This file cannot be read as a picture.").wait_for()
    page.set_input_files("#file", write_picture(tmp_path / "yes.png", 16, 16))
    answer(page, "yes.png: the network says")
    assert not page.get_by_role("alert").is_visible()


def changed_page(made: Path, tmp_path: Path, change) -> str:
    """The address of a copy of the page after change(folder)."""
    shutil.copytree(made / "page", tmp_path / "page")
    change(tmp_path / "page")
    return serve(tmp_path / "page")[1]


def damage(name: str):
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 255
        (folder / name).write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (damage("90percent_single.model"), "The network in 90percent_single.model cannot be used: the CRC-32"),
        (lambda folder: (folder / "90percent_single.model").unlink(), "90percent_single.model could not be downloaded"),
        (lambda folder: (folder / "engine.wasm").write_bytes(b"\0asm"), "engine.wasm is damaged"),
        (lambda folder: (folder / "networks.json").write_text("{"), "networks.json, the list of networks, could not"),
    ],
)
def test_damaged_files_get_a_sentence(browser, made, tmp_path, change, sentence):
    page = browser.new_page()
    page.goto(changed_page(made, tmp_path, change))
    page.get_by_role("alert").get_by_text(sentence).wait_for()
    page.close()


def test_another_network_can_be_chosen_after_a_damaged_one(browser, made, tmp_path):
    page = browser.new_page()
    page.goto(changed_page(made, tmp_path, damage("90percent_single.model")))
    page.get_by_role("alert").wait_for()
    page.get_by_role("radio").first.check()
    page.get_by_text("Ready: choose a picture.").wait_for()
    page.close()


def test_a_browser_without_simd_gets_a_sentence(browser, made, tmp_path):
    page = browser.new_page()
    page.add_init_script("WebAssembly.validate = () => false;")
    page.goto(changed_page(made, tmp_path, lambda _folder: None))
    page.get_by_role("alert").get_by_text("This browser has no WebAssembly with SIMD").wait_for()
    page.close()
