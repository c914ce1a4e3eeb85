"""Symbols in about as many bits as their entropy: asymmetric numeral systems, in numpy."""

import numpy as np

SCALE = 14  # frequencies sum to 2**14


def normalise(counts: np.ndarray) -> np.ndarray:
    """Frequencies that sum to 2**SCALE, none of which is 0 where the count is not."""
    counts = counts.astype(np.int64)
    if not counts.any():
        counts = np.eye(1, len(counts), dtype=np.int64)[0]
    total, scale, excess = int(counts.sum()), 1 << SCALE, 1
    while excess > 0:
        frequencies = np.maximum(counts * scale // total, counts > 0)
        excess = int(frequencies.sum()) - (1 << SCALE)
        scale -= max(excess, 0)
    frequencies[frequencies.argmax()] -= excess
    return frequencies


def _lanes(symbols: int) -> int:
    """How many coders take turns, so that numpy has vectors to work on: each costs four bytes."""
    return min(512, symbols // 1024 + 1)


def encode(layers: list[np.ndarray], frequencies: np.ndarray) -> bytes:
    """Range asymmetric numeral systems with 32 bits of state, 16 bits at a time (Duda 2013), many states in turn
    (Giesen, Interleaved entropy coders, 2014). `frequencies`: (layers, alphabet), each sums to 2**SCALE."""
    layer = np.repeat(np.arange(len(layers)), [len(symbols) for symbols in layers])
    symbols = np.concatenate(layers)
    frequency = frequencies.astype(np.uint32)[layer, symbols]
    start = (frequencies.cumsum(1) - frequencies).astype(np.uint32)[layer, symbols]
    lanes = _lanes(len(symbols))
    state = np.full(lanes, 1 << 16, np.uint32)
    words = []
    for first in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        f, x = frequency[first : first + lanes], state[: len(symbols) - first]
        full = x >> (32 - SCALE) >= f
        words.append((x[full] & 0xFFFF).astype("<u2"))
        x = np.where(full, x >> 16, x)
        quotient, remainder = np.divmod(x, f)
        state[: len(f)] = (quotient << SCALE) + remainder + start[first : first + lanes]
    return state.astype("<u4").tobytes() + b"".join(word.tobytes() for word in reversed(words))


def decode(code: bytes, lengths: list[int], frequencies: np.ndarray) -> np.ndarray:
    """What `encode` was given, in one array. ValueError when it cannot have made this code."""
    total, lanes = sum(lengths), _lanes(sum(lengths))
    state = np.frombuffer(code, "<u4", lanes).astype(np.uint32)
    words = np.frombuffer(code, "<u2", offset=4 * lanes)
    # One entry for each of the 2**SCALE slots of each layer.
    flat, alphabet = frequencies.reshape(-1), frequencies.shape[1]
    symbol_of = np.repeat(np.tile(np.arange(alphabet, dtype=np.uint16), len(frequencies)), flat)
    frequency_of = np.repeat(flat.astype(np.uint32), flat)
    place_of = (np.arange(len(symbol_of)) - np.repeat(flat.cumsum() - flat, flat)).astype(np.uint32)
    table = np.repeat(np.arange(len(lengths), dtype=np.uint32) << SCALE, lengths)
    symbols = np.empty(total, np.uint16)
    position = 0
    for first in range(0, total, lanes):
        x = state[: total - first]
        slot = table[first : first + lanes] + (x & ((1 << SCALE) - 1))
        symbols[first : first + lanes] = symbol_of[slot]
        x = frequency_of[slot] * (x >> SCALE) + place_of[slot]
        empty = (x < 1 << 16).nonzero()[0]
        x[empty] = x[empty] << 16 | words[position : position + len(empty)]
        position += len(empty)
        state[: len(x)] = x
    if position != len(words) or (state != 1 << 16).any():
        raise ValueError("its code")
    return symbols
