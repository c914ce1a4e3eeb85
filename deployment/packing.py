"""Write packed files: a checkpoint without its zeros, for shipping. The top-level `packed` reads them.

    checkpoint = checkpoints.load_checkpoint(path)
    checkpoints.write(packing.name(path), packing.pack(checkpoint))     # 90percent_iter_ckpt.packed
    checkpoints.load_checkpoint(packing.name(path))                     # the same weights, bit for bit

`packed` documents the format. Every part is a deflate stream, because browsers and small C decoders read those.
"""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
from torch import Tensor

import models
from formats import packed
from utils import Failure


def name(path: Path, dtype: str = "fp32") -> Path:
    """The path of the packed file of the checkpoint at `path`: x_ckpt.packed, x_ckpt.bf16.packed."""
    return path.with_name(path.stem + ("" if dtype == "fp32" else f".{dtype}") + ".packed")


def pack(checkpoint: dict, dtype: str = "fp32") -> bytes:
    """The bytes of the packed file of a checkpoint from `checkpoints.load_checkpoint`; equal input gives equal bytes.

    fp32 keeps every tensor of `net` bit for bit. bf16 and fp16 round the weights of Conv2d and Linear layers to the
    nearest number, ties to even. A nonzero weight never becomes zero: it becomes at least the smallest nonzero number
    of the type, so the zeros stay the same. A rounded checkpoint names its type as `dtype`. Its `acc` and `loss` were
    measured before rounding and are renamed `fp32_acc` and `fp32_loss`.

    Entries other than `net` and those in packed.METADATA are left out. Failure if a tensor is not finite or belongs to
    no known network, if a weight is too large for the type, or if the weights were rounded to another type before.
    """
    if checkpoint.get("dtype", dtype) != dtype:
        raise Failure(f"the network was rounded to {checkpoint['dtype']}: it cannot be packed as {dtype}")
    arch, classes, net = _identify(checkpoint["net"])
    absent = [key for key in models.state(arch, classes) if key not in net]  # models.identify lets only counters be
    weights, floats, integers = packed.groups(arch, classes, absent)
    stored = [_words(net[key]) != 0 for key in weights]  # compared as bits, so that -0.0 is stored
    words = [_round(key, _words(net[key])[mask], dtype) for key, mask in zip(weights, stored)]
    *mantissas, exponents = _planes(_rotate(np.concatenate(words)))
    others = _planes(_rotate(np.concatenate([_words(net[key]) for key in floats]))).tobytes()
    if integers:
        others += _planes(np.concatenate([net[key].numpy().reshape(-1) for key in integers]).astype("<i8")).tobytes()
    mask = np.packbits(np.concatenate(stored), bitorder="little").tobytes()
    parts = [
        _deflate(_metadata(checkpoint, dtype)),
        _deflate(others),
        min(_deflate(mask, zlib.Z_FILTERED), _deflate(mask, zlib.Z_HUFFMAN_ONLY), key=len),
        # Bytes of weights are almost independent: a search for repetitions takes a hundred times as long as Huffman
        # coding alone and gains nothing.
        _deflate(exponents.tobytes(), zlib.Z_HUFFMAN_ONLY),
        _deflate(b"".join(mantissas), zlib.Z_HUFFMAN_ONLY),
    ]
    sizes = [len(part) for part in parts]
    header = {"arch": arch, "classes": classes, "dtype": dtype, "absent": absent, "parts": sizes}
    return _assemble(json.dumps(header).encode(), parts)


def _identify(net: dict[str, Tensor]) -> tuple[str, int, dict[str, Tensor]]:
    """Architecture, number of classes and tensors by name of a state_dict that can be packed; Failure for others."""
    try:
        match = models.identify({key: tuple(value.shape) for key, value in net.items()})
    except ValueError as error:
        raise Failure(f"the network {error}") from None
    net = {match.names[key]: value for key, value in net.items()}
    classes = models.outputs(match.arch, net)
    if classes > packed.MAX_CLASSES:
        raise Failure(f"a network with {classes} classes cannot be packed: the limit is {packed.MAX_CLASSES}")
    expected = models.state(match.arch, classes)
    for key, value in net.items():
        if value.dtype != expected[key].dtype:
            raise Failure(f"{key} is {value.dtype}, not {expected[key].dtype}")
        if not value.isfinite().all():
            raise Failure(f"{key} contains NaN or inf")
    return match.arch, classes, net


def _metadata(checkpoint: dict, dtype: str) -> bytes:
    metadata = {key: checkpoint[key] for key in packed.METADATA if key in checkpoint}
    if dtype != "fp32":
        metadata = {f"fp32_{key}" if key in ("acc", "loss") else key: value for key, value in metadata.items()}
    try:
        text = json.dumps(metadata, allow_nan=False).encode()
        lossless = json.loads(text) == metadata
    except (TypeError, ValueError, RecursionError):
        lossless = False
    if not lossless:
        raise Failure("the metadata of the checkpoint must be numbers, texts, lists and dictionaries")
    if len(text) > packed.MAX_METADATA:
        raise Failure(f"the metadata of the checkpoint takes more than {packed.MAX_METADATA} bytes")
    return text


def _assemble(header: bytes, parts: list[bytes]) -> bytes:
    """A whole file: prefix, checksum, header, parts."""
    body = b"".join([header, *parts])
    size = packed.PREFIX.size + packed.DIGEST_BYTES + len(body)
    prefix = packed.PREFIX.pack(packed.MAGIC, packed.VERSION, len(header), size)
    return prefix + hashlib.sha256(prefix + body).digest() + body


def _deflate(content: bytes, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    stream = zlib.compressobj(9, strategy=strategy)
    return stream.compress(content) + stream.flush()


def _words(tensor: Tensor) -> np.ndarray:
    """The bits of a float32 tensor, in the order of its indices: (n,) uint32."""
    return tensor.contiguous().numpy().reshape(-1).view("<u4")


def _round(key: str, words: np.ndarray, dtype: str) -> np.ndarray:
    """(n,) bits of float32 numbers -> (n,) bits of numbers of `dtype`. No nonzero number becomes zero."""
    if dtype == "fp32":
        return words
    if dtype == "bf16":
        infinity = 0x7F80
        rounded = ((words.astype(np.uint64) + 0x7FFF + (words >> 16 & 1)) >> 16).astype("<u2")
    else:
        infinity = 0x7C00
        with np.errstate(over="ignore"):
            rounded = words.view("<f4").astype("<f2").view("<u2")
    if (rounded & 0x7FFF >= infinity).any():
        raise Failure(f"{key} has weights that are too large for {dtype}")
    rounded[(rounded & 0x7FFF == 0) & (words & 0x7FFFFFFF != 0)] += 1  # the smallest nonzero number, sign kept
    return rounded


def _rotate(words: np.ndarray) -> np.ndarray:
    """Rotate left by one bit. That moves the exponent, which has about two bits of information, into a byte of its
    own (in fp16 with three bits of the mantissa)."""
    return words << 1 | words >> 8 * words.itemsize - 1


def _planes(words: np.ndarray) -> np.ndarray:
    """(n,) words of b bytes -> (b, n) uint8, lowest bytes first."""
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, words.itemsize).T)
