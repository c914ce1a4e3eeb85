"""The compiled loops: they run a whole network for one image or for a group of images."""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit

from deployment.engine.kernels import barrier, clear, clear_few, copy, copy_even, mean, tile_kernel
from deployment.engine.winograd import winograd_loop

# The operations, and the columns of their rows in the table. Places are in floats from the start of the arena. A pitch
# is the number of floats from one channel, block or line to the next.
#
# LOAD      one image: place, pitch of channels
#           a group: place, channels, height, width
# SHIFT     one image: place, pitch of channels, channels, height, width, place of the copies, kernel, stride, lines and
#           columns of a copy
# CONVOLVE  place, pitch of blocks, target, its pitch of channels, residual or -1, ReLU, filters, blocks, first start,
#           first bias, layer; then one image: vectors; a group: rows, columns, stride, pitch of the source's lines
# CLASSIFY  place, pitch of channels, channels; then one image: pixels; a group: height, width
# WINOGRAD  a group: place, pitch of channels, target, its pitch of channels, residual or -1, ReLU, filters, channels,
#           place of the weights, first bias, rows, columns, pitch of the source's lines, place of the scratch memory
LOAD, SHIFT, CONVOLVE, CLASSIFY, WINOGRAD = range(5)
COLUMNS = 16


@cache
def compiled(lanes: int) -> tuple[Callable, Callable]:
    """The two loops over the operations of a network, for vectors of `lanes` floats: `run_image` for one image and
    `run_group` for `lanes` images.

    All threads that share the images call the loop, each with its index; `shares` holds the filters of each.
    """
    full = 16 if lanes == 16 else 8  # vectors in a tile: as many as the registers hold
    wide, half, quarter, eighth = (tile_kernel(lanes, 1, full >> k, 1, 1 << k) for k in range(4))
    single = tile_kernel(lanes, 1, 1, 1, 8)
    high = full // 4
    tile1, tile2 = (tile_kernel(lanes, high, 4, step) for step in (1, 2))
    small1, small2 = (tile_kernel(lanes, 2, 2, step, full // 4) for step in (1, 2))
    winograd = winograd_loop(lanes)
    lowest, nothing = np.float32(-np.inf), np.float32(0)

    @njit(nogil=True)
    def shift(memory, op, thread, threads):
        """Copy each channel once for each horizontal offset and stride phase at which a weight reads it, so that the
        pixels for a vector of outputs lie side by side at an aligned address."""
        source, pitch, channels, height, width, target, kernel, stride, lines, columns = op[1:11]
        pad = kernel // 2
        for channel in range(channels * thread // threads, channels * (thread + 1) // threads):
            plane = memory + 4 * source + 4 * channel * pitch
            for x in range(kernel):
                for phase in range(stride):
                    # Line i of this copy is line stride * i + up of the image; lines outside the image are zero.
                    up, left = phase - stride, x - pad
                    to = memory + 4 * (target + ((channel * kernel + x) * stride + phase) * lines * columns)
                    first = max(0, (stride - 1 - up) // stride)
                    last = max(first, min(lines, (height - 1 - up) // stride + 1))
                    clear(to, 4 * first * columns)
                    clear(to + 4 * last * columns, 4 * (lines - last) * columns)
                    if stride == 1:
                        begin = to + 4 * first * columns
                        skip = max(0, -left)
                        size = 4 * ((last - first) * columns - abs(left))
                        copy(begin + 4 * skip, plane + 4 * ((first + up) * width + max(0, left)), size)
                        for line in range(first, last):
                            edge = to + 4 * (line * columns + (0 if left < 0 else columns - left))
                            clear_few(edge, abs(left))
                    else:
                        begin = max(0, (stride - 1 - left) // stride)
                        end = max(begin, min(columns, (width - 1 - left) // stride + 1))
                        for line in range(first, last):
                            edge = to + 4 * line * columns
                            line_source = plane + 4 * ((stride * line + up) * width + left)
                            for column in range(0, columns - 7, 8):
                                copy_even(edge + 4 * column, line_source + 8 * column)
                            for column in range(columns // 8 * 8, columns):
                                copy(edge + 4 * column, line_source + 8 * column, 4)
                            clear_few(edge, begin)
                            clear_few(edge + 4 * end, columns - end)

    @njit(nogil=True)
    def run_image(
        operations,
        arena,
        own,  # noqa: ARG001 (only groups use it)
        nonzeros,
        starts,
        biases,
        shares,
        dense,  # noqa: ARG001 (only groups use it)
        classifier,
        logits,
        image,
        thread,
        threads,
        counter,
    ):
        memory, weights = arena.ctypes.data, nonzeros.ctypes.data
        phase = 0
        for row in range(len(operations)):
            op = operations[row]
            if op[0] == LOAD:
                if thread == 0:
                    place, pitch = op[1:3]
                    for channel in range(len(image)):
                        for y in range(image.shape[1]):
                            for x in range(image.shape[2]):
                                arena[place + channel * pitch + y * image.shape[2] + x] = image[channel, y, x]
            elif op[0] == SHIFT:
                shift(memory, op, thread, threads)
            elif op[0] == CONVOLVE:
                source, block_pitch, target, pitch, residual, relu, filters, blocks, at, bias, layer, count = op[1:13]
                vector = 0
                while vector < count:
                    left = count - vector
                    shape = 0 if left >= full else 1 if 2 * left >= full else 2 if 4 * left >= full else 3
                    if 8 * left < full:
                        shape = 4
                    for block in range(blocks):
                        start = memory + 4 * (source + block * block_pitch + vector * lanes)
                        first, last = block == 0, block == blocks - 1
                        floor = nothing if relu and last else lowest
                        for o in range(shares[layer, thread], shares[layer, thread + 1]):
                            a, z = starts[at + block * filters + o], starts[at + block * filters + o + 1]
                            if a == z and not first and not last:
                                continue
                            out = memory + 4 * (target + o * pitch + vector * lanes)
                            add = memory + 4 * (residual + o * pitch + vector * lanes) if residual >= 0 else 0
                            b = biases[bias + o]
                            if shape == 0:
                                wide(out, 0, weights, a, z, start, 0, b, add, first, floor)
                            elif shape == 1:
                                half(out, 0, weights, a, z, start, 0, b, add, first, floor)
                            elif shape == 2:
                                quarter(out, 0, weights, a, z, start, 0, b, add, first, floor)
                            elif shape == 3:
                                eighth(out, 0, weights, a, z, start, 0, b, add, first, floor)
                            else:
                                single(out, 0, weights, a, z, start, 0, b, add, first, floor)
                    vector += max(1, full >> shape)
            elif thread == 0:
                source, pitch, channels, pixels = op[1:5]
                logits[0] = classifier[:, channels]
                for channel in range(channels):
                    average = mean(arena[source + channel * pitch : source + channel * pitch + pixels])
                    for label in range(len(classifier)):
                        logits[0, label] += classifier[label, channel] * average
            phase += 1
            barrier(counter, phase, threads)

    @njit(nogil=True)
    def run_group(
        operations,
        arena,
        own,
        nonzeros,
        starts,
        biases,
        shares,
        dense,
        classifier,
        logits,
        images,
        thread,
        threads,
        counter,
    ):
        memory, weights = arena.ctypes.data, nonzeros.ctypes.data
        phase = 0
        for row in range(len(operations)):
            op = operations[row]
            if op[0] == LOAD:
                target, channels, height, width = op[1:5]
                for y in range(height * thread // threads, height * (thread + 1) // threads):
                    for channel in range(channels):
                        to = target + ((channel * (height + 2) + y + 1) * (width + 2) + 1) * lanes
                        for image in range(len(images)):
                            for x in range(width):
                                arena[to + x * lanes + image] = images[image, channel, y, x]
            elif op[0] == CONVOLVE:
                (source, block_pitch, target, pitch, residual, relu, filters, blocks, at, bias, layer) = op[1:12]
                rows, columns, stride, source_line = op[12:16]
                line = (columns + 2) * lanes
                if rows >= high and columns >= 4:
                    shape, tall, broad = 0, high, 4
                elif rows >= 2 and columns >= 2:
                    shape, tall, broad = 2, 2, 2
                else:
                    shape, tall, broad = 4, 1, 1
                if stride == 2:
                    shape += 1
                for ty in range(0, rows, tall):
                    y = min(ty, rows - tall)
                    for tx in range(0, columns, broad):
                        x = min(tx, columns - broad)  # the last tile overlaps the previous one
                        for block in range(blocks):
                            start = source + block * block_pitch + stride * (y * source_line + x * lanes)
                            start = memory + 4 * start
                            first, last = block == 0, block == blocks - 1
                            floor = nothing if relu and last else lowest
                            for o in range(shares[layer, thread], shares[layer, thread + 1]):
                                a, z = starts[at + block * filters + o], starts[at + block * filters + o + 1]
                                if a == z and not first and not last:
                                    continue
                                place = o * pitch + y * line + x * lanes
                                out = memory + 4 * (target + place)
                                add = memory + 4 * (residual + place) if residual >= 0 else 0
                                b = biases[bias + o]
                                n, m = 4 * line, 4 * stride * source_line
                                if shape == 0:
                                    tile1(out, n, weights, a, z, start, m, b, add, first, floor)
                                elif shape == 1:
                                    tile2(out, n, weights, a, z, start, m, b, add, first, floor)
                                elif shape == 2:
                                    small1(out, n, weights, a, z, start, m, b, add, first, floor)
                                elif shape == 3:
                                    small2(out, n, weights, a, z, start, m, b, add, first, floor)
                                else:
                                    single(out, n, weights, a, z, start, m, b, add, first, floor)
            elif op[0] == WINOGRAD:
                winograd(op, memory, own.ctypes.data + 4 * op[14], dense.ctypes.data, biases, thread, threads)
            elif thread == 0:
                source, pitch, channels, rows, columns = op[1:6]
                sums = np.empty(lanes, np.float32)
                for image in range(len(images)):
                    logits[image] = classifier[:, channels]
                for channel in range(channels):
                    sums[:] = nothing
                    for y in range(rows):
                        for x in range(columns):
                            at = source + channel * pitch + (y * (columns + 2) + x) * lanes
                            sums += arena[at : at + lanes]
                    for image in range(len(images)):
                        for label in range(len(classifier)):
                            logits[image, label] += classifier[label, channel] * (sums[image] / (rows * columns))
            phase += 1
            barrier(counter, phase, threads)

    return run_image, run_group
