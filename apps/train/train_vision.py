"""A vision tower from nothing, on drawn pictures: a stand-in for published SigLIP weights, which a fresh machine lacks.

Two objectives. `dense`: each patch feature predicts what is drawn under the patch and where (labels that only a drawn
world has), and each image token the same of its cell of patches, so that the connector begins as a map of the picture.
`sigmoid`: SigLIP's own loss between pictures and captions (arXiv:2303.15343), for the tower alone; it needs more time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from blip3_lite import Blip3, Blip3Config
from phi3_lite import HFTokenizer, Phi3
from scene_world import (
    COLOUR_NAMES,
    FORMS,
    NUM_COLOURS,
    NUM_FORMS,
    NUM_SYMBOLS,
    SYMBOLS,
    UNKNOWN,
    PictureKind,
)
from siglip_lite import (
    Siglip,
    SiglipConfig,
    SiglipTextConfig,
    sigmoid_loss,
)
from train_config import WarmupConfig
from train_stages import CheckpointFiles
from train_vision_data import MAX_CAPTION_TOKENS, WARMUP_KINDS, DenseStream, PairBatch, PairStream, TileBatch
from trainer_lite import FitResult, LossSum, Progress, RunFolder, StopFlag, Trainer

BACKGROUND_WEIGHT = 0.1
"""Weight of patches with nothing on them, which are most, against 1 for the others."""
EDGE_WEIGHT = 5.0
BLANK_WEIGHT = 0.3
"""Weight of cells with nothing in them, as above."""
WORD_WEIGHT = 5.0
PLACE_WEIGHT = 0.3


@dataclass(frozen=True)
class Words:
    """Embeddings of a language model: of the names of colours, forms and symbols, and of a sign that says nothing."""

    kinds: tuple[Float[Tensor, "n width"], Float[Tensor, "n width"], Float[Tensor, "n width"]]
    """Each without its id 0."""
    blank: Float[Tensor, " width"]


@torch.no_grad()
def label_words(lm: Phi3, tokenizer: HFTokenizer) -> Words:
    """The language model's own embeddings of the labels' names, as they stand in a text (behind a space).

    A name of several tokens is their mean.
    """

    def embedded(text: str) -> Float[Tensor, " width"]:
        return lm.embed(torch.tensor(tokenizer.encode(text), device=lm.model.norm.weight.device)).mean(0)

    colours, forms, symbols = (
        torch.stack([embedded(f" {name}") for name in names]) for names in (COLOUR_NAMES, FORMS[1:], SYMBOLS)
    )
    return Words((colours, forms, symbols), embedded(","))


class WordTargets(nn.Module):
    """Where the two image tokens of a cell should lie: on the words for the colour and for the form drawn there.

    So a language model that knows the words can read a picture as it reads a text. A printed symbol stands in the place
    of the form; where there is nothing, both tokens are `blank`.
    """

    colours: Float[Tensor, "n width"]
    forms: Float[Tensor, "n width"]
    symbols: Float[Tensor, "n width"]

    def __init__(self, words: Words) -> None:
        super().__init__()
        for name, kind in zip(("colours", "forms", "symbols"), words.kinds, strict=True):
            self.register_buffer(name, torch.cat((words.blank[None], kind)))
        self.scale = torch.cat(words.kinds).square().sum(-1).mean().item()

    def forward(self, labels: Int64[Tensor, "b 3 n"], cells: int) -> tuple[Float[Tensor, "b c 2 width"], Tensor]:
        """Mean over the labelled patches of each cell, row-major, and how many of its patches are labelled [b, c].

        labels: of a square of patches; `cells`: their number along a side.
        """
        per = math.isqrt(labels.shape[-1]) // cells
        in_cells = rearrange(labels, "b k (row r col c) -> b (row col) (r c) k", row=cells, r=per, col=cells, c=per)
        colour, form, symbol = in_cells.clamp_min(0).unbind(-1)
        named = torch.where((symbol > 0)[..., None], self.symbols[symbol], self.forms[form])
        words = torch.stack((self.colours[colour], named), dim=-2)
        is_on = (in_cells > 0).any(-1)
        weight = torch.where(is_on.any(-1, keepdim=True), is_on, ~is_on).to(words)
        return torch.einsum("bcp,bcpkd->bckd", weight / weight.sum(-1, keepdim=True), words), is_on.sum(-1)

    def shares(self, tokens: Float[Tensor, "b c 2 width"], labels: Int64[Tensor, "b 3 n"]) -> dict[str, float]:
        """Share of labelled patches whose cell's token is nearest to their own word, of all words of that kind."""
        cells, side = math.isqrt(tokens.shape[1]), math.isqrt(labels.shape[-1])
        shares: dict[str, float] = {}
        for name, slot, words, truth in zip(
            ("colour", "form", "symbol"),
            (0, 1, 1),
            (self.colours, self.forms, self.symbols),
            labels.unbind(1),
            strict=True,
        ):
            nearest = torch.cdist(tokens[:, :, slot], words).argmin(-1)
            by_patch = repeat(nearest, "b (row col) -> b (row r col c)", row=cells, r=side // cells, c=side // cells)
            shares[name] = float(((by_patch == truth) & (truth > 0)).sum() / (truth > 0).sum().clamp_min(1))
        return shares


def cells_of(side: int, count: int) -> tuple[int, int] | None:
    """Rows and columns of the division of a square grid into `count` equal cells that are nearest to squares.

    The cells are no wider than high; None where the grid cannot be divided so.
    """
    fitting = [
        (rows, count // rows)
        for rows in range(1, math.isqrt(max(0, count)) + 1)
        if count % rows == 0 and side % rows == 0 and side % (count // rows) == 0
    ]
    return fitting[-1] if fitting else None


class DenseObjective(nn.Module):
    """Linear heads that name colour, form and symbol, the edges of what is there, and where the feature itself is.

    One head reads patch features. The other reads image tokens: token j answers for the patches of cell j, row-major,
    of the division of the tile into as many cells as there are latents (`cells_of`). With the `words` of a language
    model that already knows them, no head reads image tokens: two stand for each cell, and are to be the words for what
    is drawn there (`WordTargets`).

    Raises:
        ValueError: the grid cannot be divided into as many cells, or, with `words`, into half as many that are square.
    """

    def __init__(self, model: Blip3, words: Words | None = None) -> None:
        super().__init__()
        side, num_latents = model.cfg.vision.grid_side, model.cfg.connector.num_latents
        per_cell = 1 if words is None else 2
        cells = cells_of(side, num_latents // per_cell) if num_latents % per_cell == 0 else None
        if cells is None or (words is not None and cells[0] != cells[1]):
            raise ValueError(
                f"dense warm-up: expected {'rows × columns' if per_cell == 1 else 'twice the square'} of divisors of "
                f"{side} as number of latents, got {num_latents}; change connector.num-latents, or use the sigmoid "
                "objective"
            )
        self.rows, self.columns = cells
        self.vision, self.connector = model.vision_encoder, model.vision_tokenizer
        self.side = side
        self.sizes = (NUM_COLOURS, NUM_FORMS, NUM_SYMBOLS, 4)
        self.place_head = nn.Linear(model.cfg.vision.width, 2 * side)
        self.patch_head = nn.Linear(model.cfg.vision.width, sum(self.sizes))
        outputs = (side // self.rows) * (side // self.columns) * sum(self.sizes)
        self.words = None if words is None else WordTargets(words)
        self.token_head = nn.Linear(model.cfg.lm.width, outputs) if words is None else None

    def loss(self, batch: TileBatch) -> LossSum:
        """Sum over the tiles; parts: share of labelled patches named rightly from image tokens, by kind of label."""
        batch = batch.to(self.place_head.weight.device)
        features = self.vision(batch.pixels)
        image_tokens = self.connector(features, None)
        token_loss, shares = self._token_loss(image_tokens, batch)
        places = torch.arange(self.side, device=features.device).expand(len(batch.pixels), self.side, self.side)
        rows, columns = self.place_head(features).chunk(2, dim=-1)
        place_loss = F.cross_entropy(rows.flatten(0, 1), places.mT.flatten())
        place_loss = place_loss + F.cross_entropy(columns.flatten(0, 1), places.flatten())
        patch_loss, _ = self._label_loss(self.patch_head(features), batch)
        total = patch_loss + token_loss + PLACE_WEIGHT * place_loss
        parts = {name: share * batch.num_targets for name, share in shares.items()}
        return LossSum(total * batch.num_targets, batch.num_targets, parts)

    def _token_loss(
        self, image_tokens: Float[Tensor, "b l width"], batch: TileBatch
    ) -> tuple[Tensor, dict[str, float]]:
        if self.token_head is not None:
            outputs = rearrange(
                self.token_head(image_tokens),
                "b (row col) (r c out) -> b (row r col c) out",
                row=self.rows,
                r=self.side // self.rows,
                c=self.side // self.columns,
            )
            return self._label_loss(outputs, batch)
        assert self.words is not None
        by_cell = rearrange(image_tokens, "b (cell two) d -> b cell two d", two=2)
        targets, num_labelled = self.words(batch.labels, self.rows)
        errors = (by_cell - targets).square().sum(-1).mean(-1) / self.words.scale
        weights = torch.where(num_labelled > 0, 1.0, BLANK_WEIGHT)
        return WORD_WEIGHT * (errors * weights).sum() / weights.sum(), self.words.shares(by_cell.detach(), batch.labels)

    def _label_loss(self, outputs: Float[Tensor, "b n c"], batch: TileBatch) -> tuple[Tensor, dict[str, float]]:
        """Mean loss over labelled patches, and the share named rightly by kind of label."""
        *named, edges = outputs.split(self.sizes, -1)
        is_on = batch.edges.sum(-1) > 0
        error = (edges - batch.edges).abs().mean(-1)
        naming_loss, shares = _naming_loss(named, batch.labels)
        return naming_loss + EDGE_WEIGHT * (error * is_on).sum() / is_on.sum().clamp_min(1), shares


def _naming_loss(
    scores_by_kind: Sequence[Float[Tensor, "b n _"]], labels: Int64[Tensor, "b 3 n"]
) -> tuple[Tensor, dict[str, float]]:
    """Mean loss over labelled patches, and the share named rightly by kind of label."""
    total, shares = scores_by_kind[0].new_zeros(()), dict[str, float]()
    for name, scores, truth in zip(("colour", "form", "symbol"), scores_by_kind, labels.unbind(1), strict=True):
        total = total + _weighted_loss(scores, truth)
        labelled = truth > 0
        right = (scores.argmax(-1) == truth) & labelled
        shares[name] = float(right.sum() / labelled.sum().clamp_min(1))
    return total, shares


def _weighted_loss(scores: Float[Tensor, "b n c"], labels: Int64[Tensor, "b n"]) -> Float[Tensor, ""]:
    losses = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=UNKNOWN)
    weights = torch.where(labels > 0, 1.0, BACKGROUND_WEIGHT).flatten() * (labels.flatten() != UNKNOWN)
    return (losses * weights).sum() / weights.sum().clamp_min(1)


class SigmoidObjective(nn.Module):
    """SigLIP's loss between pictures and captions."""

    def __init__(self, pair: Siglip) -> None:
        super().__init__()
        self.pair = pair

    def loss(self, batch: PairBatch) -> LossSum:
        """Sum over the pairs."""
        batch = batch.to(self.pair.logit_scale.device)
        images = self.pair.embed_images(batch.pixels)
        texts = self.pair.embed_texts(batch.captions)
        loss = sigmoid_loss(images, texts, self.pair.logit_scale, self.pair.logit_bias)
        return LossSum(loss * batch.num_targets, batch.num_targets)


def _pair_model(model: Blip3Config) -> Siglip:
    text = SiglipTextConfig(
        vocab_size=model.lm.vocab_size,
        max_tokens=MAX_CAPTION_TOKENS,
        width=model.vision.width,
        num_layers=model.vision.num_layers,
        num_heads=model.vision.num_heads,
        mlp_width=model.vision.mlp_width,
        dim_out=model.vision.width,
    )
    return Siglip(SiglipConfig(vision=msgspec.structs.replace(model.vision, use_head=True), text=text))


def warmup_trainer(
    config: WarmupConfig,
    model: Blip3,
    tokenizer: HFTokenizer,
    *,
    run: RunFolder | None,
    progress: Progress,
    stop: StopFlag,
    name: str = "warmup",
    words: Words | None = None,
    kinds: Sequence[PictureKind] = WARMUP_KINDS,
) -> Trainer[Any]:
    """Make the warm-up of the vision tower of `model` (with `dense`, of its connector too) ready for `fit_warmup`.

    words: as of `DenseObjective`. kinds: of the pictures, in turn. Without a `run` nothing is logged or saved.

    Raises:
        ValueError: the model's sizes do not suit the objective.
    """
    objective: DenseObjective | SigmoidObjective
    if config.objective == "dense":
        objective, stream = DenseObjective(model, words), DenseStream(config, model.cfg, kinds)
    else:
        objective, stream = SigmoidObjective(_pair_model(model.cfg)), PairStream(config, model.cfg, tokenizer)
    # What the objective has beside the model goes to where that is.
    objective.requires_grad_(True).to(model.device)
    return Trainer(
        model=objective,
        parameters=objective.named_parameters(),
        stream=stream,
        cfg=config.train,
        stage=name,
        run=run,
        progress=progress,
        stop=stop,
    )


def fit_warmup(trainer: Trainer[Any], model: Blip3, files: CheckpointFiles) -> FitResult:
    """Train in place, freeze the model again and leave a checkpoint of it, which can start a stage but not be resumed.

    A trainer without a run leaves none.

    Raises:
        NonFiniteError: too many steps in a row were not finite.
    """
    result = trainer.fit()
    if isinstance(trainer.model, SigmoidObjective):
        tower = trainer.model.pair.vision_model.state_dict()
        wanted = model.vision_encoder.state_dict().keys()
        model.vision_encoder.load_state_dict({key: tower[key] for key in wanted})
    model.eval().requires_grad_(False)
    if trainer.run is None:
        return result
    manifest = {"stage": trainer.stage, "is_kept": True}
    checkpoint = trainer.run.save_checkpoint(result.counters.step, files.writers(), manifest, 2)
    return replace(result, checkpoint=checkpoint)
