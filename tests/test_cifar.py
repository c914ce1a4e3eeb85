"""CIFAR as torchvision reads it, and an archive that is missing or damaged."""

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import utils
from images import cifar

NOWHERE = Path("unused")


def test_cifar_is_what_torchvision_reads(monkeypatch):
    from torchvision import datasets

    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)

    class Stub:
        classes = ("airplane", "automobile")

        def __init__(self, root: str, train: bool):
            assert root == "unused"
            self.data, self.targets = (pixels, [0, 1, 0, 1, 0, 1]) if train else (pixels[:2], [1, 0])

    for name, kind in ("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"):
        monkeypatch.setattr(datasets, kind, Stub)
        images = data.load(name, NOWHERE, 32)
        assert torch.equal(images.train.images, torch.from_numpy(pixels))
        assert images.test.labels.tolist() == [1, 0]
        assert (images.name, images.identity, images.test_identity) == (name, name, name)
        assert images.horizontal_flip
    small = data.load("cifar10", NOWHERE, 16).train.images
    expected = Image.fromarray(pixels[5]).resize((16, 16), Image.Resampling.BILINEAR)
    assert torch.equal(small[5], torch.from_numpy(np.array(expected)))


@pytest.fixture
def published(monkeypatch) -> bytes:
    """A tiny archive that stands for the published one: its checksums are the expected ones."""
    from torchvision import datasets

    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
    files = {
        "batches.meta": {"label_names": ["cat", "dog"]},
        "data_batch_1": {"data": pixels, "labels": [0, 1, 0, 1]},
        "test_batch": {"data": pixels[:2], "labels": [0, 1]},
    }
    content = {name: pickle.dumps(value) for name, value in files.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, file in content.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(file)
            archive.addfile(entry, io.BytesIO(file))
    sums = {name: hashlib.md5(file).hexdigest() for name, file in content.items()}
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return buffer.getvalue()


def no_network(*_args: object, **_more: object) -> None:
    raise OSError("no network")


def test_an_archive_is_unpacked_once_and_needs_no_network(tmp_path, published, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(published)
    loaded = data.load("cifar10", tmp_path, 32)
    assert (len(loaded.train.labels), len(loaded.test.labels), loaded.classes) == (4, 2, ["cat", "dog"])
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    assert torch.equal(data.load("cifar10", tmp_path, 32).train.images, loaded.train.images)
    batch = tmp_path / "cifar-10-batches-py" / "test_batch"
    batch.write_bytes(b"changed")
    with pytest.raises(
        utils.Failure, match=r"^\S*/cifar-10-batches-py is damaged: delete it to download it again, or "
    ):
        data.load("cifar10", tmp_path, 32)
    assert batch.read_bytes() == b"changed"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda archive: archive[:-100], "its {} bytes are not those of the published file"),
        (lambda archive: archive[:200] + b"?" + archive[201:], "its {} bytes are not those of the published file"),
        (lambda _: b"", "its 0 bytes are not those"),
        (lambda _: b"\n<!DOCTYPE html><title>Sign in</title>", "it is a web page"),
    ],
)
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_damaged_archive_is_named_and_stays_as_it_is(tmp_path, published, monkeypatch, name, change, reason):
    def download(*_args: object, **_more: object) -> None:
        raise AssertionError("it would be overwritten")

    monkeypatch.setattr("urllib.request.urlopen", download)
    content = change(published)
    archive = tmp_path / cifar.ARCHIVES[name]
    archive.write_bytes(content)
    with pytest.raises(utils.Failure) as failure:
        data.load(name, tmp_path, 32)
    assert failure.value.code == 2
    assert str(failure.value).startswith(f"{archive} is damaged: {reason.format(f'{len(content):,}')}")
    assert [path.name for path in tmp_path.iterdir()] == [archive.name] and archive.read_bytes() == content


@pytest.mark.parametrize("good", [True, False])
def test_a_download_has_the_archives_name_only_when_it_is_whole(tmp_path, published, monkeypatch, good):
    def fetch(_url: str, path: str) -> None:
        assert not Path(path).name.endswith(".gz")
        Path(path).write_bytes(published if good else published[:-1])

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    if good:
        assert len(data.load("cifar10", tmp_path, 32).train.labels) == 4
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]
    else:
        with pytest.raises(
            utils.Failure, match=r"is not in .* and cannot be downloaded \(File not found or corrupted\.\)"
        ):
            data.load("cifar10", tmp_path, 32)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existed", [False, True])
def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch, existed):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    folder = tmp_path / "data"
    if existed:
        folder.mkdir()
    with pytest.raises(utils.Failure) as failure:
        data.load("cifar10", folder, 32)
    for word in (str(folder), "cifar-10-python.tar.gz", "--dataset FOLDER", "digits", "no network"):
        assert word in str(failure.value)
    assert folder.exists() == existed
