"""What the Triton kernels share: launching, sizes, and a product of tiles that is right in Triton's interpreter too."""

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

IS_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether the kernels run in Triton's interpreter: numpy on the CPU, for tests where there is no GPU."""


def launch(kernel: Any, grid: Sequence[int], x: Tensor, *args: object, **constants: object) -> None:
    """Run a kernel on the device of x, its first argument; an empty grid runs nothing."""
    if 0 in grid:
        return
    with torch.cuda.device_of(x):
        kernel[tuple(grid)](x, *args, **constants)


def num_blocks_of(total: int, block: int) -> int:
    """Blocks that cover `total`."""
    return -(-total // block)


def power_of_two(at_least: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(0, at_least - 1).bit_length()


def num_warps(tile_elements: int) -> int:
    """Warps for a tile that is loaded, computed on and stored: 16 elements a thread, two loads of 16 bytes in bf16."""
    return min(16, max(1, tile_elements // 512))


def num_programs(x: Tensor, num_tiles: int) -> int:
    """Programs that share the tiles of a sum over all: two a multiprocessor, so that few partial sums remain."""
    if x.device.type != "cuda":
        return min(num_tiles, 2)
    return min(num_tiles, 2 * torch.cuda.get_device_properties(x.device).multi_processor_count)


@triton.jit
@no_type_check
def dot(a, b, total):
    """total + a b, summed in fp32.

    fp32 is multiplied as such, not rounded to tf32. The interpreter, which would multiply the bits of bf16 as integers,
    is given fp32.
    """
    if IS_INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
