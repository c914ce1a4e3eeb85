"""A CPU engine that skips the zeros of a pruned network: direct sparse convolution.

Every nonzero weight is one multiply-add of a broadcast value to a tile of outputs that stays in registers, as in
Park et al. (Faster CNNs with direct sparse convolutions and guided pruning, 2017) and Elsen et al. (Fast sparse
convnets, 2020). BatchNorm is folded into weights and biases; bias, residual and ReLU are part of the tile.

The vector of a multiply-add holds either neighbouring pixels of one image, which gives the lowest latency, or the
same pixel of as many images as a vector has lanes, which gives the highest throughput. Input channels are worked on
in blocks that fit the L1 cache, filters are shared among threads by their nonzeros. Numba compiles the loops when
an engine is made: nobody needs a C++ compiler.
"""

from sparse.engine import Engine
from sparse.kernels import lanes_of_this_cpu
from sparse.team import usable_processors

__all__ = ["Engine", "lanes_of_this_cpu", "usable_processors"]
