"""What the loop minimises: next-token prediction, or preference between two answers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from blip3_lite import Blip3, EncodedSample, PackedBatch
from dpo_lite import DpoConfig, ReferenceCache, dpo_loss, sequence_log_probs, side_by_side, split_pairs
from fused_kernels import linear_log_probs
from lora_lite import disabled
from trainer_lite import LossSum


class NextToken:
    """Cross-entropy on the target positions."""

    def __init__(self, model: Blip3) -> None:
        self.model = model

    def loss(self, batch: PackedBatch) -> LossSum:
        """Sum over the batch's target tokens."""
        return LossSum(self.model.loss_sum(batch), batch.num_targets)


@dataclass(frozen=True)
class SamplePair:
    """A preference pair: one prompt, two answers."""

    chosen: EncodedSample
    rejected: EncodedSample

    @property
    def length(self) -> int:
        """Positions of both sequences."""
        return self.chosen.length + self.rejected.length

    @property
    def documents(self) -> list[EncodedSample]:
        """Both sequences, in the order that the loss asks for."""
        return side_by_side([(self.chosen, self.rejected)])


@dataclass(frozen=True)
class PairPack:
    """Preference pairs as 2b documents, in the order of `dpo_lite.side_by_side`.

    The two of a pair have the same tiles, so kept features are looked up once a tile.
    """

    sample_ids: list[str]
    pack: PackedBatch

    @property
    def num_targets(self) -> int:
        """Pairs; the loss is a mean over them."""
        return len(self.sample_ids)

    @property
    def num_tokens(self) -> int:
        """Positions computed."""
        return self.pack.num_tokens


class Preference:
    """DPO (arXiv:2305.18290, eq. 7). The reference is the model without its adapters, asked once a pair and kept."""

    def __init__(self, model: Blip3, cfg: DpoConfig, *, is_kept: bool = True) -> None:
        """`is_kept`: without it the reference is asked each time, so that every rank runs the model as often."""
        self.model = model
        self.is_kept = is_kept
        self.beta = cfg.beta
        self.label_smoothing = cfg.label_smoothing
        self.reference = ReferenceCache("this process's model without its adapters")

    def loss(self, batch: PairPack) -> LossSum:
        """Sum over the batch's pairs; parts: reward accuracy and margin, summed."""
        if self.reference.missing(batch.sample_ids) or not self.is_kept:
            with torch.no_grad(), disabled(self.model):
                chosen, rejected = self._log_probs(batch)
            if not batch.sample_ids:
                # Nothing is left in the pack, but the model is run as for any other.
                return LossSum(self._log_probs(batch)[0].sum() * 0.0, 0)
            # A source of few pairs comes round within one pack; each pair is kept once.
            place_of = {sample_id: place for place, sample_id in enumerate(batch.sample_ids)}
            places = list(place_of.values())
            self.reference.put(list(place_of), chosen[places], rejected[places])
        if not batch.sample_ids:
            return LossSum(self._log_probs(batch)[0].sum() * 0.0, 0)
        output = dpo_loss(
            *self._log_probs(batch),
            *self.reference.get(batch.sample_ids),
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
        parts = {"reward_accuracy": float((output.margin > 0).sum()), "reward_margin": float(output.margin.sum())}
        return LossSum(output.loss * batch.num_targets, batch.num_targets, parts)

    def _log_probs(self, batch: PairPack) -> tuple[Tensor, Tensor]:
        """float[b] twice: log-probability of the chosen and of the rejected answers."""
        model, pack = self.model, batch.pack
        tokens = linear_log_probs(model(pack), model.lang_model.head_weight, pack.targets, model.lang_model.head_bias)
        return split_pairs(sequence_log_probs(tokens, pack.cu_seqlens))
