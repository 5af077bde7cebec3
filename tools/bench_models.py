"""The models that the benchmarks run, ours and transformers' of the same sizes and weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anyres_tiler import XGEN_MM_GRIDS, TilingConfig
from bench_pairs import agree, peer
from blip3_lite import Blip3, Blip3Config, PackedBatch
from fused_kernels import linear_cross_entropy
from perceiver_resampler import ResamplerConfig
from phi3_lite import Phi3, Phi3Config
from siglip_lite import SiglipVision, SiglipVisionConfig

IGNORE = -100
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def small_lm() -> Phi3Config:
    """A language model between the demo's and Phi-3-mini, with its vocabulary."""
    return Phi3Config(
        vocab_size=32_064, width=384, num_layers=8, num_heads=6, num_kv_heads=6, mlp_width=1024, max_positions=32_768
    )


def random_lm(cfg: Phi3Config, dtype: torch.dtype = torch.float32) -> Phi3:
    """Ours, on weights drawn from a fixed seed."""
    return Phi3(cfg, generator=torch.Generator().manual_seed(0)).to(dtype)


def their_lm(model: Phi3) -> Any:
    """Phi3ForCausalLM with the weights of ours."""
    transformers, cfg = peer("transformers"), model.cfg
    config = transformers.Phi3Config(
        vocab_size=cfg.vocab_size, hidden_size=cfg.width, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads, intermediate_size=cfg.mlp_width,
        max_position_embeddings=cfg.max_positions, original_max_position_embeddings=cfg.max_positions,
        sliding_window=cfg.sliding_window, rms_norm_eps=cfg.norm_eps, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = transformers.Phi3ForCausalLM(config).to(model.model.norm.weight.dtype)
    theirs.load_state_dict(model.state_dict())
    return theirs


def their_tower(tower: SiglipVision) -> Any:
    """SiglipVisionModel on the weights of ours, in the same memory."""
    transformers, cfg = peer("transformers"), tower.cfg
    config = transformers.SiglipVisionConfig(
        hidden_size=cfg.width, intermediate_size=cfg.mlp_width, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, image_size=cfg.image_px, patch_size=cfg.patch_px, vision_use_head=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = transformers.SiglipVisionModel(config)
    # some versions have the tower's parts one level down
    inner = getattr(theirs, "vision_model", theirs)
    inner.load_state_dict(tower.state_dict(), assign=True)
    return theirs


@dataclass(frozen=True)
class TextBatch:
    """Samples end to end, and the same padded on the right as transformers takes them."""

    ids: Tensor
    targets: Tensor
    """The token behind each position where it is to be learnt, else -100."""
    cu_seqlens: Tensor
    padded_ids: Tensor
    attention: Tensor
    labels: Tensor
    """Of transformers: where a token is to be learnt, the token itself."""

    @property
    def num_tokens(self) -> int:
        """Real ones."""
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Of each sample."""
        return self.cu_seqlens.diff().tolist()


def text_batch(lengths: Sequence[int], num_targets: int, vocab_size: int) -> TextBatch:
    """Random samples of these lengths; the last `num_targets` tokens of each are to be learnt."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, vocab_size, (length,), generator=generator) for length in lengths]
    shape = (len(lengths), max(lengths))
    padded_ids, attention = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels, targets = torch.full(shape, IGNORE), []
    for row, sample in enumerate(ids):
        padded_ids[row, : len(sample)] = sample
        attention[row, : len(sample)] = 1
        labels[row, len(sample) - num_targets : len(sample)] = sample[-num_targets:]
        targets.append(torch.cat([labels[row, 1 : len(sample)], torch.tensor([IGNORE])]))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return TextBatch(torch.cat(ids), torch.cat(targets), bounds, padded_ids, attention, labels)


class LMStep:
    """A whole training step of either side: forward, backward, AdamW."""

    def __init__(self, cfg: Phi3Config, dtype: torch.dtype, batch: TextBatch, *, is_ours: bool) -> None:
        self.batch = batch
        ours = random_lm(cfg, dtype)
        self.model: Any = ours if is_ours else their_lm(ours)
        self.model.train()
        self.loss = self._our_loss if is_ours else self._their_loss
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def _our_loss(self) -> Tensor:
        model: Phi3 = self.model
        hidden = model(model.embed(self.batch.ids), cu_seqlens=self.batch.cu_seqlens)
        return linear_cross_entropy(hidden, model.head_weight, self.batch.targets)

    def _their_loss(self) -> Tensor:
        batch = self.batch
        return self.model(input_ids=batch.padded_ids, attention_mask=batch.attention, labels=batch.labels).loss

    def run(self) -> float:
        """One step; returns the loss before it."""
        loss = self.loss()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def same_lm(cfg: Phi3Config, dtype: torch.dtype, batch: TextBatch) -> str:
    """Check the loss and two gradients of both sides, those of the first layer and of the head.

    Raises:
        GateError: they differ.
    """
    steps = [LMStep(cfg, dtype, batch, is_ours=is_ours) for is_ours in (True, False)]
    losses = [step.loss() for step in steps]
    found = [agree("loss", losses[0], losses[1], TOLERANCE[dtype])]
    for loss in losses:
        loss.backward()
    for name in ("model.layers.0.self_attn.qkv_proj.weight", "lm_head.weight"):
        grads = [step.model.get_parameter(name).grad for step in steps]
        found.append(agree("gradient", grads[0], grads[1], 3 * TOLERANCE[dtype]))
    return f"{found[0]}, {found[-1]}"


def lm_flops(cfg: Phi3Config, lengths: Sequence[int], num_head_rows: int) -> float:
    """Operations of a step: products with weights three times (forward, two gradients), attention's square whole."""
    per_token = cfg.num_layers * (
        (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim * cfg.width
        + cfg.num_heads * cfg.head_dim * cfg.width
        + 3 * cfg.width * cfg.mlp_width
    )
    square = cfg.num_layers * cfg.num_heads * cfg.head_dim * 2 * sum(length**2 for length in lengths)
    return 6.0 * (per_token * sum(lengths) + square + cfg.vocab_size * cfg.width * num_head_rows)


def tower_flops(cfg: SiglipVisionConfig, num_tiles: int) -> float:
    """Operations of the tower's forward pass."""
    n, d = cfg.num_patches, cfg.width
    layer = n * (4 * d * d + 2 * d * cfg.mlp_width) + 2 * n * n * d
    return 2.0 * num_tiles * (n * 3 * cfg.patch_px**2 * d + cfg.num_layers * layer)


def resampler_flops(cfg: ResamplerConfig, num_tiles: int, num_patches: int) -> float:
    """Operations of a step of the connector behind a frozen tower."""
    q, n, d, inner = cfg.num_latents, num_patches, cfg.dim, cfg.inner_dim
    mixing = 2 * q * d * inner + 2 * (n + q) * d * inner + 2 * q * (n + q) * inner
    return 6.0 * num_tiles * (cfg.depth * (mixing + 2 * q * cfg.ff_mult * d * d) + q * d * cfg.dim_out)


def demo_joined() -> Blip3Config:
    """The demo's sizes, with patches in place of its convolution stem, which SiglipVisionModel has not."""
    return Blip3Config(
        vision=SiglipVisionConfig(
            image_px=96, patch_px=12, width=128, num_layers=3, num_heads=4, mlp_width=256, use_head=False
        ),
        connector=ResamplerConfig(dim=128, dim_out=128, depth=2, num_heads=4, head_dim=32, num_latents=16, ff_mult=3),
        lm=Phi3Config(
            vocab_size=512, width=128, num_layers=4, num_heads=4, num_kv_heads=4, mlp_width=384, max_positions=2048,
            init_std=0.08, residual_init_std=0.03,
        ),
        tiling=TilingConfig(tile_px=96, grids=((1, 1), *XGEN_MM_GRIDS)),
    )  # fmt: skip


@dataclass(frozen=True)
class PictureBatch:
    """Questions about pictures: packed for ours, and the padded text with each image token's place for the peer."""

    packed: PackedBatch
    text: TextBatch
    is_image: Tensor
    """bool[b, t], True = an image token goes here."""


def picture_batch(cfg: Blip3Config, tiles: Sequence[int], num_text: Sequence[int], num_targets: int) -> PictureBatch:
    """Samples of one picture of so many tiles, whose tokens come first, and so many tokens of text."""
    num_image = [count * cfg.connector.num_latents for count in tiles]
    text = text_batch(
        [image + words for image, words in zip(num_image, num_text, strict=True)], num_targets, cfg.lm.vocab_size
    )
    is_image = torch.arange(text.padded_ids.shape[1]) < torch.tensor(num_image)[:, None]
    side, generator = cfg.tiling.tile_px, torch.Generator().manual_seed(3)
    packed = PackedBatch(
        sample_ids=[str(index) for index in range(len(tiles))],
        ids=text.ids,
        targets=text.targets,
        positions=torch.cat([torch.arange(length) for length in text.lengths]),
        cu_seqlens=text.cu_seqlens,
        image_index=is_image[text.attention.bool()].nonzero()[:, 0],
        tiles=torch.randint(0, 256, (sum(tiles), 3, side, side), generator=generator, dtype=torch.uint8),
        valid=torch.ones(sum(tiles), cfg.vision.num_patches, dtype=torch.bool),
        tiles_per_image=tuple(tiles),
    )
    return PictureBatch(packed, text, is_image)


class TheirJoined(nn.Module):
    """SiglipVisionModel, Idefics2's perceiver with a projection behind it, and Phi3ForCausalLM.

    The perceiver's MLP is narrowed to as many operations as ours has: three matrices where ours has two.
    """

    def __init__(self, ours: Blip3) -> None:
        super().__init__()
        idefics2 = peer("transformers.models.idefics2.modeling_idefics2")
        cfg = ours.cfg.connector
        config = peer("transformers.models.idefics2.configuration_idefics2").Idefics2PerceiverConfig(
            hidden_size=cfg.dim, resampler_n_latents=cfg.num_latents, resampler_depth=cfg.depth,
            resampler_n_heads=cfg.num_heads, resampler_head_dim=cfg.head_dim, num_key_value_heads=cfg.num_heads,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        self.tower = their_tower(ours.vision_encoder).requires_grad_(False)
        self.connector = idefics2.Idefics2PerceiverResampler(config)
        for layer in self.connector.layers:
            layer.mlp = idefics2.Idefics2MLP(cfg.dim, 2 * cfg.ff_mult * cfg.dim // 3, cfg.dim, config.hidden_act)
        self.projection = nn.Linear(cfg.dim, cfg.dim_out)
        self.lm = their_lm(ours.lang_model)

    def image_tokens(self, batch: PictureBatch) -> Tensor:
        """Of all tiles, end to end."""
        assert batch.packed.tiles is not None
        pixels = batch.packed.tiles.float() / 127.5 - 1.0
        with torch.no_grad():
            features = self.tower(pixel_values=pixels).last_hidden_state
        context = self.connector(context=features, attention_mask=batch.packed.valid)
        context = context if isinstance(context, Tensor) else context.last_hidden_state
        return self.projection(context).flatten(0, 1)

    def loss(self, batch: PictureBatch, image_tokens: Tensor | None = None) -> Tensor:
        """Mean over the targets."""
        tokens = self.image_tokens(batch) if image_tokens is None else image_tokens
        text = batch.text
        embeds = self.lm.get_input_embeddings()(text.padded_ids)
        embeds = embeds.masked_scatter(batch.is_image[..., None], tokens)
        return self.lm(inputs_embeds=embeds, attention_mask=text.attention, labels=text.labels).loss


class JoinedStep:
    """A whole training step of the joined model of either side, the tower frozen."""

    def __init__(self, cfg: Blip3Config, batch: PictureBatch, *, is_ours: bool) -> None:
        self.batch = batch
        ours = Blip3(cfg, generator=torch.Generator().manual_seed(0))
        ours.vision_encoder.requires_grad_(False)
        self.model: Any = ours if is_ours else TheirJoined(ours)
        self.loss = self._our_loss if is_ours else self._their_loss
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def _our_loss(self) -> Tensor:
        return self.model.loss_sum(self.batch.packed) / self.batch.packed.num_targets

    def _their_loss(self) -> Tensor:
        return self.model.loss(self.batch)

    def run(self) -> float:
        """One step; returns the loss before it."""
        loss = self.loss()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


@torch.no_grad()
def same_joined(cfg: Blip3Config, batch: PictureBatch) -> str:
    """Check tower, and loss on the same image tokens; the two connectors are not the same function.

    Raises:
        GateError: they differ.
    """
    ours = Blip3(cfg, generator=torch.Generator().manual_seed(0))
    theirs = TheirJoined(ours)
    tiles = batch.packed.tiles
    assert tiles is not None
    features = ours.patch_features(tiles, batch.packed.valid)
    other = theirs.tower(pixel_values=tiles.float() / 127.5 - 1.0).last_hidden_state
    found = agree("features", features, other, 1e-4)
    loss = ours.loss_sum(batch.packed) / batch.packed.num_targets
    return f"{found}, {agree('loss', loss, theirs.loss(batch, ours.image_tokens(batch.packed)), 1e-4)}"


def joined_flops(cfg: Blip3Config, num_tiles: int, lengths: Sequence[int], num_head_rows: int) -> float:
    """Operations of a step, the tower frozen."""
    return (
        tower_flops(cfg.vision, num_tiles)
        + resampler_flops(cfg.connector, num_tiles, cfg.vision.num_patches)
        + lm_flops(cfg.lm, lengths, num_head_rows)
    )
