"""What quantisation costs a language model: perplexity of one text with its weights in several kinds, side by side.

    uv run tools/perplexity.py MODEL book.txt                           # bf16, int8 and int4
    uv run tools/perplexity.py MODEL book.txt --kinds fp32 int4 --max-tokens 50000

MODEL is what `apps/chat --model` takes for a language model: a folder of Phi-3 or Llama, or a GGUF file. The text is
cut into windows that do not overlap; a window's first token has nothing before it and is not counted. Perplexity is exp
of the mean negative log-likelihood a token, in nats.
"""

import argparse
import math
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm

from fused_kernels import linear_cross_entropy
from phi3_lite import Phi3, Quantisation, load_lm

KINDS = ("fp32", "bf16", *get_args(Quantisation))


@torch.inference_mode()
def mean_nats(model: Phi3, ids: torch.Tensor, window: int) -> float:
    """Mean negative log-likelihood of ids[1:] in each window, in nats.

    Raises:
        ValueError: no window has two tokens.
    """
    total, count = 0.0, 0
    for start in tqdm(range(0, len(ids), window), desc="windows", unit="window", leave=False, disable=None):
        part = ids[start : start + window]
        if len(part) < 2:
            continue
        bounds = torch.tensor([0, len(part)], dtype=torch.int32)
        hidden = model(model.embed(part), torch.arange(len(part)), bounds)
        targets = torch.cat([part[1:], part.new_tensor([-100])])
        total += linear_cross_entropy(hidden, model.head_weight, targets, model.head_bias, reduction="sum").item()
        count += len(part) - 1
    if count == 0:
        raise ValueError(f"text: expected at least 2 tokens in a window of {window}, got {len(ids)}; give more")
    return total / count


def main() -> None:
    """Print a row for each kind."""
    parser = argparse.ArgumentParser(prog="perplexity", description="Perplexity of a text, by kind of weights.")
    parser.add_argument("model", type=Path, help="folder of Phi-3 or Llama, or a GGUF file")
    parser.add_argument("text", type=Path, help="UTF-8 text file")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=("bf16", "int8", "int4"))
    parser.add_argument("--window", type=int, default=1024, help="tokens a window")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="tokens of the text's beginning that are read")
    args = parser.parse_args()
    if args.window < 2 or args.max_tokens < 2:
        parser.error(f"--window, --max-tokens: expected at least 2, got {args.window} and {args.max_tokens}")
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{args.text}: expected a UTF-8 text file, got: {error}")
    first: float | None = None
    for kind in args.kinds:
        quantize = None if kind in ("fp32", "bf16") else kind
        loaded = load_lm(args.model, dtype=torch.float32 if kind == "fp32" else torch.bfloat16, quantize=quantize)
        if loaded.tokenizer is None:
            parser.error(f"{args.model}: expected a tokenizer beside the weights, got none; put its files there")
        ids = torch.tensor(loaded.tokenizer.encode(text))[: args.max_tokens]
        nats = mean_nats(loaded.model, ids, args.window)
        first = nats if first is None else first
        print(f"{kind}  perplexity {math.exp(nats):.3f}  {nats:.5f} nats a token  {nats - first:+.5f}", flush=True)


if __name__ == "__main__":
    main()
