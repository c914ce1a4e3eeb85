"""What Numba's Python cannot express: a tile of outputs held in vector registers, raw memory, and a counter that
several threads share. Each is a Numba intrinsic that emits LLVM instructions."""

# ruff: noqa: ARG001 (Numba prescribes the arguments of an intrinsic)

import ctypes
from collections.abc import Callable

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


def lanes_of_this_cpu() -> int:
    """Floats in the widest vector of the processor. 8, which every processor can emulate, if that is unknown."""
    return 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8


class VectorCode:
    """Emits instructions for vectors of `lanes` floats. Addresses are integers, in bytes."""

    def __init__(self, builder: ir.IRBuilder, lanes: int):
        self.builder, self.lanes = builder, lanes
        self.vector = ir.VectorType(f32, lanes)
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        self.multiply_add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{lanes}f32")

    def constant(self, value: float) -> ir.Value:
        return ir.Constant(self.vector, [value] * self.lanes)

    def splat(self, scalar: ir.Value) -> ir.Value:
        undefined = ir.Constant(self.vector, ir.Undefined)
        first_lane = self.builder.insert_element(undefined, scalar, ir.Constant(i32, 0))
        lanes = ir.Constant(ir.VectorType(i32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first_lane, undefined, lanes)

    def at(self, address: ir.Value, pitch: ir.Value | int, index: ir.Value | int, more: int = 0) -> ir.Value:
        """The address `pitch * index + more` bytes after `address`."""
        pitch, index = (ir.Constant(i64, value) if isinstance(value, int) else value for value in (pitch, index))
        address = self.builder.add(address, self.builder.mul(pitch, index))
        return self.builder.add(address, ir.Constant(i64, more)) if more else address

    def grid(self, address: ir.Value, rows: int, columns: int, pitch: ir.Value, step: int = 1) -> list[list[ir.Value]]:
        """The addresses of rows of vectors: rows are `pitch` bytes apart, vectors in a row `step` vectors."""
        starts = [self.at(address, pitch, row) for row in range(rows)]
        return [[self.at(start, 4 * self.lanes * step, column) for column in range(columns)] for start in starts]

    def load(self, address: ir.Value) -> ir.Value:
        return self.builder.load(self.builder.inttoptr(address, self.vector.as_pointer()), align=4)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        self.builder.store(value, self.builder.inttoptr(address, self.vector.as_pointer()), align=4)

    def fma(self, one: ir.Value, other: ir.Value, total: ir.Value) -> ir.Value:
        return self.builder.call(self.multiply_add, [one, other, total])

    def at_least(self, lowest: ir.Value, value: ir.Value) -> ir.Value:
        """The larger of both. llvm.maxnum would replace a NaN by a number."""
        return self.builder.select(self.builder.fcmp_ordered("<", value, lowest), lowest, value)


def tile_kernel(lanes: int, rows: int, columns: int, step: int, unroll: int = 1) -> Callable:
    """A function for compiled code that computes one output channel of one tile of `rows` x `columns` vectors.

    run(out, out_pitch, nonzeros, start, stop, source, source_pitch, bias, residual, first, floor) takes each nonzero
    from `start` to `stop` and adds its value times the vectors at source + its offset to the tile. A nonzero is one
    64-bit word, the offset in the low half and the value in the high half. Addresses, offsets and the pitches between
    rows are in bytes. In the source, the vectors of a row are `step` vectors apart. With `first`, the tile starts as
    bias plus residual (an address, or 0 for none), otherwise with the contents of `out`. No output is below `floor`.

    Loops compiled by Numba keep the tile in memory; these keep it in registers. `unroll` partial sums of the tile hide
    the latency of a multiply-add when one tile has too few vectors to do so.
    """

    @intrinsic
    def run(typing, out, out_pitch, nonzeros, start, stop, source, source_pitch, bias, residual, first, floor):
        integer, real = types.int64, types.float32
        signature = types.void(*[integer] * 7, real, integer, integer, real)

        def codegen(context, builder, signature, args):
            out, out_pitch, nonzeros, start, stop, source, source_pitch, bias, residual, first, floor = args
            code = VectorCode(builder, lanes)
            vector = code.vector

            def constant(value):
                return ir.Constant(i64, value)

            def vectors(address, pitch, step=1):
                return [place for row in code.grid(address, rows, columns, pitch, step) for place in row]

            def nonzero(index):
                """Value and offset in one word. The load is atomic, or LLVM would repeat it at each use."""
                address = builder.add(nonzeros, builder.shl(index, constant(3)))
                return builder.load_atomic(builder.inttoptr(address, i64.as_pointer()), "monotonic", 8)

            def multiply_add(word, tile):
                offset = builder.and_(word, constant(2**32 - 1))
                value = code.splat(builder.bitcast(builder.trunc(builder.lshr(word, constant(32)), i32), f32))
                addresses = vectors(builder.add(source, offset), source_pitch, step)
                return [code.fma(value, code.load(address), old) for address, old in zip(addresses, tile)]

            def loop(name, start, count, tiles):
                """for index in range(start, stop - count + 1, count): tiles[k] += nonzero index + k

                The words of the next nonzeros are loaded before the vectors of the current ones. Otherwise a processor
                that executes loads in order would wait for each word before it knows the next address.
                """
                before = builder.block
                ahead = max(2, count) if count <= 4 else 0
                early = [nonzero(builder.add(start, constant(k))) for k in range(ahead)]
                test, body, after = (builder.append_basic_block(f"{name}.{part}") for part in ("test", "body", "end"))
                builder.branch(test)
                builder.position_at_end(test)
                index = builder.phi(i64)
                known = [builder.phi(i64) for _ in range(ahead)]
                old = [[builder.phi(vector) for _ in range(rows * columns)] for _ in tiles]
                following = builder.add(index, constant(count))
                builder.cbranch(builder.icmp_signed("<=", following, stop), body, after)
                builder.position_at_end(body)
                words = known + [nonzero(builder.add(index, constant(ahead + k))) for k in range(count)]
                new = [multiply_add(words[k], tile) if k < count else tile for k, tile in enumerate(old)]
                builder.branch(test)
                index.add_incoming(start, before)
                index.add_incoming(following, body)
                for phi, first_word, next_word in zip(known, early, words[count:]):
                    phi.add_incoming(first_word, before)
                    phi.add_incoming(next_word, body)
                for phis, initial, final in zip(old, tiles, new):
                    for phi, first_value, next_value in zip(phis, initial, final):
                        phi.add_incoming(first_value, before)
                        phi.add_incoming(next_value, body)
                builder.position_at_end(after)
                return index, old

            outs = vectors(out, out_pitch)
            fresh, plain, added, again, begin = (
                builder.append_basic_block(name) for name in ("fresh", "plain", "added", "again", "begin")
            )
            zero = constant(0)
            builder.cbranch(builder.icmp_signed("!=", first, zero), fresh, again)
            builder.position_at_end(fresh)
            biases = code.splat(bias)
            builder.cbranch(builder.icmp_signed("!=", residual, zero), added, plain)
            builder.position_at_end(plain)
            builder.branch(begin)
            builder.position_at_end(added)
            sums = [builder.fadd(biases, code.load(address)) for address in vectors(residual, out_pitch)]
            builder.branch(begin)
            builder.position_at_end(again)
            olds = [code.load(address) for address in outs]
            builder.branch(begin)
            builder.position_at_end(begin)
            tile = [builder.phi(vector) for _ in range(rows * columns)]
            for phi, total, old in zip(tile, sums, olds):
                phi.add_incoming(biases, plain)
                phi.add_incoming(total, added)
                phi.add_incoming(old, again)
            nothing = [code.constant(0)] * (rows * columns)
            tiles = [tile] + [nothing] * (unroll - 1)
            index, tiles = loop("unrolled", start, unroll, tiles)
            if unroll > 1:
                index, tiles = loop("rest", index, 1, tiles)
            lowest = code.splat(floor)
            for place, address in enumerate(outs):
                total = tiles[0][place]
                for other in tiles[1:]:
                    total = builder.fadd(total, other[place])
                code.store(code.at_least(lowest, total), address)
            return context.get_dummy_value()

        return signature, codegen

    return run


@intrinsic
def arrive(typing, counter):
    """Atomically add 1 to the integer at an address."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], i64.as_pointer())
        builder.atomic_rmw("add", pointer, ir.Constant(i64, 1), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def load_counter(typing, counter):
    """Atomically read the integer at an address."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], i64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def copy(typing, target, source, size):
    """Copy `size` bytes from the address `source` to the address `target`."""

    def codegen(context, builder, signature, args):
        target, source = (builder.inttoptr(address, ir.IntType(8).as_pointer()) for address in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def clear(typing, target, size):
    """Set `size` bytes at an address to 0."""

    def codegen(context, builder, signature, args):
        cgutils.memset(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def copy_even(typing, target, source):
    """Copy 8 floats, taking every other float of the source."""

    def codegen(context, builder, signature, args):
        wide, narrow, indices = (
            ir.VectorType(f32, 16),
            ir.VectorType(f32, 8),
            ir.VectorType(i32, 8),
        )
        pair = builder.load(builder.inttoptr(args[1], wide.as_pointer()))
        pair.align = 4
        even = builder.shuffle_vector(pair, pair, ir.Constant(indices, list(range(0, 16, 2))))
        stored = builder.store(even, builder.inttoptr(args[0], narrow.as_pointer()))
        stored.align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def clear_one(typing, target):
    """Set one float at an address to 0."""

    def codegen(context, builder, signature, args):
        builder.store(ir.Constant(f32, 0.0), builder.inttoptr(args[0], f32.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@njit(nogil=True)
def clear_few(target, count):
    """Set `count` floats at an address to 0."""
    for place in range(count):
        clear_one(target + 4 * place)


@njit(nogil=True, fastmath={"reassoc", "nsz"})
def mean(values):
    """The mean of an array. Additions may be reordered, so that the compiler can use vectors."""
    total = np.float32(0)
    for value in values:
        total += value
    return total / np.float32(len(values))


try:
    sched_yield = ctypes.CDLL(None).sched_yield
    sched_yield.argtypes, sched_yield.restype = (), ctypes.c_int
except (AttributeError, OSError, TypeError):  # not a POSIX system

    @njit(nogil=True)
    def sched_yield():
        return 0


@njit(nogil=True)
def barrier(counter, phase, threads):
    """Wait until all threads have arrived. `phase` is the number of this barrier, from 1."""
    if threads > 1:
        arrive(counter)
        looks = 0
        while load_counter(counter) < phase * threads:
            looks += 1
            if looks > 10000:  # the thread it waits for may need this processor
                sched_yield()
