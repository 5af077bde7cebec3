"""Dispatch: `auto` prefers, a named backend runs or raises, and the report says the same."""

import subprocess
import sys

import pytest
import torch

import fused_kernels
from fused_kernels import BackendError, backend_report, layer_norm, rms_norm
from fused_kernels.dispatch import Backend, Op

CPU = torch.device("cpu")


def only_cuda(device, dtype):
    return None if device.type == "cuda" else f"it needs a CUDA device, got {device}"


def two_backend_op():
    return Op(
        "double",
        Backend("fast", lambda x: 2 * x + 0, "fast one", only_cuda),
        Backend("reference", lambda x: 2 * x, "plain"),
    )


def test_auto_passes_over_a_backend_that_refuses():
    op = two_backend_op()
    assert op.choose("auto", CPU, torch.float32) is op.backends["reference"].run
    assert op.choose("auto", torch.device("cuda"), torch.float32) is op.backends["fast"].run


def test_named_backend_that_cannot_run_raises_with_its_reason():
    with pytest.raises(BackendError, match=r"double.*'fast': it needs a CUDA device, got cpu"):
        two_backend_op().choose("fast", CPU, torch.float32)


def test_unknown_backend_raises_with_the_known_ones():
    with pytest.raises(BackendError, match=r"rms_norm: expected one of auto, triton, by_hand, reference, got 'no'"):
        rms_norm(torch.ones(1, 2), torch.ones(2), 1e-6, backend="no")


def test_call_that_a_backend_refuses_goes_to_the_next():
    def refuse_long(x):
        return None if len(x) < 3 else f"it holds up to 2, got {len(x)}"

    op = Op(
        "double",
        Backend("fast", lambda x: "fast", "fast one", refuse_call=refuse_long),
        Backend("reference", lambda x: "plain", "plain"),
    )
    assert op.run("auto", CPU, torch.float32, [1, 2]) == "fast"
    assert op.run("auto", CPU, torch.float32, [1, 2, 3]) == "plain"
    with pytest.raises(BackendError, match=r"double.*'fast': it holds up to 2, got 3; use 'auto'"):
        op.run("fast", CPU, torch.float32, [1, 2, 3])


def test_triton_is_what_auto_takes_on_a_gpu_and_only_there():
    pytest.importorskip("triton")
    from fused_kernels.report import _OPS

    with_kernels = {op.name for op in _OPS if "triton" in op.backends}
    assert len(with_kernels) >= 16
    assert {row.op for row in backend_report("cuda", torch.bfloat16) if row.backend == "triton"} == with_kernels
    # Products in fp32 are no work for matrix units.
    low = {name for name in with_kernels if name.endswith("attention")}
    assert {row.op for row in backend_report("cuda", torch.float32) if row.backend == "triton"} == with_kernels - low
    assert "triton" not in {row.backend for row in backend_report("cpu", torch.bfloat16)}
    with pytest.raises(BackendError, match=r"rms_norm.*'triton': it needs a CUDA device, got cpu"):
        rms_norm(torch.ones(1, 2), torch.ones(2), 1e-6, backend="triton")


def test_triton_attention_leaves_what_it_cannot_hold_to_others():
    from fused_kernels.dense import ATTENTION

    refuse = ATTENTION.backends["triton"].refuse_call
    assert refuse is not None
    x = torch.zeros(1, 16, 2, 128)
    assert refuse(x, x, x, None, False, None) is None
    assert "bidirectional" in str(refuse(x, x, x, None, True, None))
    assert "over pairs" in str(refuse(x, x, x, torch.ones(1, 16, 16, dtype=torch.bool), False, None))
    assert "16 queries or more, got 1" in str(refuse(x[:, :1], x, x, None, False, None))
    wide = torch.zeros(1, 16, 2, 129)
    assert "up to 128 channels, got 129" in str(refuse(wide, wide, wide, None, False, None))


def test_operations_do_not_import_triton():
    code = "import fused_kernels, sys; [getattr(fused_kernels, name) for name in fused_kernels.__all__]; "
    code += "fused_kernels.backend_report('cuda', __import__('torch').bfloat16); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_backend_error_is_a_value_error():
    with pytest.raises(ValueError, match="layer_norm"):
        layer_norm(torch.ones(1, 2), torch.ones(2), torch.ones(2), 1e-6, backend="nope")


def test_op_without_reference_is_refused():
    with pytest.raises(ValueError, match="expected 'reference' as the last"):
        Op("double", Backend("fast", lambda x: x, "fast one"))


def test_report_row_says_what_was_passed_over():
    row = two_backend_op().report(CPU, torch.float32)
    assert (row.op, row.backend) == ("double", "reference")
    assert row.reason == "plain; not fast: it needs a CUDA device, got cpu"


def test_report_has_a_row_for_every_operation():
    # What only makes or describes the operations' arguments has no backends; of the pairs, linear_log_probs has them.
    others = {"BackendError", "BackendRow", "PackPlan", "backend_report", "plan_packing", "INT4_GROUP", "int4_block"}
    others |= {"linear_log_prob_pairs", "DecoderStack", "HeldKeys", "LayerWeights", "TokenEnds"}
    others |= {f"{verb}_int{bits}" for verb in ("quantise", "dequantise", "pack", "unpack") for bits in (4, 8)}
    operations = set(fused_kernels.__all__) - others
    rows = backend_report("cpu", torch.float32)
    assert {row.op for row in rows} == operations
    assert len(rows) == len(operations)
    assert all(row.reason for row in rows)


def test_report_on_an_integer_dtype_finds_no_backend():
    assert {row.backend for row in backend_report("cpu", torch.int64)} == {"none"}


def test_package_imports_without_torch():
    code = "import fused_kernels, sys; assert 'torch' not in sys.modules; assert fused_kernels.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve_whatever_was_imported_first():
    import fused_kernels.dense
    import fused_kernels.packed

    for name in fused_kernels.__all__:
        assert name.isupper() or callable(getattr(fused_kernels, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fused_kernels.nothing
