"""How matrices lie in memory: on large pages, and as one token's product reads them best.

A product x Wᵀ with one row of x is bound by reading W. The kernels in C++ read it row by row, as it lies in training.
Where they cannot run, PyTorch's product makes of that one short sum for each row of W; column by column it is one long
run over all outputs for each input, which keeps up with memory where W has many more outputs. On two AVX-512 cores
(copies at 20 GB/s) GB/s of weights by PyTorch's product, by row and by column:

                 384 → 32,064   384 → 2,048   1,024 → 384   3,072 → 9,216
    fp32              16             14             15             20
                      22             16             15             21
    bf16              10              8             10             12
                      20              8              5             19

In pages of 4 KiB a weight's addresses are looked up as often as they change page. Pages of 2 MiB made a step of a small
model (107 MB in fp32) 6 to 14 % shorter on the same two cores, in a virtual machine; 0.1 s to move them there.
"""

import ctypes
import sys

import torch

from fused_kernels.native import refuse_native

from .model import Head, Phi3
from .projection import Projection

# Below so many outputs for each input nothing is gained.
_FEWEST_OUTPUTS_PER_INPUT = 2
_LARGE_PAGE = 2 << 20
# Linux 6.1: the pages of this range become a large one now, whatever the machine's setting; contents stay.
_MADV_COLLAPSE = 25


@torch.no_grad()
def lay_out_for_decoding(model: Phi3) -> None:
    """Lay a model's matrices so that a step reads them fast, in place, one at a time.

    For a model on a CPU that only answers: values, names and shapes stay. Where the kernels in C++ cannot run, the
    strides of matrices with far more outputs than inputs change, which not every writer of files takes; quantised ones,
    adapters and a head that is tied to the embedding stay. Memory then moves to large pages, where Linux has them.
    """
    weight = model.model.norm.weight
    if weight.device.type != "cpu":
        return
    if refuse_native(weight.device, weight.dtype) is not None:
        _lay_by_columns(model)
    # of the embedding a step reads a row, but for a tied head
    embedding = () if model.cfg.is_head_tied else model.model.embed_tokens.state_dict(keep_vars=True).values()
    unread = {id(tensor) for tensor in embedding}
    _move_to_large_pages([tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in unread])


def _lay_by_columns(model: Phi3) -> None:
    matrices = [module.weight for module in model.modules() if type(module) is Projection]
    if type(model.lm_head) is Head and model.lm_head.weight is not None:
        matrices.append(model.lm_head.weight)
    for weight in matrices:
        if weight.shape[0] >= _FEWEST_OUTPUTS_PER_INPUT * weight.shape[1]:
            weight.data = weight.data.t().contiguous().t()


def _move_to_large_pages(tensors: list[torch.Tensor]) -> None:
    """Ask for large pages where these lie. A page that cannot be had, or an older kernel, leaves things as they are."""
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    ranges = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors if tensor.nbytes]
    if sum(end - start for start, end in ranges) < _LARGE_PAGE:
        return
    pages = {page for start, end in ranges for page in range(start // _LARGE_PAGE, (end - 1) // _LARGE_PAGE + 1)}
    for page in sorted(pages):
        madvise(page * _LARGE_PAGE, _LARGE_PAGE, _MADV_COLLAPSE)
