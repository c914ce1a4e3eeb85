"""What a file is that is no checkpoint, and what to do with it. Nothing here runs code from a file."""

import io
import itertools
import pickletools
import re
import shlex
import tarfile
import zipfile
from pathlib import Path

from formats.foreign import CONTAINERS

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of torch.save before PyTorch 1.6
BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file that it stands for: `git lfs pull` fetches that",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes it: only weights of PyTorch are read",
    b"\x93NUMPY": "a NumPy array: only weights of PyTorch are read",
    b"GGUF": "a GGUF file: only weights of PyTorch are read",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first",
    b"\xfd7zXZ\x00": "an xz archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"Rar!\x1a\x07": "a RAR archive: unpack it first",
}
TENSORFLOW = "a file of TensorFlow: only weights of PyTorch are read"
TABLE_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # of the index of a TensorFlow checkpoint


def describe(content: bytes, path: Path) -> str:
    """What the bytes of a file are and what to do about it, if they are known to be no checkpoint; else nothing."""
    start = content[:1024]
    if not content:
        return "it is empty"
    if start.startswith(LEGACY):
        return ""
    for beginning, what in BEGINNINGS.items():
        if start.startswith(beginning):
            return f"it is {what}"
    if re.match(rb"\s*(?:\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml)", start, re.IGNORECASE):
        return "it is an HTML or XML page, not the file that it leads to: download that"
    if start.startswith(b"PK"):
        return _describe_zip(content, path)
    if content[257:262] == b"ustar":
        return _describe_tar(content)
    if content.endswith(TABLE_END) or start[4:8] == b"TFL3" or start.startswith(b"\x08\x01\x12"):
        return f"it is {TENSORFLOW}"
    if start[:1] == b"\x08" and start[1:2] < b"\x20" and start[2:3] in (b"\x12", b"\x1a", b"\x3a"):
        return "it is an ONNX model: save the state_dict of the PyTorch network that it was made from"
    if re.match(rb"[\x80-\x8f\xde\xdf].{0,4}[\xa0-\xbf](params|step|opt_state|model|target)", start, re.DOTALL):
        return "it is a MessagePack file, as Flax (JAX) writes it: only weights of PyTorch are read"
    if start.startswith(b"\x80"):
        return f"it is a pickle that torch.save did not write{_asks_for(content)}: save its tensors with torch.save"
    if not re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\xff]", start):
        return f"it is a text that begins with {start[:40].decode().strip()!r}"
    return ""


def _describe_zip(content: bytes, path: Path) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
    except Exception:  # many kinds of error on damaged bytes; the reader of checkpoints names what is damaged
        return ""
    ends = {name.rpartition("/")[2] for name in names}
    if any("/code/" in f"/{name}" for name in names) or "constants.pkl" in ends:
        again = command("torch.jit.load(sys.argv[1], map_location='cpu').state_dict()", path)
        return f"it is a TorchScript archive, which holds code: save its weights by {again}"
    if "data.pkl" in ends or any("/data/" in name for name in names):
        return ""  # torch.save wrote it, or its damaged remains
    if any(name.endswith(".weights.h5") for name in ends):
        return "it is a Keras model: only weights of PyTorch are read"
    if any("exported_program" in name or name.endswith("models/model.json") for name in names):
        return "it is a program of torch.export: save the state_dict of its network"
    if names and all(name.endswith(".npy") for name in names):
        return "it is an archive of NumPy arrays: only weights of PyTorch are read"
    return f"it is a zip archive of {_some(names)}: unpack it first"


def _describe_tar(content: bytes) -> str:
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            names = [member.name for member, _ in zip(archive, range(5))]
    except (tarfile.TarError, ValueError, OSError):
        names = []
    if {"pickle", "storages", "tensors"} & set(names):
        return "it is in the tar format of the first versions of PyTorch: load and save it again with PyTorch"
    return f"it is a tar archive of {_some(names)}: unpack it first"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return (", ".join(name[:60] for name in names[:2]) or "nothing") + more


# --- Pickles -------------------------------------------------------------------------------------------------------

PLAIN = re.compile(
    r"collections (OrderedDict|Counter)|torch(\._utils|\._tensor|\.serialization|\.nn\.parameter|\.storage)? \w+"
    r"|numpy dtype|numpy\._?core\.multiarray scalar|_codecs \w+|(builtins|__builtin__) (set|bytearray|complex)"
)


def refused(pickled: bytes, path: Path, asked: str = "") -> str:
    """Why PyTorch's reader refused a pickle, and what to do, if that is what it asks for; else nothing."""
    names, texts, first, protocol = _read_pickle(pickled)
    names = [asked] * bool(asked) + names
    if not names:
        return "" if protocol < 3 else f"it is pickled by protocol {protocol}: load and save it again with PyTorch"
    trust = "only if you trust its origin, because that runs code of the file"
    load = "torch.load(sys.argv[1], map_location='cpu', weights_only=False)"
    if any(name.startswith(("torch.nn.modules.", "torch.nn.parallel.")) for name in names):
        own = [name for name in names if not name.startswith("torch.nn.")]
        entry = "" if first else next((f"['{key}']" for key in CONTAINERS if key in texts), "")
        return (
            f"it holds a whole network, pickled as {(own or names)[0]}, not just its weights: where that class can be "
            f"imported, save its weights by {command(f'{load}{entry}.state_dict()', path)}, {trust}"
        )
    entry = next((f"['{key}']" for key in CONTAINERS if key in texts), "")
    again = command(load + entry, path)
    return f"it asks for {names[0]}, not just for tensors and plain values: save its weights alone by {again}, {trust}"


def command(weights: str, path: Path) -> str:
    """A command line that saves what a Python expression about a file, its argument, gives."""
    return (
        f"python -c \"import sys, torch; torch.save({weights}, sys.argv[1] + '.weights.pth')\" {shlex.quote(str(path))}"
    )


def _asks_for(content: bytes) -> str:
    names = _read_pickle(content)[0]
    return f" and that asks for {names[0]}" if names else ""


def _read_pickle(content: bytes) -> tuple[list[str], set[str], bool, int]:
    """The classes and functions that a pickle asks for, beside plain ones; its short texts; whether it is an object
    of such a class itself; its protocol. Nothing is executed."""
    names, texts, recent = [], set(), [""]
    first, protocol = False, 0
    stream = io.BytesIO(content)
    try:
        for _ in range(5 if content.startswith(LEGACY) else 1):  # magic number, version, system, content, storages
            for place, (opcode, value, _) in enumerate(itertools.islice(pickletools.genops(stream), 10**6)):
                if opcode.name == "PROTO":
                    protocol = max(protocol, int(str(value)))
                elif isinstance(value, str) and opcode.name not in ("GLOBAL", "INST"):
                    texts |= {value} if len(value) < 30 else set()
                    recent = [*recent[-1:], value]
                found = value if opcode.name in ("GLOBAL", "INST") else " ".join(recent)
                if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not PLAIN.fullmatch(str(found)):
                    first |= place < 3
                    names.append(str(found).replace(" ", "."))
    except Exception:  # damaged; what was found so far is all that there is to say
        pass
    return list(dict.fromkeys(names)), texts, first, protocol
