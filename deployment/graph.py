"""Read any convolutional network as a program.

PyTorch runs the network once, on images without data (device meta), and a TorchFunctionMode sees every function that
it calls, whether a module, `F` or a method calls it. Tracing by torch.fx would see proxies in place of tensors, which
have no shape, and would need one rule for each module and one more for each function.

Functions that only move elements (view, flatten, transpose, chunk, slices, padding with zeros) write no operation.
They are applied to a tensor of element numbers instead. The next operation reads from the numbers which channels it
gets, and in which order: a Linear layer arranges its weights accordingly, and a convolution its channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deployment.program import Operation, Program
from deployment.simplification import fuse

BATCH = 2  # images of the traced call: more than one, so that the dimension of the batch cannot be squeezed

SAME = ("contiguous", "clone", "detach", "to", "float", "type", "dropout", "dropout2d", "feature_dropout", "identity")
MOVES = ("view", "reshape", "flatten", "unflatten", "transpose", "swapaxes", "swapdims", "permute", "movedim")
MOVES += ("squeeze", "unsqueeze", "getitem", "narrow", "select", "chunk", "split", "unbind", "pad", "channel_shuffle")
MOVES += ("expand", "expand_as", "view_as", "reshape_as")
UNARY = ("relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid")
ALIASES = {"iadd": "add", "radd": "add", "isub": "sub", "rsub": "rsub", "imul": "mul", "rmul": "mul", "multiply": "mul"}
ALIASES |= {"truediv": "div", "itruediv": "div", "true_divide": "div", "divide": "div", "subtract": "sub"}
ALIASES |= {"concat": "cat", "concatenate": "cat", "clip": "clamp"}


class Unsupported(Exception):
    """What the program cannot express."""


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


def lower(network: nn.Module, image_size: int | tuple[int, int] = 32) -> Program:
    """The program of a network in evaluation, for images of `image_size` (height, width).

    BatchNorm, activations and residual additions are part of the convolutions that can absorb them. The network is
    not changed. Raises ValueError, naming the module, for what a program cannot express, and for weights that are not
    float32.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ValueError(f"the weights of the network are not float32: {name} is {str(value.dtype)[6:]}")
    reader = Reader()
    modes = {module: module.training for module in network.modules()}
    hooks: list = []
    images = torch.empty(BATCH, 3, *size, device="meta")
    images.program_value = Value(0, (3, *size))
    try:
        for name, module in network.named_modules():
            hooks += reader.watch(name, module)
        network.eval()
        with torch.no_grad(), reader:
            logits = network(images)
        reader.finish(logits)
    except Unsupported as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        where, reason = reader.where(), " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where} cannot be read for images of {size[0]}x{size[1]}: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    program = fuse(Program(reader.operations, size))
    own = {value.data_ptr() for value in (*network.parameters(), *network.buffers())}
    for operation in program.operations:  # later changes to the network have no effect
        for key in ("weight", "bias"):
            if (value := getattr(operation, key)) is not None and value.data_ptr() in own:
                setattr(operation, key, value.clone())
    return program


class Reader(TorchFunctionMode):
    """Writes an operation for each function of a traced call."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.modules: list[tuple[str, nn.Module]] = []  # that are being called, the innermost last

    # --- What is called ---------------------------------------------------------------------------------------------

    def watch(self, name: str, module: nn.Module) -> list:
        """Hooks that keep `modules` up to date."""

        def enter(*_: object) -> None:
            self.modules.append((name, module))

        def leave(*_: object) -> None:
            self.modules.pop()

        return [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]

    def where(self) -> str:
        """The innermost module that is being called."""
        name, module = self.modules[-1] if self.modules else ("", None)
        return f"{name} ({type(module).__name__})" if name else "the network"

    def __torch_function__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        kwargs = dict(kwargs or {})
        if "input" in kwargs and not args:
            args = (kwargs.pop("input"),)
        if not any(isinstance(x, Tensor) and hasattr(x, "program_value") for x in flat([args, kwargs])):
            return function(*args, **kwargs)
        name = function.__name__.strip("_")
        name = ALIASES.get(name, name)
        # The same call without data: its shapes, the errors of PyTorch, and the tensor that an in-place call changes.
        result = function(*without_data(args), **without_data(kwargs))
        if not any(isinstance(x, Tensor) for x in flat(result)):
            return result  # a shape
        rule = self.rule(name)
        if rule is None:
            raise Unsupported(f"{self.where()} calls {name}, which is not supported")
        if "other" in kwargs:
            args = (*args, kwargs.pop("other"))
        values = [getattr(x, "program_value", x) for x in args]
        found = rule(self, result, *values, **{key: getattr(x, "program_value", x) for key, x in kwargs.items()})
        for tensor, value in zip(flat(result), found if isinstance(found, list) else [found]):
            tensor.program_value = value
        return result

    def rule(self, name: str) -> Callable | None:
        if name in SAME:
            return lambda _self, result, x, *_args, **_kwargs: self.same(result, x)
        if name in MOVES:
            return lambda _self, result, x, *args, **kwargs: self.move(name, result, x, *args, **kwargs)
        if name in UNARY:
            return lambda _self, result, x, *_args, **_kwargs: self.elementwise("activate", result, [x], name)
        return RULES.get(name)

    def finish(self, logits: object) -> None:
        """Make the logits the last value."""
        value = getattr(logits, "program_value", None)
        if value is None or logits.dim() != 2:
            what = f"a tensor of shape {(*logits.shape,)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise Unsupported(f"the network returns {what}, not logits (N, classes) that depend on the images")
        number, shape = self.image_like(value)
        del self.operations[number:]  # nothing reads them
        if number == 0:
            self.write("activate", [number], shape)

    # --- Values -----------------------------------------------------------------------------------------------------

    def write(self, kind: str, inputs: list[int], shape: tuple[int, ...], **fields) -> Value:
        """Append an operation whose output has this shape (channels, height, width)."""
        name = self.modules[-1][0] if self.modules else ""
        for key in ("weight", "bias"):
            if key in fields:
                fields[key] = fields[key].detach().to("cpu", torch.float32).contiguous()
        self.operations.append(Operation(kind, inputs, len(self.operations) + 1, name=name, **fields))
        return Value(len(self.operations), tuple(shape))

    def image_like(self, value: object) -> tuple[int, tuple[int, int, int]]:
        """A value as (number, shape) of a value of the program; a selection of elements is written as an operation.

        Tensors with fewer than four dimensions get dimensions of size 1 behind.
        """
        selection = self.selection(value)
        if selection is None:
            return value.number, value.shape
        index = with_four_dimensions(value.numbered())
        channels, count = selection.channels, value.shape[0]
        before = next((i for i, channel in enumerate(channels) if channel >= 0), 0)
        if channels == [-1] * before + [*range(count)] + [-1] * (len(channels) - before - count) and not any(
            selection.padding
        ):
            ends = (before, len(channels) - before - count)
            new = self.write("pad_channels", [value.number], index.shape[1:], stride=selection.stride, channels=ends)
        else:
            weight = torch.eye(count + 1)[channels, :count, None, None]  # -1 is the last row, which is zero
            new = self.write(
                "convolve", [value.number], index.shape[1:], weight=weight, bias=torch.zeros(len(weight)),
                stride=selection.stride, padding=selection.padding,
            )  # fmt: skip
        # The same tensor may be read again.
        value.index = None if value.numbered().dim() == 4 else numbers(new.shape).view(value.numbered().shape)
        value.number, value.shape = new.number, new.shape
        return value.number, value.shape

    def selection(self, value: object) -> Selection | None:
        """How to make an image-like tensor from a value; None if it is the value itself."""
        if not isinstance(value, Value):
            raise Unsupported(f"{self.where()} combines an image with a constant in an unsupported way")
        if value.index is None:
            return None
        channels, height, width = value.shape
        index, size = with_four_dimensions(value.index), math.prod(value.shape)
        if index is not None and index.shape[1:] == value.shape and torch.equal(index, numbers(value.shape)):
            return None
        selection = None if index is None else select(index[0], value.shape)
        if selection is None or not torch.equal(index[1], torch.where(index[0] < 0, -1, index[0] + size)):
            raise Unsupported(f"{self.where()} rearranges an image in a way that a program cannot express")
        return selection

    def elementwise(self, kind: str, result: Tensor, values: list[Value], activation: str = "none", **fields) -> Value:
        """An operation whose output has the dimensions of its first input."""
        numbers_and_shapes = [self.image_like(value) for value in values]
        shape = numbers_and_shapes[0][1]
        new = self.write(kind, [number for number, _ in numbers_and_shapes], shape, activation=activation, **fields)
        return self.shaped(new, result)

    def shaped(self, value: Value, result: Tensor) -> Value:
        """The value with the dimensions of the tensor that stands for it."""
        if result.dim() != 4:
            value.index = numbers(value.shape).view(result.shape)
        return value

    # --- Rules ------------------------------------------------------------------------------------------------------

    def same(self, result: Tensor, x: Value) -> Value:
        if result.dtype != torch.float32:
            raise Unsupported(f"{self.where()} computes with {str(result.dtype)[6:]}, not float32")
        return Value(x.number, x.shape, x.index)

    def move(self, name: str, result: Tensor, x: Value, *args, **kwargs) -> Value | list[Value]:
        index = x.numbered()
        if name == "pad":
            names = dict(zip(("pad", "mode", "value"), args)) | kwargs
            if names.get("mode", "constant") != "constant" or names.get("value"):
                raise Unsupported(f"{self.where()} pads with something else than zeros")
            moved = F.pad(index, names["pad"], value=-1)
        elif name == "getitem":
            moved = index[args[0]]
        elif name.startswith("expand"):
            moved = index.expand(result.shape)
        elif name.endswith("_as"):
            moved = index.reshape(result.shape)
        else:
            name = "reshape" if name == "view" else name  # the numbers may lie elsewhere in memory than the elements
            moved = (getattr(Tensor, name, None) or getattr(torch, name))(index, *args, **kwargs)
        found = [Value(x.number, x.shape, part) for part in flat(moved)]
        return found if isinstance(moved, (list, tuple)) else found[0]

    def conv2d(self, result, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Value:
        stride, dilation, kernel = pair(stride), pair(dilation), tuple(weight.shape[2:])
        if padding == "same":  # an odd pixel goes behind, as in PyTorch
            total = [d * (k - 1) for d, k in zip(dilation, kernel)]
            sides = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
        else:
            sides = pair(0 if padding == "valid" else padding) * 2
        selection = self.selection(x)
        if selection and selection.stride == (1, 1) and groups == 1:
            # It reads the selected channels itself, and pads itself.
            all_channels = torch.zeros(len(weight), x.shape[0] + 1, *kernel)
            weight = all_channels.index_add(1, torch.tensor(selection.channels) % (x.shape[0] + 1), weight.cpu())
            weight, sides = weight[:, :-1], tuple(map(sum, zip(sides, selection.padding)))
        else:
            self.image_like(x)
        bias = torch.zeros(len(weight)) if bias is None else bias
        return self.write(
            "convolve", [x.number], result.shape[1:], weight=weight, bias=bias, kernel=kernel, stride=stride,
            padding=sides, dilation=dilation, groups=groups,
        )  # fmt: skip

    def linear(self, result, x, weight, bias=None) -> Value:
        if result.dim() != 2:
            raise Unsupported(f"{self.where()} is a Linear layer over something else than (N, features)")
        index, size = x.numbered(), math.prod(x.shape)
        if not torch.equal(index[1], torch.where(index[0] < 0, -1, index[0] + size)):
            raise Unsupported(f"{self.where()} mixes images of a batch")
        whole = torch.zeros(len(weight), size + 1).index_add(1, index[0] % (size + 1), weight.cpu())
        new = self.write(
            "convolve", [x.number], (len(weight), 1, 1), weight=whole[:, :-1].reshape(-1, *x.shape),
            bias=torch.zeros(len(weight)) if bias is None else bias, kernel=x.shape[1:],
        )  # fmt: skip
        return self.shaped(new, result)

    def batch_norm(self, result, x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        if mean is None or var is None or training:
            raise Unsupported(f"{self.where()} normalizes with the statistics of the batch")
        scale = (var.double() + eps).rsqrt() * (1 if weight is None else weight.double())
        shift = (0 if bias is None else bias.double()) - mean.double() * scale
        return self.elementwise("affine", result, [x], weight=scale, bias=shift)

    def hardtanh(self, result, x, min_val=-1.0, max_val=1.0, inplace=False) -> Value:
        if (min_val, max_val) != (0, 6):
            raise Unsupported(f"{self.where()} clamps to [{min_val}, {max_val}], not to [0, 6] as ReLU6")
        return self.elementwise("activate", result, [x], "relu6")

    def clamp(self, result, x, min=None, max=None) -> Value:
        if (min, max) == (0, None):
            return self.elementwise("activate", result, [x], "relu")
        return self.hardtanh(result, x, min, max)

    def affine(self, result, x, scale: object, shift: object) -> Value:
        """x * scale + shift, with numbers or tensors that are constant within each channel."""
        _, (channels, *_) = self.image_like(x)
        parts = []
        for part in scale, shift:
            part = torch.as_tensor(part, dtype=torch.float64).cpu().broadcast_to(result.shape)
            parts.append(part.reshape(BATCH, result.shape[1], -1)[0, :, 0])
            if (
                tuple(result.shape) != x.dimensions()
                or not part.reshape(BATCH, channels, -1).eq(parts[-1][None, :, None]).all()
            ):
                raise Unsupported(f"{self.where()} combines an image with a constant that varies within channels")
        return self.elementwise("affine", result, [x], weight=parts[0], bias=parts[1])

    def add(self, result, x, y, alpha=1) -> Value:
        if isinstance(x, Value) and isinstance(y, Value):
            shapes = [self.image_like(value)[1] for value in (x, y)]
            if alpha != 1 or shapes[0] != shapes[1]:
                raise Unsupported(f"{self.where()} adds images of the shapes {shapes[0]} and {shapes[1]}")
            return self.elementwise("add", result, [x, y])
        return self.affine(result, x, 1, y * alpha) if isinstance(x, Value) else self.affine(result, y, alpha, x)

    def sub(self, result, x, y, alpha=1) -> Value:
        if isinstance(x, Value) and isinstance(y, Value):
            raise Unsupported(f"{self.where()} subtracts images")
        return self.affine(result, x, 1, -alpha * y) if isinstance(x, Value) else self.affine(result, y, -alpha, x)

    def rsub(self, result, x, y, alpha=1) -> Value:
        return self.sub(result, y, x, alpha)

    def mul(self, result, x, y) -> Value:
        if not (isinstance(x, Value) and isinstance(y, Value)):
            return self.affine(result, x, y, 0) if isinstance(x, Value) else self.affine(result, y, x, 0)
        for image, gate in (x, y), (y, x):
            writer = self.operations[gate.number - 1] if gate.number else None
            sigmoid = writer and (writer.kind, writer.activation) == ("activate", "sigmoid")
            if sigmoid and writer.inputs == [image.number] and image.index is gate.index is None:
                return self.elementwise("activate", result, [image], "silu")
        for image, gate in (x, y), (y, x):
            if gate.index is not None and gate.index.dim() == 4:  # a gate that was expanded to the size of the image
                pixel = gate.index[:, :, :1, :1]
                gate.index = pixel if torch.equal(pixel.expand_as(gate.index), gate.index) else gate.index
            shapes = [self.image_like(value)[1] for value in (image, gate)]
            if shapes[1] == (shapes[0][0], 1, 1):
                return self.elementwise("multiply", result, [image, gate])
        raise Unsupported(f"{self.where()} multiplies images; only a gate (N, channels, 1, 1) is supported")

    def div(self, result, x, y, rounding_mode=None) -> Value:
        if isinstance(y, Value) or rounding_mode:
            raise Unsupported(f"{self.where()} divides by something else than a constant")
        return self.affine(result, x, 1 / y, 0)

    def cat(self, result, values, dim=0) -> Value:
        values = [getattr(value, "program_value", value) for value in values]
        if dim % result.dim() != 1:
            raise Unsupported(f"{self.where()} concatenates something else than channels")
        parts = [self.image_like(value) for value in values]
        shape = (sum(shape[0] for _, shape in parts), *parts[0][1][1:])
        return self.shaped(self.write("concatenate", [number for number, _ in parts], shape), result)

    def max_pool2d(
        self, result, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
    ) -> Value:
        if pair(dilation) != (1, 1) or return_indices:
            raise Unsupported(f"{self.where()} pools with dilation or returns indices")
        return self.pool("max_pool", result, x, kernel_size, stride, padding, ceil_mode=ceil_mode)

    def avg_pool2d(
        self, result, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
        divisor_override=None,
    ) -> Value:  # fmt: skip
        if divisor_override is not None:
            raise Unsupported(f"{self.where()} pools with a divisor of its own")
        fields = {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
        return self.pool("average_pool", result, x, kernel_size, stride, padding, **fields)

    def pool(self, kind: str, result: Tensor, x: Value, kernel, stride, padding, **fields) -> Value:
        number, _ = self.image_like(x)
        kernel = pair(kernel)
        stride = pair(stride) if stride else kernel
        fields |= {"kernel": kernel, "stride": stride, "padding": pair(padding) * 2}
        return self.write(kind, [number], result.shape[1:], **fields)

    def adaptive_avg_pool2d(self, result, x, output_size) -> Value:
        number, _ = self.image_like(x)
        return self.write("adaptive_pool", [number], result.shape[1:], size=tuple(result.shape[2:]))

    def adaptive_max_pool2d(self, result, x, output_size, return_indices=False) -> Value:
        number, (_, height, width) = self.image_like(x)
        if result.dim() != 4 or tuple(result.shape[2:]) != (1, 1) or return_indices:
            raise Unsupported(f"{self.where()} pools the maximum adaptively to more than one pixel")
        return self.pool("max_pool", result, x, (height, width), None, 0)

    def mean(self, result, x, dim=None, keepdim=False, dtype=None) -> Value:
        """Of rows, columns or both."""
        number, (_, height, width) = self.image_like(x)
        dimensions = x.numbered().dim()
        dims = {d % dimensions for d in ([dim] if isinstance(dim, int) else dim or [])}
        if not dims or not dims <= {2, 3} or dtype not in (None, torch.float32):
            raise Unsupported(f"{self.where()} takes a mean over something else than rows and columns")
        kernel = (height if 2 in dims else 1, width if 3 in dims else 1)
        if kernel == (height, width):
            new = self.write("adaptive_pool", [number], (x.shape[0], 1, 1))
        else:
            shape = (x.shape[0], height // kernel[0], width // kernel[1])
            new = self.write("average_pool", [number], shape, kernel=kernel, stride=kernel)
        return self.shaped(new, result)


RULES = {name: getattr(Reader, name) for name in (
    "conv2d", "linear", "batch_norm", "hardtanh", "clamp", "add", "sub", "rsub", "mul", "div", "cat", "max_pool2d",
    "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean",
)}  # fmt: skip


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


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return (value[0], value[-1])


def flat(value: object) -> list:
    """The leaves of nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, (list, tuple)) else [value]


def without_data(value):
    """The same arguments with tensors on the device meta."""
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to("meta")
    if isinstance(value, dict):
        return {key: without_data(part) for key, part in value.items()}
    return type(value)(map(without_data, value)) if type(value) in (list, tuple) else value
