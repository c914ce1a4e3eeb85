"""Smaller programs with the same logits: fuse operations, remove dead channels."""

from dataclasses import replace

import torch
from torch import Tensor

from deployment.program import Operation, Program

ACTIVATED = ("convolve", "affine", "add", "multiply", "activate")  # kinds that have an activation


# --- Fusing --------------------------------------------------------------------------------------------------------


def fuse(program: Program) -> Program:
    """BatchNorm, activations and residual additions as parts of the operations that can absorb them.

    BatchNorm is folded into the convolution before it if nothing else reads that (Jacob et al. 2018). Values that
    nothing reads are dropped. Logits stay the same up to rounding.
    """
    operations = unread_dropped(program.operations)
    for absorb in absorb_affine, absorb_activation, absorb_addition:
        operations = absorb(operations)
    return Program(numbered(operations), program.image_size)


def unread_dropped(operations: list[Operation]) -> list[Operation]:
    """The operations that the last one needs."""
    needed, kept = {operations[-1].output}, []
    for operation in reversed(operations):
        if operation.output in needed:
            needed.update(operation.inputs)
            kept.append(operation)
    return kept[::-1]


def numbered(operations: list[Operation]) -> list[Operation]:
    """The same operations with values numbered in their order."""
    new = {0: 0} | {operation.output: number for number, operation in enumerate(operations, 1)}
    return [
        replace(operation, inputs=[new[number] for number in operation.inputs], output=new[operation.output])
        for operation in operations
    ]


def reads(operations: list[Operation]) -> dict[int, int]:
    """How often each value is read; the logits are read once more."""
    counts = {operation.output: 0 for operation in operations} | {0: 0}
    for operation in operations:
        for number in operation.inputs:
            counts[number] += 1
    counts[operations[-1].output] += 1
    return counts


def absorb_affine(operations: list[Operation]) -> list[Operation]:
    counts, kept = reads(operations), {}
    for operation in operations:
        before = kept.get(operation.inputs[0])
        if (
            operation.kind == "affine"
            and before is not None
            and before.kind in ("convolve", "affine")
            and before.activation == "none"
            and counts[before.output] == 1
        ):
            scale, shift = operation.weight, operation.bias
            weight = before.weight * scale.view(-1, *[1] * (before.weight.dim() - 1))
            bias = before.bias * scale + shift
            del kept[before.output]
            operation = replace(
                before, output=operation.output, weight=weight, bias=bias,
                activation=operation.activation,
            )  # fmt: skip
        kept[operation.output] = operation
    return list(kept.values())


def absorb_activation(operations: list[Operation]) -> list[Operation]:
    counts, kept = reads(operations), {}
    for operation in operations:
        before = kept.get(operation.inputs[0])
        if operation.kind == "activate" and before is not None and counts[before.output] == 1:
            takes = before.kind in ACTIVATED and before.activation == "none"
            if takes or operation.activation == "none":
                del kept[before.output]
                activation = operation.activation if takes else before.activation
                operation = replace(before, output=operation.output, activation=activation)
        kept[operation.output] = operation
    return list(kept.values())


def absorb_addition(operations: list[Operation]) -> list[Operation]:
    """Each addition into the later of the convolutions that write its inputs.

    The convolution moves to the place of the addition, because its residual may be computed after it.
    """
    counts, kept = reads(operations), {}
    for operation in operations:
        if operation.kind == "add":
            for number in sorted(operation.inputs, reverse=True):
                before = kept.get(number)
                if (
                    before is not None
                    and before.kind == "convolve"
                    and len(before.inputs) == 1
                    and before.activation == "none"
                    and counts[number] == 1
                ):
                    residual = operation.inputs[1 - operation.inputs.index(number)]
                    del kept[number]
                    operation = replace(
                        before, inputs=[*before.inputs, residual], output=operation.output,
                        activation=operation.activation,
                    )  # fmt: skip
                    break
        kept[operation.output] = operation
    return list(kept.values())


# --- Dead channels -------------------------------------------------------------------------------------------------


def without_dead_channels(program: Program) -> Program:
    """A program without the channels that do not matter; same logits up to rounding.

    A filter whose weights are all zero outputs a constant. A convolution without padding takes it into its bias. With
    padding that would be wrong at the borders of the image. There, all constants that a convolution reads become one:
    the largest, with the sum of their weights, each times its constant. A channel that no convolution reads any more
    is removed. Additions, gates and depthwise convolutions tie channels to each other; tied channels are removed
    together. Convolutions with other groups keep their channels.
    """
    operations = without_constants(program.operations)
    operations = unread_dropped([without_weights(operation) for operation in operations])
    widths = {number: shape[0] for number, shape in enumerate(program.shapes())}
    needed, read = needed_channels(operations, widths)
    kept = kept_channels(operations, read, widths)
    return Program(numbered([narrowed(operation, needed, kept) for operation in operations]), program.image_size)


def without_constants(operations: list[Operation]) -> list[Operation]:
    """The same operations with convolutions that read as few constant channels as they can."""
    constants = {0: torch.full((3,), torch.nan)}  # of each channel; not finite where it is not constant
    changed = []
    for operation in operations:
        inputs = [constants[number] for number in operation.inputs]
        if operation.kind == "convolve":
            operation = without_constant_inputs(operation, inputs[0])
        constants[operation.output] = output_constants(operation, inputs)
        changed.append(operation)
    return changed


def without_constant_inputs(operation: Operation, constants: Tensor) -> Operation:
    """A convolution with the weights for constant channels moved to its bias, or to one of these channels."""
    weight, padded, groups = operation.weight, any(operation.padding), operation.groups
    if not constants.isfinite().any() or (padded and groups > 1 and not constants.eq(0).any()):
        return operation
    # The constants that each filter reads: (out, in / groups).
    constants = constants.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
    columns = constants.isfinite().any(0).nonzero().flatten()
    constants, part = constants[:, columns], weight[:, columns]
    # A channel that computes NaN must stay, or a broken network would look sound.
    movable = part.ne(0).flatten(2).any(2) & part.isfinite().flatten(2).all(2) & constants.isfinite()
    if padded and groups > 1:
        movable &= constants == 0
    if not movable.any():
        return operation
    moved = torch.where(movable[:, :, None, None], part.double() * constants[:, :, None, None], 0.0)
    weight = weight.index_copy(1, columns, torch.where(movable[:, :, None, None], 0.0, part))
    if not padded:
        return replace(operation, weight=weight, bias=(operation.bias + moved.sum((1, 2, 3))).float())
    one = torch.where(movable.any(0), constants[0].abs(), 0.0).argmax()
    if groups == 1 and constants[0, one] != 0:
        weight[:, columns[one]] += (moved.sum(1) / constants[0, one]).float()
    return replace(operation, weight=weight)


def output_constants(operation: Operation, inputs: list[Tensor]) -> Tensor:
    """The constant in each channel of the output; NaN or infinity where it is not constant."""
    kind = operation.kind
    if kind == "convolve":
        total = torch.where(nonzero_filters(operation.weight), torch.nan, operation.bias)
        return replace(operation, kind="activate").compute([sum(inputs[1:], total)], None, None)
    if kind in ("max_pool", "average_pool", "adaptive_pool"):
        exact = kind != "average_pool" or not operation.count_include_pad or not any(operation.padding)
        return torch.where((inputs[0] == 0) | exact, inputs[0], torch.nan)
    images = [constants.view(1, -1, 1, 1) for constants in inputs]
    if kind == "multiply":
        zero = (images[0] == 0) | (images[1] == 0)
        images = [torch.where(zero, 0.0, image) for image in images]
    if kind == "affine":
        images = [torch.where(operation.weight.view(-1, 1, 1) == 0, 0.0, images[0])]
    return operation.compute(images, operation.weight, operation.bias).flatten()


def without_weights(operation: Operation) -> Operation:
    """A convolution that adds only its bias to a residual does not need its input."""
    if operation.kind == "convolve" and len(operation.inputs) == 2 and not nonzero_filters(operation.weight).any():
        return Operation(
            "affine", operation.inputs[1:], operation.output, operation.activation, operation.name,
            torch.ones_like(operation.bias), operation.bias,
        )  # fmt: skip
    return operation


def nonzero_filters(weight: Tensor) -> Tensor:
    """(out,) where a filter has a weight that is not zero. NumPy is much faster at this than PyTorch."""
    return torch.from_numpy(weight.flatten(1).numpy().any(1))


def nonzero_channels(weight: Tensor) -> Tensor:
    """(in,) where an input channel has a weight that is not zero."""
    return torch.from_numpy(weight.flatten(1).numpy().any(0).reshape(weight.shape[1], -1).any(1))


Channels = dict[int, Tensor]  # by number of the value, one boolean or number for each channel


def needed_channels(operations: list[Operation], widths: dict[int, int]) -> tuple[Channels, Channels]:
    """The channels on which the logits depend, and those that something reads which is not tied to them."""
    needed = {number: torch.zeros(width, dtype=torch.bool) for number, width in widths.items()}
    read = {number: torch.zeros(width, dtype=torch.bool) for number, width in widths.items()}
    for number in 0, operations[-1].output:
        needed[number][:] = read[number][:] = True
    for operation in reversed(operations):
        out, x = needed[operation.output], operation.inputs[0]
        if operation.kind == "convolve" and not is_depthwise(operation, widths):
            if operation.groups > 1:  # it keeps all its channels
                out[:] = read[operation.output][:] = read[x][:] = True
            else:
                read[x] |= nonzero_channels(operation.weight if out.all() else operation.weight[out])
            needed[x] |= read[x]
        for number, inside, outside in ties(operation, widths):
            needed[number][inside[out[outside]]] = True
    return needed, read


def ties(operation: Operation, widths: dict[int, int]) -> list[tuple[int, Tensor, Tensor]]:
    """Which channels of an input go with which of the output: (number of the input, its channels, the output's)."""
    every = {number: torch.arange(widths[number]) for number in (*operation.inputs, operation.output)}
    x, out = operation.inputs[0], every[operation.output]
    if operation.kind == "concatenate":
        parts = out.split([widths[number] for number in operation.inputs])
        return [(number, every[number], part) for number, part in zip(operation.inputs, parts)]
    if operation.kind == "pad_channels":
        return [(x, every[x], every[x] + operation.channels[0])]
    if operation.kind != "convolve":
        return [(number, out, out) for number in operation.inputs]
    residual = [(number, out, out) for number in operation.inputs[1:]]
    if is_depthwise(operation, widths):
        return [(x, every[x].repeat_interleave(len(out) // widths[x]), out), *residual]
    return residual


def is_depthwise(operation: Operation, widths: dict[int, int]) -> bool:
    return operation.groups > 1 and operation.groups == widths[operation.inputs[0]]


def kept_channels(operations: list[Operation], read: Channels, widths: dict[int, int]) -> Channels:
    """The channels that are read, or tied to one that is; at least one of each value."""
    starts = dict(zip(widths, torch.tensor([0, *widths.values()]).cumsum(0).tolist()))
    labels = {number: torch.arange(width) + starts[number] for number, width in widths.items()}
    changed = True
    while changed:  # tied channels get the smallest of their labels
        changed = False
        for operation in (*operations, *reversed(operations)):
            for number, inside, outside in ties(operation, widths):
                first, second = labels[number], labels[operation.output]
                smallest = torch.minimum(first[inside], second[outside])
                changed |= not (torch.equal(first[inside], smallest) and torch.equal(second[outside], smallest))
                first.scatter_reduce_(0, inside, smallest, "amin")
                second[outside] = torch.minimum(second[outside], first[inside])
    kept = torch.zeros(sum(widths.values()), dtype=torch.bool)  # by label
    for number, channels in read.items():
        kept[labels[number][channels]] = True
    for operation in operations:
        if not kept[labels[operation.output]].any():
            kept[labels[operation.output][0]] = True
    return {number: kept[label] for number, label in labels.items()}


def narrowed(operation: Operation, needed: Channels, kept: Channels) -> Operation:
    """The operation on the kept channels."""
    x, out = kept[operation.inputs[0]], kept[operation.output]
    if operation.kind == "pad_channels":
        before, after = operation.channels
        return replace(operation, channels=(int(out[:before].sum()), int(out[len(out) - after :].sum())))
    if operation.weight is None:
        return operation
    weight, bias, unneeded = operation.weight, operation.bias, ~needed[operation.output][out]
    if not out.all():
        weight, bias = weight[out], bias[out]
    if operation.kind == "convolve" and operation.groups == 1 and not x.all():
        weight = weight[:, x]
    if unneeded.any():  # but tied to something that is needed
        weight, bias = weight.clone(), bias.clone()
        weight[unneeded] = bias[unneeded] = 0
    groups = int(x.sum()) if operation.groups == len(x) else operation.groups
    return replace(operation, weight=weight.contiguous(), bias=bias, groups=groups)
