"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from a directory, downloaded when it does not have them."""

import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from utils import Failure

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
SECONDS = 30  # a network that swallows packets would otherwise hang the program


def read(name: str, data_dir: Path) -> "tuple[CIFAR10, CIFAR10]":
    """Training and test images, as torchvision reads them. Failure when they are damaged or cannot be had."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    data_dir = Path(os.path.expanduser(data_dir))  # as torchvision does
    try:
        return kind(str(data_dir), train=True), kind(str(data_dir), train=False)
    except (OSError, RuntimeError):  # not there, or not whole
        unpack(kind, data_dir, ARCHIVES[name])
    return kind(str(data_dir), train=True), kind(str(data_dir), train=False)


def unpack(kind: "type[CIFAR10]", data_dir: Path, archive: str) -> None:
    """Unpack the archive in `data_dir`, which is downloaded unless it is there. What is damaged is never replaced."""
    from torchvision.datasets import utils as torchvision

    path, folder = data_dir / archive, data_dir / kind.base_folder
    advice = f"put {archive} into {data_dir}, or use --dataset FOLDER (with train/ and test/), or --dataset digits"
    if os.path.lexists(path) and not torchvision.check_integrity(str(path), kind.tgz_md5):
        raise Failure(f"{path} is damaged: {describe(path)}; delete it to download it again, or {advice}")
    if folder.exists() and not path.exists():
        raise Failure(f"{folder} is damaged: delete it to download it again, or {advice}")
    if not path.exists():
        existed = data_dir.exists()
        try:
            download(kind, path)
        except (OSError, RuntimeError) as error:
            if not existed and data_dir.exists() and not any(data_dir.iterdir()):
                data_dir.rmdir()
            reason = getattr(error, "reason", error)
            raise Failure(f"{archive} is not in {data_dir} and cannot be downloaded ({reason}): {advice}") from None
    try:
        torchvision.extract_archive(str(path), str(data_dir))
    except OSError as error:
        raise Failure(f"{path} cannot be unpacked: {error}") from None


def download(kind: "type[CIFAR10]", path: Path) -> None:
    """Under another name until it is whole: the rest of an interrupted download must not be taken for the user's."""
    from torchvision.datasets import utils as torchvision

    part = path.with_name(f"{path.name}.part")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)
    try:
        torchvision.download_url(kind.url, str(path.parent), part.name, kind.tgz_md5)
        os.replace(part, path)
    finally:
        socket.setdefaulttimeout(before)
        with contextlib.suppress(OSError):
            part.unlink()


def describe(path: Path) -> str:
    """What lies in the place of an archive."""
    if not path.is_file():
        return "it is not a regular file"
    with open(path, "rb") as file:
        start = file.read(100).strip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page"
    return f"its {path.stat().st_size:,} bytes are not those of the published file"
