"""The matrices of the layers: without bias, and drawn by the model."""

from jaxtyping import Float
from torch import Tensor, nn

from fused_kernels import linear


class Projection(nn.Linear):
    """A matrix without bias, left undrawn: the model draws all its weights at once, in one place."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)

    def reset_parameters(self) -> None:
        """Draw nothing."""

    def forward(self, input: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        """Multiply with the matrix."""
        return linear(input, self.weight)
