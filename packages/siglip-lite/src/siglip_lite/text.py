"""SigLIP's text tower: token ids to one vector a text, read off at the last position.

Attention is bidirectional and sees padding: the published towers were trained on texts padded to `max_tokens`, so pad
to exactly that length for them. Source: SigLIP, arXiv:2303.15343; parameter names equal those of the text transformer
in the published checkpoints.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .config import SiglipTextConfig
from .encoder import Encoder, LayerNorm, init_cut_normal, init_encoder


class TextEmbeddings(nn.Module):
    """Tokens as vectors, with learned positions added."""

    def __init__(self, cfg: SiglipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        self.position_embedding = nn.Embedding(cfg.max_tokens, cfg.width)

    def forward(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Embed ids at positions counted from 0."""
        num_tokens, max_tokens = ids.shape[1], self.position_embedding.num_embeddings
        if not 0 < num_tokens <= max_tokens:
            raise ValueError(f"ids: expected 1 to {max_tokens} tokens a text, got {num_tokens}; cut or pad the texts")
        return self.token_embedding(ids) + self.position_embedding.weight[:num_tokens]


class SiglipText(nn.Module):
    """The text tower: ids to hidden states after the last layer norm, and the pooled vector by `pool`."""

    def __init__(self, cfg: SiglipTextConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embeddings = TextEmbeddings(cfg)
        self.encoder = Encoder(cfg.num_layers, cfg.width, cfg.num_heads, cfg.mlp_width, cfg.layer_norm_eps)
        self.final_layer_norm = LayerNorm(cfg.width, eps=cfg.layer_norm_eps)
        self.head = nn.Linear(cfg.width, cfg.dim_out)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, distributed as for SigLIP's own training."""
        init_encoder(self, generator)
        for embedding in (self.embeddings.token_embedding, self.embeddings.position_embedding):
            nn.init.normal_(embedding.weight, std=embedding.embedding_dim**-0.5, generator=generator)
        init_cut_normal(self.head.weight, self.head.in_features**-0.5, generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Return one hidden state a token, after the last layer norm.

        Raises:
            ValueError: empty texts, or longer ones than there are positions.
        """
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))

    def pool(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b d_out"]:
        """Project the last position's state, padding or not, to one vector a text (not of unit length)."""
        return self.head(hidden[:, -1])
