"""Model files: every damage is an error code, whatever the bytes say."""

import struct
import zlib

import numpy as np
import pytest
import torch
from test_c_engine import convolution, program

from deployment import model_file
from deployment.engine import Model
from deployment.program import Operation


@pytest.fixture(scope="module")
def content() -> bytes:
    """A small model with every kind of positions: none, mask bits and gaps."""
    torch.manual_seed(0)
    sparse = convolution([2], 3, 4, 6, density=0.02)
    sparse.weight[5, 3, 2, 2] = 1
    layers = [convolution([0], 1, 3, 4, density=1), convolution([1], 2, 4, 4), sparse, Operation("max_pool", [3], 4)]
    return model_file.write(program(layers, (6, 5)), class_names=[f"class {i}" for i in range(5)])


def with_crc(content: bytes) -> bytes:
    return content[:8] + struct.pack("<I", zlib.crc32(content[12:], zlib.crc32(content[:8]))) + content[12:]


def test_every_changed_byte_is_named_by_the_crc(content):
    for at in range(len(content)):
        damaged = content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
        with pytest.raises(ValueError, match="CRC-32"):
            Model(damaged)


def test_every_length_is_refused(content):
    for length in range(len(content)):
        with pytest.raises(ValueError, match="CRC-32" if length >= 64 else "shorter"):
            Model(content[:length])
        if length >= 64:
            with pytest.raises(ValueError, match=r"contradicts|not a model"):
                Model(with_crc(content[:length]))


@pytest.mark.parametrize("change", [1, 0x7F, 0x80, 0xFF])
def test_hostile_bytes_are_an_error_or_finite_work(content, change):
    images = np.random.default_rng(0).normal(size=(17, 3, 6, 5)).astype(np.float32)
    for at in range(len(content)):
        hostile = with_crc(content[:at] + bytes([content[at] ^ change]) + content[at + 1 :])
        try:
            Model(hostile).run(images)
        except ValueError:
            continue


def test_kinds_without_activation():
    layers = [Operation("max_pool", [0], 1, "relu")]
    with pytest.raises(ValueError, match="contradicts"):
        Model(model_file.write(program(layers, (6, 5))))


def test_gaps_longer_than_a_byte():
    places = np.array([0, 1, 255, 256, 510, 511 + 255, 2000])
    at, found = 0, []
    for gap in model_file._gaps(places):
        at += gap
        if gap < 255:
            found.append(at)
            at += 1
    assert found == places.tolist()
