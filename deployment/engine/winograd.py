"""Convolutions with too few zeros for skipping to pay: they use all weights, but a quarter of the multiplications.

This is Winograd's minimal filtering F(4x4, 3x3) as in Lavin and Gray (Fast algorithms for convolutional neural
networks, 2016). A tile of 6 x 6 inputs is transformed, 36 products of small matrices sum over the input channels, and a
second transform turns them into 4 x 4 outputs. A vector holds the same pixel of as many images as it has lanes.

The polynomials are evaluated at the points 0, 5/8, -5/8, 3/2, -3/2 and infinity. Their rounding error is about twice
that of a direct convolution; with the usual points 0, 1, -1, 2, -2 and infinity it is five times as large.
"""

# ruff: noqa: ARG001 (Numba prescribes the arguments of an intrinsic)

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from deployment.engine.kernels import VectorCode, f32, i64
from deployment.engine.layers import Convolution

POINTS = 5 / 8, 3 / 2
TILE = 4  # outputs of a tile in each direction
READ = TILE + 2  # inputs of a tile in each direction
PAIR = 2  # tiles that share each loaded weight


def filters_at_once(lanes: int) -> int:
    """The number of filters whose sums for a pair of tiles fit into the vector registers."""
    return 8 if lanes == 16 else 4


def applies(layer: Convolution) -> bool:
    """Whether a layer can be computed this way, provided that it writes at least 4 x 4 pixels."""
    return layer.weight.shape[2] == 3 and layer.stride == 1 and layer.weight.size > 0


def transformed(layers: list[Convolution], indices: list[int], lanes: int) -> tuple[dict[int, int], np.ndarray]:
    """The transformed weights of some layers, in the order in which the products read them.

    Returns where the weights of each layer begin, and all weights, (n,) float32. Those of one layer are (blocks, 36,
    in, filters of a block).
    """
    places, parts, at = {}, [np.zeros(0, np.float32)], 0
    for index in indices:
        values = transformed_weight(layers[index].weight, filters_at_once(lanes))
        places[index], at = at, at + values.size
        parts.append(values.ravel())
    return places, np.concatenate(parts)


def transformed_weight(weight: np.ndarray, at_once: int) -> np.ndarray:
    small, large = POINTS
    points = 0, small, -small, large, -large
    matrix = np.zeros((READ, 3))
    for row, point in enumerate(points):
        matrix[row] = point ** np.arange(3) / np.prod([point - other for other in points if other != point])
    matrix[-1, 2] = 1
    filters, channels, *_ = weight.shape
    blocks = -(-filters // at_once)
    values = np.zeros((blocks * at_once, channels, READ, READ))
    values[:filters] = np.einsum("ya,ocab,xb->ocyx", matrix, weight.astype(np.float64), matrix, optimize=True)
    values = values.reshape(blocks, at_once, channels, READ**2).transpose(0, 3, 2, 1)
    return values.astype(np.float32, order="C")


def scratch_floats(channels: int, lanes: int) -> int:
    """Floats for the transformed inputs of a pair of tiles and for the products of one block of filters."""
    return READ**2 * (PAIR * channels + 1 + PAIR * filters_at_once(lanes) + 1) * lanes


def input_transform(code: VectorCode, values: list) -> list:
    """The input transform in one dimension: 6 vectors -> 6 vectors."""
    small, large = POINTS
    low, high = small**2, large**2
    zero, one, two, three, four, five = values

    def with_times(total, factor, value):
        return code.fma(code.constant(factor), value, total)

    first, last = (
        with_times(with_times(end, -(low + high), middle), low * high, start)
        for start, middle, end in ((zero, two, four), (one, three, five))
    )
    found = [first]
    for point, other in ((small, high), (large, low)):
        even, odd = with_times(four, -other, two), with_times(three, -other, one)
        found += [with_times(even, point, odd), with_times(even, -point, odd)]
    return [*found, last]


def output_transform(code: VectorCode, values: list) -> list:
    """The output transform in one dimension: 6 vectors -> 4 vectors."""
    add, subtract = code.builder.fadd, code.builder.fsub
    first, at_small, at_minus_small, at_large, at_minus_large, last = values
    sums = add(at_small, at_minus_small), add(at_large, at_minus_large)
    differences = subtract(at_small, at_minus_small), subtract(at_large, at_minus_large)

    def powers(exponent: int, parts: tuple) -> ir.Value:
        small, large = (code.constant(point**exponent) for point in POINTS)
        return code.fma(small, parts[0], code.builder.fmul(large, parts[1]))

    return [add(first, add(*sums)), powers(1, differences), powers(2, sums), add(last, powers(3, differences))]


def both_ways(transform: Callable, code: VectorCode, square: list[list]) -> list[list]:
    """Apply a one-dimensional transform to the columns, then to the rows."""
    columns = [transform(code, list(column)) for column in zip(*square)]
    return [transform(code, list(row)) for row in zip(*columns)]


def input_kernel(lanes: int) -> Callable:
    """run(source, line, target, pitch) transforms a tile of 6 x 6 vectors, with `line` bytes from row to row, into 36
    vectors that are `pitch` bytes apart."""

    @intrinsic
    def run(typing, source, line, target, pitch):
        def codegen(context, builder, signature, args):
            source, line, target, pitch = args
            code = VectorCode(builder, lanes)
            square = code.grid(source, READ, READ, line)
            tile = both_ways(input_transform, code, [[code.load(place) for place in row] for row in square])
            for y, row in enumerate(tile):
                for x, value in enumerate(row):
                    code.store(value, code.at(target, pitch, READ * y + x))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return run


def product_kernel(lanes: int) -> Callable:
    """run(weights, source, channels, target) sums over channels, for a block of filters and a pair of tiles."""
    filters = filters_at_once(lanes)
    size = 4 * lanes

    @intrinsic
    def run(typing, weights, source, channels, target):
        def codegen(context, builder, signature, args):
            weights, source, channels, target = args
            code = VectorCode(builder, lanes)
            before = builder.block
            body, after = builder.append_basic_block("product"), builder.append_basic_block("stored")
            builder.branch(body)
            builder.position_at_end(body)
            index = builder.phi(i64)
            sums = [builder.phi(code.vector) for _ in range(filters * PAIR)]
            inputs = [code.load(code.at(source, PAIR * size, index, tile * size)) for tile in range(PAIR)]
            totals = []
            for k in range(filters):
                place = code.at(weights, 4 * filters, index, 4 * k)
                weight = code.splat(builder.load(builder.inttoptr(place, f32.as_pointer()), align=4))
                totals += [code.fma(weight, inputs[tile], sums[k * PAIR + tile]) for tile in range(PAIR)]
            following = builder.add(index, ir.Constant(i64, 1))
            builder.cbranch(builder.icmp_signed("<", following, channels), body, after)
            index.add_incoming(ir.Constant(i64, 0), before)
            index.add_incoming(following, body)
            for phi, total in zip(sums, totals):
                phi.add_incoming(code.constant(0), before)
                phi.add_incoming(total, body)
            builder.position_at_end(after)
            for k, total in enumerate(totals):
                code.store(total, builder.add(target, ir.Constant(i64, k * size)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return run


def output_kernel(lanes: int) -> Callable:
    """run(source, pitch, out, line, bias, residual, floor) transforms 36 vectors that are `pitch` bytes apart into a
    tile of 4 x 4 vectors with `line` bytes from row to row. It adds bias and residual (an address, or 0 for none) and
    raises outputs to at least `floor`."""

    @intrinsic
    def run(typing, source, pitch, out, line, bias, residual, floor):
        def codegen(context, builder, signature, args):
            source, pitch, out, line, bias, residual, floor = args
            code = VectorCode(builder, lanes)
            square = [[code.load(code.at(source, pitch, READ * y + x)) for x in range(READ)] for y in range(READ)]
            bias, floor = code.splat(bias), code.splat(floor)
            tile = both_ways(output_transform, code, square)
            sums = [[builder.fadd(value, bias) for value in row] for row in tile]
            outs, adds = code.grid(out, TILE, TILE, line), code.grid(residual, TILE, TILE, line)
            plain, added, after = (builder.append_basic_block(name) for name in ("plain", "added", "after"))
            builder.cbranch(builder.icmp_signed("!=", residual, ir.Constant(i64, 0)), added, plain)
            for block, both in ((plain, False), (added, True)):
                builder.position_at_end(block)
                for y in range(TILE):
                    for x in range(TILE):
                        value = builder.fadd(sums[y][x], code.load(adds[y][x])) if both else sums[y][x]
                        code.store(code.at_least(floor, value), outs[y][x])
                builder.branch(after)
            builder.position_at_end(after)
            return context.get_dummy_value()

        signature = types.void(*[types.int64] * 4, types.float32, types.int64, types.float32)
        return signature, codegen

    return run


def winograd_loop(lanes: int) -> Callable:
    """The loop over one operation, for compiled code. Each thread computes its own pairs of tiles."""
    transform_input, multiply, transform_output = input_kernel(lanes), product_kernel(lanes), output_kernel(lanes)
    at_once, size = filters_at_once(lanes), 4 * lanes
    squares = READ**2
    lowest, nothing = np.float32(-np.inf), np.float32(0)

    @njit(nogil=True)
    def run(op, memory, scratch, dense, biases, thread, threads):
        source, source_pitch, target, pitch, residual, relu, filters, channels, at, bias = op[1:11]
        rows, columns, source_line = op[11:14]
        line = (columns + 2) * lanes
        across, down = -(-columns // TILE), -(-rows // TILE)
        pairs = -(-across * down // PAIR)
        # One extra vector, or all outputs of a transform would fall into one set of the L1 cache.
        inputs_pitch, products_pitch = (PAIR * channels + 1) * size, (PAIR * at_once + 1) * size
        inputs, products = scratch, scratch + squares * inputs_pitch
        floor = nothing if relu else lowest
        for pair in range(pairs * thread // threads, pairs * (thread + 1) // threads):
            for part in range(PAIR):
                tile = min(PAIR * pair + part, across * down - 1)
                # The last tile of a row or column overlaps the previous one.
                y, x = min(TILE * (tile // across), rows - TILE), min(TILE * (tile % across), columns - TILE)
                start = memory + 4 * (source + y * source_line + x * lanes)
                for channel in range(channels):
                    to = inputs + (channel * PAIR + part) * size
                    transform_input(start + 4 * channel * source_pitch, 4 * source_line, to, inputs_pitch)
            for block in range(-(-filters // at_once)):
                weights = dense + 4 * (at + block * squares * channels * at_once)
                for square in range(squares):
                    multiply(
                        weights + 4 * square * channels * at_once,
                        inputs + square * inputs_pitch,
                        channels,
                        products + square * products_pitch,
                    )
                for tile in range(PAIR * pair, min(PAIR * pair + PAIR, across * down)):
                    part = tile % PAIR
                    y, x = min(TILE * (tile // across), rows - TILE), min(TILE * (tile % across), columns - TILE)
                    for o in range(block * at_once, min(filters, (block + 1) * at_once)):
                        place = o * pitch + y * line + x * lanes
                        transform_output(
                            products + ((o - block * at_once) * PAIR + part) * size,
                            products_pitch,
                            memory + 4 * (target + place),
                            4 * line,
                            biases[bias + o],
                            memory + 4 * (residual + place) if residual >= 0 else 0,
                            floor,
                        )

    return run
