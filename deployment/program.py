"""A network as a list of operations, the form that every runtime of ours reads."""

from dataclasses import dataclass, field

from torch import Tensor

ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid")


@dataclass
class Operation:
    """One step of inference: `output` = kind(`inputs`), then `activation`.

    Values are numbered; value 0 is the images (N, 3, H, W), every operation writes a new one, and the last operation
    writes the logits (N, classes, 1, 1). All values have four dimensions and float32 elements.

    kind            inputs                what it computes
    convolve        x [, residual]        Conv2d, with BatchNorm folded; the residual is added before the activation.
                                          Linear is a convolution whose kernel covers the whole map.
    affine          x                     x * weight + bias for each channel: a BatchNorm that no convolution absorbs
    activate        x                     only the activation
    add             x, y                  both of the same shape
    multiply        x, gate               gate (N, C, 1, 1)
    concatenate     x, y, ...             channels
    max_pool        x                     kernel, stride, padding (padded with -inf), ceil_mode
    average_pool    x                     kernel, stride, padding, ceil_mode, count_include_pad
    adaptive_pool   x                     average over `size` (rows, columns) bins, PyTorch's rule; (1, 1) is the mean
    pad_channels    x                     every stride-th pixel, with channels of zeros before and after: option A
    """

    kind: str
    inputs: list[int]
    output: int
    activation: str = "none"
    name: str = ""  # of the module, for messages
    weight: Tensor | None = None  # convolve (out, in / groups, rows, columns); affine (channels,)
    bias: Tensor | None = None  # (out,)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    ceil_mode: bool = False
    count_include_pad: bool = True
    size: tuple[int, int] = (1, 1)
    channels: tuple[int, int] = (0, 0)  # pad_channels: before, after


@dataclass
class Program:
    """Operations in an order in which each reads what earlier ones wrote.

    `image_size` (height, width) is the one that it was made for. A program without a Linear layer over a map of fixed
    size runs on images of other sizes too.
    """

    operations: list[Operation] = field(default_factory=list)
    image_size: tuple[int, int] = (32, 32)
