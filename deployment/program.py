"""A network as a list of operations, the form that every runtime of ours reads."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}


Shape = tuple[int, int, int]  # channels, height, width


@dataclass
class Operation:
    """One step of inference: `output` = kind(`inputs`), then `activation`.

    Values are numbered; value 0 is the images (N, 3, H, W), operation number i (from 0) writes value i + 1, and the
    last operation writes the logits (N, classes, 1, 1). All values have four dimensions and float32 elements. Only
    convolve, affine, add, multiply and activate have an activation.

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

    Paddings of max_pool and average_pool are symmetric. All weights and biases are contiguous float32 tensors on the
    CPU; convolve and affine always have both.
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

    def compute(self, values: list[Tensor], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The output for the given inputs, in PyTorch."""
        x = values[0]
        if self.kind == "convolve":
            x = self.convolve(x, weight, bias)
            if len(values) == 2:
                x = x + values[1]
        elif self.kind == "affine":
            x = x * weight[:, None, None] + bias[:, None, None]
        elif self.kind == "add":
            x = x + values[1]
        elif self.kind == "multiply":
            x = x * values[1]
        elif self.kind == "concatenate":
            x = torch.cat(values, 1)
        elif self.kind == "max_pool":
            x = F.max_pool2d(x, self.kernel, self.stride, self.padding[:2], ceil_mode=self.ceil_mode)
        elif self.kind == "average_pool":
            x = F.avg_pool2d(x, self.kernel, self.stride, self.padding[:2], self.ceil_mode, self.count_include_pad)
        elif self.kind == "adaptive_pool" and torch.onnx.is_in_onnx_export() and self.size != (1, 1):
            for axis, bins in enumerate(self.size, 2):  # ONNX has no such pooling
                x = torch.cat(
                    [x.narrow(axis, *part).mean(axis, keepdim=True) for part in parts(x.shape[axis], bins)], axis
                )
        elif self.kind == "adaptive_pool":
            x = F.adaptive_avg_pool2d(x, self.size)
        elif self.kind == "pad_channels":
            x = F.pad(x[:, :, :: self.stride[0], :: self.stride[1]], (0, 0, 0, 0, *self.channels))
        return ACTIVATIONS[self.activation](x)

    def shape(self, shapes: list[Shape]) -> Shape:
        """The shape of the output for inputs of these shapes."""
        channels, *pixels = shapes[0]
        if self.kind == "concatenate":
            channels = sum(shape[0] for shape in shapes)
        elif self.kind == "pad_channels":
            channels += sum(self.channels)
            pixels = [-(-length // stride) for length, stride in zip(pixels, self.stride)]
        elif self.kind == "adaptive_pool":
            pixels = list(self.size)
        elif self.kind in ("convolve", "max_pool", "average_pool"):
            channels = channels if self.weight is None else len(self.weight)
            pixels = [self.length(axis, length) for axis, length in enumerate(pixels)]
        return (channels, pixels[0], pixels[1])

    def length(self, axis: int, length: int) -> int:
        """Rows (axis 0) or columns (1) of the output of a convolution or a pool."""
        before, after = self.padding[axis], self.padding[axis + 2]
        stride, reach = self.stride[axis], self.dilation[axis] * (self.kernel[axis] - 1) + 1
        rest = length + before + after - reach
        if not self.ceil_mode:
            return rest // stride + 1
        count = -(-rest // stride) + 1
        return count - 1 if (count - 1) * stride >= length + before else count  # no window begins in the padding

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        top, left, bottom, right = self.padding
        if (top, left) != (bottom, right):
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        return F.conv2d(x, weight, bias, self.stride, (top, left), self.dilation, self.groups)


def parts(length: int, bins: int) -> list[tuple[int, int]]:
    """First pixel and number of pixels in each bin of adaptive average pooling."""
    ends = [(i * int(length) // bins, -(-(i + 1) * int(length) // bins)) for i in range(bins)]
    return [(first, last - first) for first, last in ends]


@dataclass
class Program:
    """Operations in an order in which each reads what earlier ones wrote.

    `image_size` (height, width) is the one that it was made for. A program without a Linear layer over a map of fixed
    size runs on images of other sizes too.
    """

    operations: list[Operation] = field(default_factory=list)
    image_size: tuple[int, int] = (32, 32)

    @torch.no_grad()
    def run(self, images: Tensor) -> Tensor:
        """The reference: (N, 3, H, W) images -> (N, classes) logits, computed by PyTorch in the type of the images."""
        return self.values(images)[-1].flatten(1)

    @torch.no_grad()
    def values(self, images: Tensor) -> list[Tensor]:
        """All values, by number."""
        values = [images]
        for operation in self.operations:
            weight, bias = (None if x is None else x.to(images) for x in (operation.weight, operation.bias))
            values.append(operation.compute([values[number] for number in operation.inputs], weight, bias))
        return values

    def shapes(self, image_size: tuple[int, int] | None = None) -> list[Shape]:
        """(channels, height, width) of every value, by number."""
        shapes: list[Shape] = [(3, *(image_size or self.image_size))]
        for operation in self.operations:
            shapes.append(operation.shape([shapes[number] for number in operation.inputs]))
        return shapes

    def nonzeros(self) -> int:
        """Weights and biases that are not zero."""
        tensors = [x for operation in self.operations for x in (operation.weight, operation.bias) if x is not None]
        return sum(int(x.count_nonzero()) for x in tensors)

    def macs(self) -> int:
        """Multiply-adds of the convolutions with nonzero weights, for one image."""
        shapes = self.shapes()
        return sum(
            int(operation.weight.count_nonzero()) * shapes[operation.output][1] * shapes[operation.output][2]
            for operation in self.operations
            if operation.kind == "convolve"
        )


class ProgramModule(nn.Module):
    """A program as an ordinary module with parameters, for PyTorch's exporters."""

    def __init__(self, program: Program):
        super().__init__()
        self.operations = program.operations
        self.weights = nn.ParameterDict()
        for operation in program.operations:
            for kind, value in (("weight", operation.weight), ("bias", operation.bias)):
                if value is not None:
                    self.weights[f"{kind}{operation.output}"] = nn.Parameter(value, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        values = {0: images}
        last_use = {number: operation.output for operation in self.operations for number in operation.inputs}
        for operation in self.operations:
            inputs = [values[number] for number in operation.inputs]
            weight, bias = (
                self.weights[key] if (key := f"{kind}{operation.output}") in self.weights else None
                for kind in ("weight", "bias")
            )
            values[operation.output] = operation.compute(inputs, weight, bias)
            for number in operation.inputs:
                if last_use[number] == operation.output:
                    values.pop(number, None)
        return values[self.operations[-1].output].flatten(1)
