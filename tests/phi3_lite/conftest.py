"""What the tests of decoding share: each with the kernels in C++ and without."""

import pytest

from fused_kernels import DecoderStack


@pytest.fixture(params=["one call", "layer by layer"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a few tokens go through the layers on a CPU; the first is what runs where a compiler is."""
    if request.param == "layer by layer":
        monkeypatch.setattr(DecoderStack, "most_tokens", 0)
    return request.param
