"""Read any convolutional network as a program.

PyTorch runs the network once, on black images, and a TorchFunctionMode sees every function that it calls, whether a
module, `F` or a method calls it. Convolutions and Linear layers are not computed. Tracing by torch.fx would see proxies
without shapes in place of tensors, and would need a rule for each module besides the one for each function. Tensors of
the device meta would cost two seconds of imports.

Functions that only move elements (view, flatten, transpose, chunk, slices, padding with zeros) write no operation.
They are applied to a tensor of element numbers instead. The next operation reads off the numbers which elements it
gets, and in which order: a Linear layer arranges its weights accordingly, and a convolution its channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deployment.program import Program
from deployment.rules import FACTS, RULES, STAND_INS
from deployment.selection import BATCH, Value
from deployment.simplification import fuse
from deployment.writer import Unsupported, Writer


def lower(network: nn.Module, image_size: int | tuple[int, int] = 32) -> Program:
    """The program of a network in evaluation, for images of `image_size` (height, width).

    BatchNorm, activations and residual additions are part of the convolutions that can absorb them. The network is
    not changed. Raises ValueError, naming the module, for what a program cannot express, and for weights that are not
    float32.
    """
    network = getattr(network, "_orig_mod", network)  # as it was before torch.compile
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ValueError(f"the weights of the network are not float32: {name} is {str(value.dtype)[6:]}")
    writer = Writer()
    reader = Reader(writer)
    modes = {module: module.training for module in network.modules()}
    hooks: list = []
    images = torch.zeros(BATCH, 3, *size, dtype=torch.float32)
    images.program_value = Value(0, (3, *size))
    try:
        for name, module in network.named_modules():
            hooks += reader.watch(name, module)
        network.eval()
        with torch.no_grad(), reader:
            logits = network(images)
        writer.finish(logits)
    except Unsupported:
        raise
    except Exception as error:
        where, reason = writer.where(), " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where} cannot be read for images of {size[0]}x{size[1]}: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    program = fuse(Program(writer.operations, size))
    own = {value.data_ptr() for value in (*network.parameters(), *network.buffers())}
    for operation in program.operations:  # later changes to the network have no effect
        for key in ("weight", "bias"):
            if (value := getattr(operation, key)) is not None and value.data_ptr() in own:
                setattr(operation, key, value.clone())
    return program


class Reader(TorchFunctionMode):
    """Has operations written for the functions of a traced call."""

    def __init__(self, writer: Writer):
        super().__init__()
        self.writer = writer

    def watch(self, name: str, module: nn.Module) -> list:
        """Hooks that keep the writer's `modules` up to date."""

        def enter(*_: object) -> None:
            self.writer.modules.append((name, module))

        def leave(*_: object) -> None:
            self.writer.modules.pop()

        return [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]

    def __torch_function__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        kwargs = dict(kwargs or {})
        if "input" in kwargs and not args:
            args = (kwargs.pop("input"),)
        if "other" in kwargs:
            args = (*args, kwargs.pop("other"))
        if not any(hasattr(x, "program_value") for x in flat([args, kwargs])):
            return function(*args, **kwargs)
        name = (function.__self__ if function.__name__ == "__get__" else function).__name__.strip("_")
        # Shapes, the errors of PyTorch, and the tensor that an in-place call changes.
        result = STAND_INS.get(name, function)(*on_cpu(args), **on_cpu(kwargs))
        if name in FACTS:
            return result
        if name not in RULES:
            raise self.writer.unsupported(f"calls {name}, which is not supported")
        values = [getattr(x, "program_value", x) for x in args]
        named = {key: getattr(x, "program_value", x) for key, x in kwargs.items()}
        found = RULES[name](self.writer, result, *values, **named)
        for tensor, value in zip(flat(result), flat(found)):
            tensor.program_value = value
        return result


def flat(value: object) -> list:
    """The leaves of nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, (list, tuple)) else [value]


def on_cpu(value):
    """The same arguments with tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items()}
    return type(value)(map(on_cpu, value)) if type(value) in (list, tuple) else value
