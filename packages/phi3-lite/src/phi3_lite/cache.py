"""Keys and values of a ragged batch, kept between decoding steps.

Rows begin at position 0 and differ in length: there is no padding on the left, and what lies behind a row's end is
never attended to.

    row 0  k k k k k . . .     lengths = [5, 2, 3], longest = 5, capacity = 8 (a whole number of blocks)
    row 1  k k . . . . . .
    row 2  k k k . . . . .

With long-context scaling (`Phi3Config.long_rope`) the keys of a row that outgrows the original window are not those of
the longer sequence: the other factors change every key, and with them every layer's input. Such a row is filled again,
once; for that the cache keeps what rows were fed until all are past the window.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fused_kernels import HeldKeys

from .config import Phi3Config
from .decoding import PlainLayers


class KVCache:
    """Keys and values of every layer for `batch` rows, grown by whole blocks of positions.

    Memory: 2 · num_layers · batch · capacity · num_kv_heads · head_dim numbers of `dtype`, and batch · capacity · width
    for as long as a row may have to be filled again. A step that grows copies one layer at a time, so the peak is one
    layer above that.
    """

    def __init__(
        self,
        cfg: Phi3Config,
        batch: int,
        *,
        block: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or block < 1:
            raise ValueError(f"KVCache: expected batch and block of at least 1, got {(batch, block)}; give larger ones")
        self.block = block
        self.lengths: Int[Tensor, " b"] = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = 0
        self.shortest = 0
        self.layers: PlainLayers | None = None
        """What is called on a CPU; made anew by each prefill."""
        self.rows: Int[Tensor, " b"] = torch.arange(batch, device=device)
        # head-major, [b, g, s, k]: a head's keys lie together in memory, as a step reads them
        shape = (batch, cfg.num_kv_heads, 0, cfg.head_dim)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(cfg.num_layers)]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(cfg.num_layers)]
        self._held: HeldKeys | None = None
        self._short = None if cfg.long_rope is None else cfg.long_rope.original_max_positions
        self._inputs: Tensor | None = None
        if self._short is not None:
            self._inputs = torch.empty((batch, 0, cfg.width), dtype=dtype, device=device)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """Positions that fit without growing."""
        return self._keys[0].shape[2]

    def reserve(self, positions: int) -> None:
        """Make room for `positions` positions a row; rounded up to whole blocks."""
        if positions <= self.capacity:
            return
        capacity = -(-positions // self.block) * self.block
        self._held = None
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                # zeros, not empty: a masked NaN would still poison a product with its zero weight
                new = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
                new[:, :, : self.longest] = old[:, :, : self.longest]
                tensors[layer] = new
        if self._inputs is not None:
            old = self._inputs
            self._inputs = old.new_zeros((old.shape[0], capacity, old.shape[2]))
            self._inputs[:, : self.longest] = old[:, : self.longest]

    @property
    def keeps_inputs(self) -> bool:
        """Whether what rows were fed is held, for some may have to be filled again."""
        return self._inputs is not None

    def keep_inputs(self, rows: Int[Tensor, " t"], positions: Int[Tensor, " t"], inputs: Float[Tensor, "t d"]) -> None:
        """Keep what is about to be written, where a row may have to be filled again; call before `advance`."""
        if self._short is not None and self.shortest > self._short:
            self._inputs = None
        if self._inputs is not None:
            self._inputs[rows, positions] = inputs.detach().to(self._inputs.dtype)

    def kept_inputs(self, row: int, length: int) -> Float[Tensor, "t d"]:
        """Return the first `length` inputs of a row that was no longer than the original window."""
        assert self._inputs is not None
        return self._inputs[row, :length]

    def outgrowing(self, counts: Int[Tensor, " b"] | int) -> list[int]:
        """Return the rows that these counts take from within the original window to beyond it."""
        most = counts if isinstance(counts, int) else int(counts.max())
        if (
            self._short is None
            or self.longest == 0
            or self.shortest > self._short
            or self.longest + most <= self._short
        ):
            return []
        is_outgrowing = (self.lengths <= self._short) & (self.lengths + counts > self._short)
        return is_outgrowing.nonzero()[:, 0].tolist()

    def write(
        self,
        layer: int,
        rows: Int[Tensor, " t"],
        positions: Int[Tensor, " t"],
        keys: Float[Tensor, "t g k"],
        values: Float[Tensor, "t g k"],
    ) -> None:
        """Store one key and value per (row, position); the lengths change only by `advance`."""
        self._keys[layer][rows, :, positions] = keys.to(self._keys[layer].dtype)
        self._values[layer][rows, :, positions] = values.to(self._values[layer].dtype)

    def extend(self, layer: int, keys: Float[Tensor, "b t g k"], values: Float[Tensor, "b t g k"]) -> None:
        """Store the next keys and values of rows that are all of one length; the lengths change only by `advance`."""
        # a plain copy: a fraction of the time that indices take
        span = slice(self.longest, self.longest + keys.shape[1])
        self._keys[layer][:, :, span] = keys.transpose(1, 2)
        self._values[layer][:, :, span] = values.transpose(1, 2)

    def append(self, layer: int, keys: Float[Tensor, "b g k"], values: Float[Tensor, "b g k"]) -> None:
        """Store each row's next key and value; the lengths change only by `advance`."""
        if self.shortest != self.longest:
            self.write(layer, torch.arange(self.batch, device=self.lengths.device), self.lengths, keys, values)
        else:
            self._keys[layer].select(2, self.longest).copy_(keys)
            self._values[layer].select(2, self.longest).copy_(values)

    def read(self, layer: int, first: int, end: int) -> tuple[Float[Tensor, "b g s k"], Float[Tensor, "b g s k"]]:
        """Return views on a layer's keys and values at positions first … end − 1 of all rows, head by head."""
        return self._keys[layer].narrow(2, first, end - first), self._values[layer].narrow(2, first, end - first)

    @property
    def held(self) -> HeldKeys:
        """What is held of all layers at once, to be read and written on."""
        if self._held is None:
            self._held = HeldKeys(self._keys, self._values)
        return self._held

    def advance(self, counts: Int[Tensor, " b"] | int) -> None:
        """Count newly written positions in, per row or the same for all."""
        self.lengths = self.lengths + counts
        if isinstance(counts, int):
            self.longest += counts
            self.shortest += counts
        else:
            self._measure()

    def count_up(self) -> None:
        """Count in one new position of each row that `lengths` count already."""
        self.longest += 1
        self.shortest += 1

    def select(self, rows: Int[Tensor, " c"]) -> None:
        """Keep only these rows, in this order; the way to drop finished ones. Spare blocks are given back."""
        self.lengths = self.lengths[rows]
        self.rows = torch.arange(self.batch, device=rows.device)
        self._held = None
        self._measure()
        capacity = -(-self.longest // self.block) * self.block
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old[:, :, :capacity][rows]
        if self._inputs is not None:
            self._inputs = self._inputs[:, :capacity][rows]

    def can_shorten(self, length: int) -> bool:
        """Whether rows can go on from their first `length` positions.

        Not where a row has outgrown the original window of long-context scaling and would be back within it.
        """
        return self._short is None or self.longest <= self._short or length > self._short

    def shorten(self, length: int) -> None:
        """Forget what stands behind the first `length` positions of every row."""
        self.lengths = self.lengths.clamp(max=length)
        self._measure()

    def _measure(self) -> None:
        self.shortest, self.longest = (int(x) for x in torch.stack(self.lengths.aminmax()).tolist())
