"""What a reader of a published format hands over: everything but the weights, which lie ready to be read."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from weight_files import Recipe, TensorSource, WeightsError

from ..chat import ChatTemplate
from ..config import GenerationDefaults, Phi3Config
from ..tokenizer import Tokenizer


class PublishedLM(NamedTuple):
    """A published model, opened but not loaded."""

    config: Phi3Config
    """Sizes."""
    source: TensorSource
    """The tensors."""
    recipes: Mapping[str, Recipe]
    """Of what rows of the source each of the model's tensors is made."""
    tokenizer: Tokenizer | None
    """The published one, if there is one beside the weights."""
    generation: GenerationDefaults
    """Stop ids and sampling."""
    chat: ChatTemplate | None
    """Chat format; None where there is none, or one that is not known."""
    ignored: Sequence[str] = ()
    """Shell patterns of tensors that nothing needs."""


def check_ids(cfg: Phi3Config, tokenizer: Tokenizer | None, stop_ids: Sequence[int], where: str) -> None:
    """Refuse ids that the model has no rows for; fewer are usual, as rows are padded to round numbers.

    Raises:
        WeightsError: the tokenizer is another model's, or a stop id could never be generated.
    """
    if tokenizer is not None and tokenizer.vocab_size > cfg.vocab_size:
        raise WeightsError(
            f"weights {where}: tokenizer: expected at most {cfg.vocab_size} ids, the rows of the embedding, got "
            f"{tokenizer.vocab_size}; it is another model's"
        )
    if beyond := [token for token in stop_ids if not 0 <= token < cfg.vocab_size]:
        raise WeightsError(
            f"weights {where}: eos_token_id: expected ids below {cfg.vocab_size}, the rows of the head, got {beyond}; "
            "generation would never stop, name the right ones"
        )
