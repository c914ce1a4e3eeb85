"""Which elements of a value of the program a tensor stands for."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH = 2  # images of the traced call: more than one, so that the dimension of the batch cannot be squeezed


@dataclass
class Value:
    """What a tensor of the traced call stands for: elements of one value of the program.

    `index` has the shape of the tensor and numbers the elements of the value for all BATCH images, -1 for a zero.
    Without an index the tensor is the value itself.
    """

    number: int
    shape: tuple[int, int, int]  # of the value: channels, height, width
    index: Tensor | None = None

    def numbered(self) -> Tensor:
        return numbers(self.shape) if self.index is None else self.index

    def dimensions(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return (BATCH, *self.shape) if self.index is None else tuple(self.index.shape)


@dataclass
class Selection:
    """An image-like tensor as a selection from a value: channels (-1 for zeros), every stride-th pixel, then padding
    with zeros."""

    channels: list[int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, left, bottom, right


def select(index: Tensor, shape: tuple[int, int, int]) -> Selection | None:
    """(channels, rows, columns) numbers of elements of a value of this shape -> the selection that makes them.

    None if no selection does. Without any element of the value all is zero, and any selection of zeros will do.
    """
    _, height, width = shape
    size = height * width
    channels = torch.where(index < 0, -1, index // size).flatten(1).amax(1)
    grid = torch.where(index < 0, -1, index % size)[channels >= 0]
    if len(grid) == 0:
        return None
    rows, columns = (grid[0] >= 0).any(1).nonzero().flatten(), (grid[0] >= 0).any(0).nonzero().flatten()
    top, left = int(rows[0]), int(columns[0])
    bottom, right = index.shape[1] - 1 - int(rows[-1]), index.shape[2] - 1 - int(columns[-1])
    stride = (
        int(grid[0, top + 1, left]) // width if len(rows) > 1 else height,
        int(grid[0, top, left + 1]) if len(columns) > 1 else width,
    )
    if min(stride) < 1 or (max(stride) > 1 and (top or left or bottom or right)):
        return None
    pixels = torch.arange(size).view(height, width)[:: stride[0], :: stride[1]]
    pixels, channel = F.pad(pixels, (left, right, top, bottom), value=-1), channels[:, None, None]
    expected = torch.where((channel < 0) | (pixels < 0), -1, channel * size + pixels)
    if not torch.equal(expected, index):
        return None
    return Selection(channels.tolist(), stride, (top, left, bottom, right))


def numbers(shape: tuple[int, int, int]) -> Tensor:
    """The numbers of all elements of a value, for BATCH images."""
    return torch.arange(BATCH * math.prod(shape)).view(BATCH, *shape)


def with_four_dimensions(index: Tensor) -> Tensor | None:
    """(N, C, H, W) from (N, C) or (N, C, H); None for other numbers of dimensions."""
    return index.view(*index.shape, *[1] * (4 - index.dim())) if 2 <= index.dim() <= 4 else None
