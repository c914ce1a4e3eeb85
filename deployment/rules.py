"""What each function of PyTorch writes into a program.

A rule gets the writer, the tensor that the function returned, and the function's own arguments, with values in place
of the tensors that depend on the images. It returns the value of the result, or a list of them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deployment.selection import BATCH, Value, numbers
from deployment.writer import Writer

# What a network may ask about a tensor without depending on its elements.
FACTS = {"size", "dim", "ndimension", "shape", "ndim", "numel", "nelement", "len", "stride", "is_contiguous", "dtype"}
FACTS |= {"device", "layout", "is_floating_point", "is_complex", "requires_grad", "is_cuda", "is_sparse", "is_leaf"}
FACTS |= {"is_quantized", "is_meta", "is_nested", "is_mkldnn", "element_size", "itemsize", "grad_fn", "get_device"}

# --- Layers --------------------------------------------------------------------------------------------------------


def conv2d(writer: Writer, result, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Value:
    stride, dilation, kernel, weight = pair(stride), pair(dilation), pair(weight.shape[2:]), weight.detach().cpu()
    if padding == "same":  # an odd pixel goes behind, as in PyTorch
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        sides = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        sides = pair(0 if padding == "valid" else padding) * 2
    selection = writer.selection(x)
    if selection and selection.stride == (1, 1) and groups == 1:  # it can select channels and pad by itself
        every = weight.new_zeros(len(weight), x.shape[0] + 1, *kernel)  # the last one collects weights for zeros
        channels = torch.tensor(selection.channels) % (x.shape[0] + 1)
        weight = every.index_add(1, channels, weight)[:, :-1]
        sides = tuple(a + b for a, b in zip(sides, selection.padding))
    else:
        writer.image_like(x)
    return writer.write(
        "convolve", [x.number], result.shape[1:], weight=weight, bias=bias_or_zeros(bias, weight), kernel=kernel,
        stride=stride, padding=sides, dilation=dilation, groups=groups,
    )  # fmt: skip


def linear(writer: Writer, result, x, weight, bias=None) -> Value:
    index, size, weight = x.numbered(), math.prod(x.shape), weight.detach().cpu()
    if result.dim() != 2 or not torch.equal(index[1], torch.where(index[0] < 0, -1, index[0] + size)):
        raise writer.unsupported("is a Linear layer over something else than (N, features)")
    if not torch.equal(index[0], torch.arange(size)):  # features in another order than in memory
        every = weight.new_zeros(len(weight), size + 1)  # the last one collects weights for zeros
        weight = every.index_add(1, index[0] % (size + 1), weight)[:, :-1]
    new = writer.write(
        "convolve", [x.number], (len(weight), 1, 1), weight=weight.reshape(-1, *x.shape),
        bias=bias_or_zeros(bias, weight), kernel=pair(x.shape[1:]),
    )  # fmt: skip
    return writer.shaped(new, result)


def batch_norm(
    writer: Writer,
    result,
    x,
    mean,
    var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,  # noqa: ARG001
    eps=1e-5,
) -> Value:
    if mean is None or var is None or training:
        raise writer.unsupported("normalizes with the statistics of the batch")
    scale = (var.double() + eps).rsqrt() * (1 if weight is None else weight.double())
    shift = (0 if bias is None else bias.double()) - mean.double() * scale
    return writer.elementwise("affine", result, [x], weight=scale, bias=shift)


def bias_or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return torch.zeros(len(weight)) if bias is None else bias


# --- Activations ---------------------------------------------------------------------------------------------------


def activation(name: str) -> Callable:
    return lambda writer, result, x, *_args, **_kwargs: writer.elementwise("activate", result, [x], name)


def hardtanh(writer: Writer, result, x, min_val=-1.0, max_val=1.0, inplace=False) -> Value:  # noqa: ARG001
    if (min_val, max_val) != (0, 6):
        raise writer.unsupported(f"clamps to [{min_val}, {max_val}], not to [0, 6] as ReLU6")
    return writer.elementwise("activate", result, [x], "relu6")


def clamp(writer: Writer, result, x, min=None, max=None) -> Value:
    if (min, max) == (0, None):
        return writer.elementwise("activate", result, [x], "relu")
    return hardtanh(writer, result, x, min, max)


# --- Arithmetic ----------------------------------------------------------------------------------------------------


def affine(writer: Writer, result, x: Value, scale: Any, shift: Any) -> Value:
    """x * scale + shift, with numbers or tensors that are constant within each channel."""
    writer.image_like(x)
    parts = []
    for part in scale, shift:
        whole = torch.as_tensor(part, dtype=torch.float64).detach().cpu().broadcast_to(result.shape)
        whole = whole.reshape(BATCH, result.shape[1], -1)
        parts.append(whole[0, :, 0])
        if tuple(result.shape) != x.dimensions() or not torch.equal(whole, parts[-1][None, :, None].expand_as(whole)):
            raise writer.unsupported("combines an image with a constant that varies within channels")
    return writer.elementwise("affine", result, [x], weight=parts[0], bias=parts[1])


def add(writer: Writer, result, x, y, alpha=1) -> Value:
    if isinstance(x, Value) and isinstance(y, Value):
        if alpha != 1 or x.dimensions() != y.dimensions():
            raise writer.unsupported(f"adds images of the shapes {x.dimensions()[1:]} and {y.dimensions()[1:]}")
        return writer.elementwise("add", result, [x, y])
    return affine(writer, result, x, 1, y * alpha) if isinstance(x, Value) else affine(writer, result, y, alpha, x)


def sub(writer: Writer, result, x, y, alpha=1) -> Value:
    if isinstance(x, Value) and isinstance(y, Value):
        raise writer.unsupported("subtracts images")
    return affine(writer, result, x, 1, -alpha * y) if isinstance(x, Value) else affine(writer, result, y, -alpha, x)


def rsub(writer: Writer, result, x, y, alpha=1) -> Value:
    return sub(writer, result, y, x, alpha)


def mul(writer: Writer, result, x, y) -> Value:
    if not isinstance(x, Value) or not isinstance(y, Value):
        return affine(writer, result, x, y, 0) if isinstance(x, Value) else affine(writer, result, y, x, 0)
    x, y = unexpanded(x), unexpanded(y)
    for image, gate in (x, y), (y, x):
        # x * sigmoid(x) and x * hardsigmoid(x) are activations.
        source = writer.operations[gate.number - 1] if gate.number else None
        name = {"sigmoid": "silu", "hardsigmoid": "hardswish"}.get(source.activation) if source else None
        if name and source.inputs == [image.number] and source.kind == "activate" and image.index is gate.index is None:
            return writer.elementwise("activate", result, [image], name)
    image, gate = (x, y) if math.prod(x.dimensions()) >= math.prod(y.dimensions()) else (y, x)
    if gate.dimensions()[1:2] != image.dimensions()[1:2] or math.prod(gate.dimensions()[2:]) != 1:
        raise writer.unsupported("multiplies images; only a gate (N, channels, 1, 1) is supported")
    return writer.elementwise("multiply", result, [image, gate])


def unexpanded(gate: Value) -> Value:
    """A gate that was expanded to the size of the image, before that."""
    if gate.index is not None and gate.index.dim() == 4:
        pixel = gate.index[:, :, :1, :1]
        if torch.equal(pixel.expand_as(gate.index), gate.index):
            return Value(gate.number, gate.shape, pixel)
    return gate


def div(writer: Writer, result, x, y, rounding_mode=None) -> Value:
    if isinstance(y, Value) or rounding_mode:
        raise writer.unsupported("divides by something else than a constant")
    return affine(writer, result, x, 1 / y, 0)


def cat(writer: Writer, result, tensors, dim=0) -> Value:
    parts = [writer.image_like(getattr(tensor, "program_value", tensor)) for tensor in tensors]
    if dim % result.dim() != 1:
        raise writer.unsupported("concatenates something else than channels")
    shape = (sum(shape[0] for _, shape in parts), *parts[0][1][1:])
    return writer.shaped(writer.write("concatenate", [number for number, _ in parts], shape), result)


# --- Pooling -------------------------------------------------------------------------------------------------------


def max_pool2d(
    writer: Writer, result, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> Value:
    if pair(dilation) != (1, 1) or return_indices:
        raise writer.unsupported("pools with dilation or returns indices")
    return pool(writer, "max_pool", result, x, kernel_size, stride, padding, ceil_mode=ceil_mode)


def avg_pool2d(
    writer: Writer, result, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
    divisor_override=None,
) -> Value:  # fmt: skip
    if divisor_override is not None:
        raise writer.unsupported("pools with a divisor of its own")
    fields = {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    return pool(writer, "average_pool", result, x, kernel_size, stride, padding, **fields)


def pool(writer: Writer, kind: str, result: Tensor, x: Value, kernel, stride, padding, **fields) -> Value:
    number, _ = writer.image_like(x)
    kernel = pair(kernel)
    fields |= {"kernel": kernel, "stride": pair(stride) if stride else kernel, "padding": pair(padding) * 2}
    return writer.write(kind, [number], result.shape[1:], **fields)


def adaptive_avg_pool2d(writer: Writer, result, x, output_size) -> Value:  # noqa: ARG001
    number, _ = writer.image_like(x)
    return writer.write("adaptive_pool", [number], result.shape[1:], size=pair(result.shape[2:]))


def adaptive_max_pool2d(writer: Writer, result, x, output_size, return_indices=False) -> Value:  # noqa: ARG001
    _, (_, height, width) = writer.image_like(x)
    if tuple(result.shape[2:]) != (1, 1) or return_indices:
        raise writer.unsupported("pools the maximum adaptively to more than one pixel")
    return pool(writer, "max_pool", result, x, (height, width), None, 0)


def mean(writer: Writer, result, x, dim=None, keepdim=False, dtype=None) -> Value:  # noqa: ARG001
    rank = len(x.dimensions())
    dims = {d % rank for d in ([dim] if isinstance(dim, int) else dim or [])}
    if rank == 3 and dims == {2} and torch.equal(x.numbered(), numbers(x.shape).flatten(2)):  # (N, C, pixels)
        x, dims = Value(x.number, x.shape), {2, 3}
    number, (channels, height, width) = writer.image_like(x)
    if not dims or not dims <= {2, 3} or dtype not in (None, torch.float32):
        raise writer.unsupported("takes a mean over something else than rows and columns")
    kernel = (height if 2 in dims else 1, width if 3 in dims else 1)
    if kernel == (height, width):
        new = writer.write("adaptive_pool", [number], (channels, 1, 1))
    else:
        shape = (channels, height // kernel[0], width // kernel[1])
        new = writer.write("average_pool", [number], shape, kernel=kernel, stride=kernel)
    return writer.shaped(new, result)


# --- Functions that compute nothing --------------------------------------------------------------------------------


def same(writer: Writer, result, x, *_args, **_kwargs) -> Value:
    if result.dtype != torch.float32:
        raise writer.unsupported(f"computes with {str(result.dtype)[6:]}, not float32")
    return Value(x.number, x.shape, x.index)


def move(name: str) -> Callable:
    """A rule for a function that moves elements: it is applied to their numbers."""
    # The numbers may lie elsewhere in memory than the elements, so a view of them may need a copy.
    function = Tensor.reshape if name == "view" else getattr(Tensor, name, None) or getattr(torch, name)

    def rule(_writer: Writer, _result, x, *args, **kwargs) -> Value | list[Value]:
        moved = function(x.numbered(), *args, **kwargs)
        values = [Value(x.number, x.shape, part) for part in ([moved] if isinstance(moved, Tensor) else moved)]
        return values[0] if isinstance(moved, Tensor) else values

    return rule


def into_shape(function: Callable) -> Callable:
    """A rule for a function that moves elements into a shape that another tensor may give."""
    return lambda _writer, result, x, *_: Value(x.number, x.shape, function(x.numbered(), result.shape))


def pad_image(writer: Writer, _result, x, pad, mode="constant", value=None) -> Value:
    if mode != "constant" or value:
        raise writer.unsupported("pads with something else than zeros")
    return Value(x.number, x.shape, F.pad(x.numbered(), pad, value=-1))


def convolved(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:  # noqa: ARG001
    """Zeros in the shape of the output of conv2d."""
    if x.dim() != 4 or x.shape[1] != groups * weight.shape[1]:
        raise ValueError(f"a convolution of {groups * weight.shape[1]} channels over {tuple(x.shape)}")
    kernel = x.new_zeros(1, 1, *weight.shape[2:])
    return F.conv2d(x[:, :1], kernel, None, stride, padding, dilation).repeat(1, len(weight), 1, 1)


def multiplied(x, weight, bias=None) -> Tensor:  # noqa: ARG001
    """Zeros in the shape of the output of linear."""
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"a Linear layer of {weight.shape[1]} features over {tuple(x.shape)}")
    return x.new_zeros(*x.shape[:-1], len(weight))


STAND_INS: dict[str, Callable] = {"conv2d": convolved, "linear": multiplied}


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """One number for rows and columns, or one for each."""
    value = (value,) if isinstance(value, int) else tuple(value)
    return (value[0], value[-1])


RULES: dict[str, Callable] = {
    "conv2d": conv2d, "linear": linear, "batch_norm": batch_norm,
    "hardtanh": hardtanh, "clamp": clamp, "clip": clamp,
    "add": add, "iadd": add, "radd": add, "sub": sub, "subtract": sub, "isub": sub, "rsub": rsub,
    "mul": mul, "multiply": mul, "imul": mul, "rmul": mul, "div": div, "divide": div, "true_divide": div,
    "truediv": div, "itruediv": div, "cat": cat, "concat": cat, "concatenate": cat,
    "max_pool2d": max_pool2d, "avg_pool2d": avg_pool2d, "adaptive_avg_pool2d": adaptive_avg_pool2d,
    "adaptive_max_pool2d": adaptive_max_pool2d, "mean": mean,
    "getitem": lambda _writer, _result, x, key: Value(x.number, x.shape, x.numbered()[key]), "pad": pad_image,
    "expand": into_shape(Tensor.expand), "expand_as": into_shape(Tensor.expand),
    "view_as": into_shape(Tensor.reshape), "reshape_as": into_shape(Tensor.reshape),
}  # fmt: skip
RULES |= {name: activation(name) for name in ("relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid")}
RULES |= dict.fromkeys(("contiguous", "clone", "detach", "data", "to", "float", "type", "cpu"), same)
RULES |= dict.fromkeys(("dropout", "dropout2d", "feature_dropout", "alpha_dropout"), same)
RULES |= {
    name: move(name)
    for name in ("view", "reshape", "flatten", "unflatten", "transpose", "swapaxes", "swapdims", "permute", "movedim",
                 "squeeze", "unsqueeze", "narrow", "select", "chunk", "split", "unbind", "channel_shuffle")
}  # fmt: skip
