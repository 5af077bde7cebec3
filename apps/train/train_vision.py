"""A vision tower from nothing, on drawn pictures: a stand-in for published SigLIP weights, which a fresh machine lacks.

Two objectives. `dense`: each patch feature predicts what is drawn under the patch and where (labels that only a drawn
world has), and each image token the same of its cell of patches, so that the connector begins as a map of the picture.
`sigmoid`: SigLIP's own loss between pictures and captions (arXiv:2303.15343), for the tower alone; it needs more time.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
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
)
from siglip_lite import (
    Siglip,
    SiglipConfig,
    SiglipTextConfig,
    normalise,
    sigmoid_loss,
)
from train_config import WarmupConfig
from train_stages import CheckpointFiles
from train_vision_data import MAX_CAPTION_TOKENS, DenseStream, PairBatch, PairStream, TileBatch
from trainer_lite import FitResult, LossSum, Progress, RunFolder, StopFlag, Trainer

BACKGROUND_WEIGHT = 0.1
"""Weight of patches with nothing on them, which are most, against 1 for the others."""
EDGE_WEIGHT = 5.0
PLACE_WEIGHT = 0.3


@torch.no_grad()
def label_words(lm: Phi3, tokenizer: HFTokenizer) -> list[Float[Tensor, "n width"]]:
    """The language model's own embeddings of the names of colours, forms and symbols, each kind without its id 0.

    A name is the mean over its tokens, with and without a space in front.
    """

    def embedded(name: str) -> Float[Tensor, " width"]:
        spellings = (lm.embed(torch.tensor(tokenizer.encode(text))).mean(0) for text in (name, f" {name}"))
        return torch.stack(tuple(spellings)).mean(0)

    return [torch.stack([embedded(name) for name in names]) for names in (COLOUR_NAMES, FORMS[1:], SYMBOLS)]


class WordScores(nn.Module):
    """How near image tokens are to the words of each kind of label; nothing at all scores 0.

    score = SCALE · token · word / |word|² + bias, one learned bias a kind: the word itself scores SCALE + bias. A token
    that scores so lies, as the language model sees it, where the words for what is drawn there lie.
    """

    SCALE = 10.0
    directions: Tensor

    def __init__(self, words: Sequence[Float[Tensor, "n width"]]) -> None:
        super().__init__()
        self.sizes = [len(kind) for kind in words]
        joined = torch.cat(tuple(words))
        self.register_buffer("directions", self.SCALE * joined / joined.square().sum(-1).mean())
        self.bias = nn.Parameter(torch.zeros(len(words)))

    def forward(self, tokens: Float[Tensor, "b n width"]) -> list[Float[Tensor, "b n _"]]:
        """Scores of id 0, 1, 2 … of each kind."""
        kinds = F.linear(tokens, self.directions).split(self.sizes, -1)
        return [F.pad(scores + bias, (1, 0)) for scores, bias in zip(kinds, self.bias, strict=True)]


class DenseObjective(nn.Module):
    """Linear heads that name colour, form and symbol, the edges of what is there, and where the feature itself is.

    One head reads patch features. The other reads image tokens: token j answers for the patches of cell j, row-major,
    of the square division of the tile into as many cells as there are latents. With the `words` of a language model
    that already knows them, an image token is also pulled towards the words for what is drawn in its cell.

    Raises:
        ValueError: the latents are no square number that divides the grid.
    """

    def __init__(self, model: Blip3, words: Sequence[Float[Tensor, "n width"]] | None = None) -> None:
        super().__init__()
        self.words = None if words is None else WordScores(words)
        side, num_latents = model.cfg.vision.grid_side, model.cfg.connector.num_latents
        self.cells = math.isqrt(num_latents)
        if self.cells**2 != num_latents or side % self.cells:
            raise ValueError(
                f"dense warm-up: expected a square number of latents whose root divides {side}, got {num_latents}; "
                "change --model.connector.num-latents, or use the sigmoid objective"
            )
        self.vision, self.connector = model.vision_encoder, model.vision_tokenizer
        self.side = side
        self.sizes = (NUM_COLOURS, NUM_FORMS, NUM_SYMBOLS, 4)
        self.place_head = nn.Linear(model.cfg.vision.width, 2 * side)
        self.patch_head = nn.Linear(model.cfg.vision.width, sum(self.sizes))
        self.token_head = nn.Linear(model.cfg.lm.width, (side // self.cells) ** 2 * sum(self.sizes))

    def loss(self, batch: TileBatch) -> LossSum:
        """Sum over the tiles; parts: share of labelled patches named rightly from image tokens, by kind of label."""
        features = self.vision(normalise(batch.pixels))
        image_tokens = self.connector(features, None)
        tokens = rearrange(
            self.token_head(image_tokens),
            "b (row col) (r c out) -> b (row r col c) out",
            row=self.cells,
            r=self.side // self.cells,
            c=self.side // self.cells,
        )
        places = torch.arange(self.side).expand(len(batch.pixels), self.side, self.side)
        rows, columns = self.place_head(features).chunk(2, dim=-1)
        place_loss = F.cross_entropy(rows.flatten(0, 1), places.mT.flatten())
        place_loss = place_loss + F.cross_entropy(columns.flatten(0, 1), places.flatten())
        total, _ = self._label_loss(self.patch_head(features), batch)
        token_loss, shares = self._label_loss(tokens, batch)
        total = total + token_loss + PLACE_WEIGHT * place_loss
        if self.words is not None:
            per = self.side // self.cells
            by_patch = repeat(image_tokens, "b (row col) d -> b (row r col c) d", row=self.cells, r=per, c=per)
            word_loss, shares = _naming_loss(self.words(by_patch), batch.labels)
            total = total + word_loss
        parts = {name: share * batch.num_targets for name, share in shares.items()}
        return LossSum(total * batch.num_targets, batch.num_targets, parts)

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
        images = self.pair.embed_images(normalise(batch.pixels))
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
    run: RunFolder,
    progress: Progress,
    stop: StopFlag,
    name: str = "warmup",
    words: Sequence[Float[Tensor, "n width"]] | None = None,
) -> Trainer[Any]:
    """Make the warm-up of the vision tower of `model` (with `dense`, of its connector too) ready for `fit_warmup`.

    words: as of `DenseObjective`.

    Raises:
        ValueError: the model's sizes do not suit the objective.
    """
    objective: DenseObjective | SigmoidObjective
    if config.objective == "dense":
        objective, stream = DenseObjective(model, words), DenseStream(config, model.cfg)
    else:
        objective, stream = SigmoidObjective(_pair_model(model.cfg)), PairStream(config, model.cfg, tokenizer)
    objective.requires_grad_(True)
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

    Raises:
        NonFiniteError: too many steps in a row were not finite.
    """
    result = trainer.fit()
    if isinstance(trainer.model, SigmoidObjective):
        tower = trainer.model.pair.vision_model.state_dict()
        wanted = model.vision_encoder.state_dict().keys()
        model.vision_encoder.load_state_dict({key: tower[key] for key in wanted})
    model.eval().requires_grad_(False)
    assert trainer.run is not None
    manifest = {"stage": trainer.stage, "is_kept": True}
    checkpoint = trainer.run.save_checkpoint(result.counters.step, files.writers(), manifest, 2)
    return replace(result, checkpoint=checkpoint)
