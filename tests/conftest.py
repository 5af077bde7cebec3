"""Fixtures for every test: where the sample data are, and a clean, repeatable torch for each test."""

import json
import os
import platform
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Without a GPU, Triton runs kernels in its interpreter. It reads this at its import, which any test may cause.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--figures FILE`: where long tests write what they measured."""
    parser.addoption("--figures", type=Path, help="JSON lines, appended: what long tests measured")


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add a line of figures, with the test's name and what it ran on, to the file that `--figures` names."""
    path = request.config.getoption("--figures")

    def note(**measured: object) -> None:
        if path is None:
            return
        told = {"date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__, "machine": platform.machine()}
        with path.open("a") as lines:
            lines.write(json.dumps({"test": request.node.name.partition("[")[0], **measured, **told}) + "\n")

    return note


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder of the root pyproject.toml."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real sample data beside the checkout; the test is skipped where it is absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no sample data: expected a folder shared/data beside the checkout")
    return path


@pytest.fixture(scope="session")
def siglip_sentencepiece() -> bytes:
    """A tiny SentencePiece model with the control ids of SigLIP's: pad 0, end 1, unknown 2."""
    import io

    from sentencepiece import SentencePieceTrainer

    texts = [
        "a photo of a red square",
        "two green circles and a blue cat on the mat",
        "the quick brown fox jumps over the lazy dog",
        "café naïve Ünïcode ß 2 cats, 10 dogs",
    ]
    written = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(texts * 4),
        model_writer=written,
        vocab_size=90,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return written.getvalue()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The tensors of these tests are too small to be shared among threads: waking them costs more than the work.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Start each test from the same seeds, and hand the next one the default dtype and gradient mode."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype, is_grad_enabled = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(is_grad_enabled)


@pytest.fixture(scope="session")
def tiny_config():
    """A joined model's config, small enough for a test: 2 × 2 patches a tile, 3 latents, 16 wide."""
    from anyres_tiler import TilingConfig
    from blip3_lite import Blip3Config
    from perceiver_resampler import ResamplerConfig
    from phi3_lite import Phi3Config
    from siglip_lite import SiglipVisionConfig

    return Blip3Config(
        vision=SiglipVisionConfig(
            image_px=16, patch_px=8, width=16, num_layers=2, num_heads=2, mlp_width=24, use_head=False
        ),
        connector=ResamplerConfig(dim=16, dim_out=24, depth=2, num_heads=2, head_dim=8, num_latents=3, ff_mult=2),
        lm=Phi3Config(vocab_size=300, width=24, num_layers=2, num_heads=3, num_kv_heads=3, mlp_width=40, init_std=0.2),
        tiling=TilingConfig(tile_px=16),
    )


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Control tokens, bytes, and a few merges."""
    from phi3_lite import train_tokenizer

    return train_tokenizer(["what colour is the square? red green blue"] * 4, 300)


@pytest.fixture
def tiny_model(tiny_config):
    """A model of `tiny_config` with random weights, in evaluation mode."""
    from blip3_lite import Blip3

    return Blip3(tiny_config).eval()


@pytest.fixture(scope="session")
def tiny_processor(tiny_config, tiny_tokenizer):
    """The processor that goes with `tiny_model`."""
    from blip3_lite import Processor

    return Processor(tiny_config, tiny_tokenizer)


@pytest.fixture
def write_gguf(tmp_path: Path):
    """(metadata, tensors, name) → a GGUF file by the format's own writer.

    Metadata values are written by their Python types; a tensor is an array, or (raw bytes of its blocks, type).
    """
    from gguf import GGUFWriter

    def write(metadata: dict, tensors: dict, name: str = "tiny.gguf") -> Path:
        path = tmp_path / name
        metadata = dict(metadata)
        writer = GGUFWriter(path, metadata.pop("general.architecture"))
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        for key, value in metadata.items():
            (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)
        for key, value in tensors.items():
            array, kind = value if isinstance(value, tuple) else (value, None)
            writer.add_tensor(key, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def gguf_metadata():
    """(architecture, sizes) → metadata of a model with a byte-level tokenizer of SmolLM2's kind."""
    from tokenizers import pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["Ġ Ġ", "Ċ Ċ", "u s", "us e", "use r", "h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]

    def metadata(arch: str, **sizes: int | float) -> dict:
        names = {
            "width": "embedding_length", "num_layers": "block_count", "num_heads": "attention.head_count",
            "num_kv_heads": "attention.head_count_kv", "mlp_width": "feed_forward_length",
            "max_positions": "context_length", "rope_theta": "rope.freq_base", "rotary_dim": "rope.dimension_count",
            "norm_eps": "attention.layer_norm_rms_epsilon", "sliding_window": "attention.sliding_window",
        }  # fmt: skip
        return {
            "general.architecture": arch,
            **{f"{arch}.{names[name]}": value for name, value in sizes.items()},
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3] * len(special) + [1] * (len(tokens) - len(special)),
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.eos_token_id": 2,
        }

    return metadata
