"""How matrices lie in memory: in training row by row, for decoding on a CPU as one token's product reads them best.

A product x Wᵀ with one row of x is bound by reading W. Row by row that is one short sum for each row of W; column by
column it is one long run over all outputs for each input, which keeps up with memory where W has many more outputs.
On two AVX-512 cores (copies at 20 GB/s) GB/s of weights, by row and by column:

                 384 → 32,064   384 → 2,048   1,024 → 384   3,072 → 9,216
    fp32              16             14             15             20
                      22             16             15             21
    bf16              10              8             10             12
                      20              8              5             19
"""

import torch

from .model import Head, Phi3
from .projection import Projection

# Below so many outputs for each input nothing is gained.
_FEWEST_OUTPUTS_PER_INPUT = 2


@torch.no_grad()
def lay_out_for_decoding(model: Phi3) -> None:
    """Lay the matrices that have far more outputs than inputs column by column, in place, one at a time.

    For a model on a CPU that only answers: values, names and shapes stay, strides change, which not every writer of
    files takes. Quantised matrices, adapters and a head that is tied to the embedding stay as they are.
    """
    matrices = [module.weight for module in model.modules() if type(module) is Projection]
    if type(model.lm_head) is Head and model.lm_head.weight is not None:
        matrices.append(model.lm_head.weight)
    for weight in matrices:
        if weight.device.type == "cpu" and weight.shape[0] >= _FEWEST_OUTPUTS_PER_INPUT * weight.shape[1]:
            weight.data = weight.data.t().contiguous().t()
