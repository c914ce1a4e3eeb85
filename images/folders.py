"""Folders of image files: which images they hold, what is left out, and what is wrong with them."""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from images import pixels
from utils import Failure, counted

# What operating systems, archives and file servers leave beside images; names with a dot in front count, too.
SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
# Names that others give to the two parts, in lower case.
SYNONYMS = {
    "train": ("train", "training", "trn", "train_set", "training_set", "images_background"),
    "test": ("test", "testing", "tst", "test_set", "testing_set", "val", "valid", "validation", "eval", "dev"),
}


@dataclass
class Listing:
    """The images of train/ or test/.

    `samples` are paths with the index of their class. Left out are `hidden` entries, as notebooks and file managers
    leave them, `others`, which are no images, and `closed`, images in a format that is not read; all by name.
    `links` are pairs of classes that are the same folder.
    """

    folder: Path
    classes: list[str]
    samples: list[tuple[str, int]] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))


def list_images(folder: Path) -> Listing:
    """The classes of train/ or test/ and their images. Failure when there are none."""
    found = Listing(folder, subfolders(folder))
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.name not in found.classes):
        (found.hidden if is_hidden(name) else found.others).append(name)
    if not found.classes:
        directly = f", only files such as {found.others[0]}" if found.others else ""
        raise Failure(f"{folder} has no class folders{directly}: it needs a folder of images for each class")
    folders: dict[str, str] = {}
    for label, name in enumerate(found.classes):
        same = folders.setdefault(os.path.realpath(folder / name), name)
        found.links += [(name, same)] if same != name else []
        before, closed = len(found.samples), len(found.closed)
        for parent, below, files in sorted(walk(folder / name)):
            if any(is_hidden(part) for part in Path(parent).relative_to(folder).parts):
                continue
            found.hidden += [entry for entry in below + files if is_hidden(entry)]
            for file in sorted(file for file in files if not is_hidden(file)):
                suffix = os.path.splitext(file)[1].lower()
                if suffix in pixels.suffixes():
                    found.samples.append((os.path.join(parent, file), label))
                else:
                    (found.closed if suffix in pixels.CLOSED else found.others).append(file)
        if len(found.samples) == before:
            there = f", only {n:,} such as {found.closed[-1]}" if (n := len(found.closed) - closed) else ""
            raise Failure(f"{folder / name} has no images that can be read here (.jpg, .png, .webp, ...){there}")
    return found


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, following links. Failure names a link that leads back to a folder above it."""
    above = {str(folder): [os.path.realpath(folder)]}
    for parent, folders, files in os.walk(folder, followlinks=True):
        for name in folders:
            path = os.path.join(parent, name)
            real = os.path.realpath(path)
            if real in above[parent]:
                raise Failure(f"{path} leads back to {real}, which contains it: a directory loop")
            above[path] = [*above[parent], real]
        yield parent, folders, files


def list_parts(folder: Path, parts: tuple[str, ...]) -> dict[str, Listing]:
    """The images of train/ and test/, or of test/ alone. Failure says what is missing and what is there."""
    if not folder.is_dir():
        raise Failure(f"--dataset {folder} is neither cifar10, cifar100 or digits nor a folder")
    for part in parts:
        if not (folder / part).is_dir():
            needs = "it needs train/<class>/ and test/<class>/ with images"
            raise Failure(f"{folder} has no folder {part}/: {needs}{advice(folder, part)}")
    found = {part: list_images(folder / part) for part in parts}
    for part, listing in found.items():
        if len(listing.classes) == 1:
            name, below = listing.classes[0], subfolders(folder / part / listing.classes[0])
            more = f"; {named(below)} in it look like classes: move them up into {part}/" if len(below) > 1 else ""
            raise Failure(f"{folder / part} has only the class {name}: training needs two or more{more}")
    first, *rest = found.values()
    if alone := sorted(set(first.classes).symmetric_difference(*(listing.classes for listing in rest)) if rest else []):
        raise Failure(f"{folder} has classes in only one of train/ and test/: {named(alone)}")
    return found


def advice(folder: Path, missing: str) -> str:
    """What to do about a folder without train/ or test/, by what is there; starts with a semicolon, or is empty."""
    there, parent = subfolders(folder), folder.resolve().parent
    if synonyms := [name for name in there if name.lower() in SYNONYMS[missing]]:
        return f"; it has {synonyms[0]}/: rename that to {missing}/ if it holds the images to {missing} with"
    if (parent / "train").is_dir() and (parent / "test").is_dir():
        return f"; {parent} has both: --dataset {parent}"
    if inside := [name for name in there if (folder / name / "train").is_dir() or (folder / name / "test").is_dir()]:
        return f"; {folder / inside[0]} looks like it: --dataset {folder / inside[0]}"
    if len(there) > 1 and missing == "train":
        return f"; if {named(there)} are classes, split the images of each into train/<class>/ and test/<class>/"
    return f"; it has {named([f'{name}/' for name in there])}" if there else ""


def named(names: list[str]) -> str:
    """Up to five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def with_example(names: list[str], what: str, rest: str) -> list[str]:
    """["3 images of one color, such as NAME"], or nothing of no names."""
    return [f"{counted(len(names), what)} {rest}, such as {names[0]}"] if names else []


def left_out(folder: Path, found: dict[str, Listing]) -> str:
    """What of a folder is not used, and why; empty when all of it is."""
    listings = list(found.values())
    hidden = [name for listing in listings for name in listing.hidden]
    others = [name for listing in listings for name in listing.others]
    closed = [name for listing in listings for name in listing.closed]
    more = [f"{name}/" for name in subfolders(folder) if name not in ("train", "test")]
    lines = [counted(len(hidden), "hidden item")] if hidden else []
    lines += with_example(others, "file", "without the ending of an image")
    lines += with_example(closed, "image", "in a format that is not read here")
    lines += [f"{named(more)} beside train/ and test/"] if more else []
    return ", ".join(lines)


def warnings_about(found: dict[str, Listing], digests: list[bytes], uniform: list[int]) -> list[str]:
    """What ruins a data set: classes that are one folder, the same file in two classes, or in train/ and test/, images
    without content. `digests` are of all files in the order of `found`, `uniform` the numbers of those of one color."""
    samples = [(path, label, part) for part, listing in found.items() for path, label in listing.samples]
    lines = [
        f"the class {one} of {part}/ is the same folder as the class {other}"
        for part, listing in found.items()
        for one, other in listing.links
    ]
    copies: dict[bytes, list[int]] = defaultdict(list)
    for index, digest in enumerate(digests):
        copies[digest].append(index)
    both = [same for same in copies.values() if len({samples[index][1] for index in same}) > 1]
    if both:
        path, label, _ = samples[both[0][0]]
        other = next(samples[index][0] for index in both[0] if samples[index][1] != label)
        examples = [f"{path}, which equals {other}"] * len(both)
        lines += with_example(examples, "image", "in two classes")
    trained = {digest for digest, (_, _, part) in zip(digests, samples) if part == "train"}
    seen = [path for digest, (path, _, part) in zip(digests, samples) if part == "test" and digest in trained]
    lines += with_example(seen, "test image", "that the training images have, too")
    return lines + with_example([samples[index][0] for index in uniform], "image", "of one single color")
