"""What the loop minimises: next-token prediction, or preference between two answers."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256

import torch
from torch import Tensor

from blip3_lite import Blip3, EncodedSample, PackedBatch
from blip3_lite.batch import IGNORE_INDEX
from dpo_lite import (
    DpoConfig,
    PairLogProbs,
    ReferenceCache,
    answer_digest,
    answer_tokens,
    kl_estimate,
    kto_baseline,
    preference_loss,
    sequence_log_probs,
    side_by_side,
    split_pairs,
)
from fused_kernels import linear_log_prob_pairs, linear_log_probs
from lora_lite import disabled
from train_answers import with_exchanged_answers
from trainer_lite import LossSum


class NextToken:
    """Cross-entropy on the target positions."""

    def __init__(self, model: Blip3) -> None:
        self.model = model

    def loss(self, batch: PackedBatch) -> LossSum:
        """Sum over the batch's target tokens."""
        # Counted where the batch was made: on a GPU the count would be waited for.
        return LossSum(self.model.loss_sum(batch.to(self.model.device)), batch.num_targets)


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


def sample_digest(sample: EncodedSample) -> str:
    """What the reference's log-probability of an answer is kept under: tokens, targets and pictures, no name."""
    pictures = sample.tile_keys
    if len(pictures) != sample.tiles.shape[0]:
        pictures = tuple(sha256(tile.contiguous().numpy().tobytes()).hexdigest() for tile in sample.tiles)
    return answer_digest(sample.ids, sample.targets, pictures)


@dataclass(frozen=True)
class PairPack:
    """Preference pairs as 2b documents, in the order of `dpo_lite.side_by_side`.

    The two of a pair have the same tiles, so kept features are looked up once a tile.
    """

    sample_ids: list[str]
    pack: PackedBatch
    digests: list[str]
    """Of each document, see `sample_digest`."""
    documents: list[EncodedSample] = field(default_factory=list[EncodedSample])
    """One by one; empty where they came as a pack from a worker."""

    @property
    def num_targets(self) -> int:
        """Pairs; the loss is a mean over them."""
        return len(self.sample_ids)

    @property
    def num_tokens(self) -> int:
        """Positions computed."""
        return self.pack.num_tokens


class Preference:
    """A loss on preferences (see `dpo_lite.loss`).

    The reference is the model without its adapters, asked once an answer and kept; or `reference`, which holds all
    answers already, and then the model needs no adapters.
    """

    def __init__(
        self, model: Blip3, cfg: DpoConfig, *, is_kept: bool = True, reference: ReferenceCache | None = None
    ) -> None:
        """`is_kept`: without it the reference is asked each time, so that every rank runs the model as often."""
        self.model, self.cfg = model, cfg
        self.is_kept = is_kept
        self._is_complete = reference is not None
        self.reference = ReferenceCache("this process's model without its adapters") if reference is None else reference

    def loss(self, batch: PairPack) -> LossSum:
        """Sum over the batch's pairs; parts: reward accuracy and margin, log-ratios and a KL estimate, summed."""
        batch = replace(batch, pack=batch.pack.to(self.model.device))
        baseline = self._baseline(batch.pack) if self.cfg.kind == "kto" else None
        log_probs, reference = self._log_probs(batch)
        if not batch.sample_ids:
            # Nothing is left in the pack, but the model is run as for any other.
            return LossSum(log_probs[0].sum() * 0.0, 0)
        tokens = split_pairs(answer_tokens(batch.pack.targets, batch.pack.cu_seqlens))
        policy = PairLogProbs(*log_probs, *tokens)
        output = preference_loss(self.cfg, policy, reference, baseline=baseline)
        parts = {"reward_accuracy": float((output.margin > 0).sum()), "reward_margin": float(output.margin.sum())}
        if reference is not None:
            ratios = [(new.detach() - old).sum() for new, old in zip(log_probs, reference, strict=True)]
            kl = kl_estimate(torch.cat(log_probs), torch.cat(reference))
            parts |= {
                "log_ratio_chosen": float(ratios[0]),
                "log_ratio_rejected": float(ratios[1]),
                "kl": float(kl) * batch.num_targets,
            }
        return LossSum(output.loss * batch.num_targets, batch.num_targets, parts)

    def _log_probs(self, batch: PairPack) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """Log-probabilities of chosen and of rejected answers, float[b] twice, by the policy and by the reference."""
        if not self.cfg.needs_reference:
            return split_pairs(answer_log_probs(self.model, batch.pack)), None
        if self._is_complete or (self.is_kept and not self.reference.missing(batch.digests)):
            policy = answer_log_probs(self.model, batch.pack)
        else:
            policy, reference = self._policy_and_reference(batch.pack)
            if not self.is_kept:
                return split_pairs(policy), split_pairs(reference)
            self.reference.put(batch.digests, reference[: len(batch.digests)])
        return split_pairs(policy), split_pairs(self.reference.get(batch.digests).to(self.model.device))

    @torch.no_grad()
    def _baseline(self, pack: PackedBatch) -> Tensor:
        """KTO's z, from the answers of the pack's own prompts exchanged among these."""
        exchanged = with_exchanged_answers(pack)
        if exchanged is None:
            return torch.zeros((), device=self.model.device)
        with _without_noise(self.model):
            return kto_baseline(*self._policy_and_reference(exchanged))

    def _policy_and_reference(self, pack: PackedBatch) -> tuple[Tensor, Tensor]:
        """float[2b] twice, one a document: both models' hidden states meet the head, which they share, together."""
        with torch.no_grad(), disabled(self.model), _without_noise(self.model):
            reference = self.model(pack)
        lm = self.model.lang_model
        sides = linear_log_prob_pairs(
            self.model(pack), reference, lm.head_weight, pack.targets, lm.head_bias, ignore_index=IGNORE_INDEX
        )
        policy, reference = (sequence_log_probs(tokens, pack.cu_seqlens) for tokens in sides)
        return policy, reference


def answer_log_probs(model: Blip3, pack: PackedBatch) -> Tensor:
    """float[docs]: the log-probability of each document's targets."""
    lm = model.lang_model
    tokens = linear_log_probs(model(pack), lm.head_weight, pack.targets, lm.head_bias, ignore_index=IGNORE_INDEX)
    return sequence_log_probs(tokens, pack.cu_seqlens)


@contextmanager
def _without_noise(model: Blip3) -> Generator[None]:
    """Without dropout, and without noise on embeddings: what is compared with must not change from call to call."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
