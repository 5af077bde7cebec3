"""Compile every Triton kernel for GPUs that need not be there, and list registers, spills and shared memory.

    uv run tools/kernel_report.py                        # sm_80, sm_90 and sm_100
    uv run tools/kernel_report.py --arch 90 --only attention
    uv run tools/kernel_report.py --json benchmarks/results/kernel_report.json

The operations are called on tensors without storage, at the sizes of the released model, forward and backward. Each
launch is written down instead of run, so that what is compiled is what would be launched: the same types, the same
constants, the same warps. The exit status is 1 if a kernel spills registers to memory, unless the reason is known here.

`--json` keeps the rows of the file that were not compiled anew, if they are of these versions: the whole takes a core a
quarter of an hour, and can be done in pieces.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHS = (80, 90, 100)
KNOWN_SPILLS: dict[tuple[str, str, int], str] = {}
"""(kernel, case, architecture) → why its spills are accepted."""


@dataclass
class Launch:
    """What a launch says to the compiler."""

    case: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[object]]]
    options: dict[str, int]


@dataclass
class Row:
    """One kernel in one configuration on one architecture."""

    case: str
    kernel: str
    arch: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    num_stages: int

    @property
    def reason(self) -> str:
        """Why its spills are accepted; empty where it has none, or no reason."""
        return KNOWN_SPILLS.get((self.kernel, self.case, self.arch), "") if self.spilled_bytes else ""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a tensor without storage that wants a gradient if it can have one."""
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def backward(outs: Any) -> None:
    """Go back from all results."""
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])


def norms() -> None:
    """Phi-3's and SigLIP's norms."""
    from fused_kernels import norms_triton as norms

    x, weight, bias = meta(4096, 3072), meta(3072), meta(3072)
    backward(norms.rms_norm(x, weight, 1e-5))
    backward(norms.add_rms_norm(x, x, weight, 1e-5))
    x, weight, bias = meta(3645, 1152), meta(1152), meta(1152)
    backward(norms.layer_norm(x, weight, bias, 1e-6))
    backward(norms.add_layer_norm(x, x, weight, bias, 1e-6))


def widest_norms() -> None:
    """The widest rows that a program can hold."""
    from fused_kernels import norms_triton as norms

    x, weight, bias = meta(64, 8192), meta(8192), meta(8192)
    backward(norms.add_rms_norm(x, x, weight, 1e-5))
    backward(norms.add_layer_norm(x, x, weight, bias, 1e-6))


def pointwise() -> None:
    """Rotation, activations, rows and pixels."""
    from fused_kernels import activations_triton, pixels_triton, rotary_triton, rows_triton

    packed = meta(4096, 96, 96)
    q, k, _ = packed.split(32, dim=1)
    angles = meta(4096, 48, dtype=torch.float32)
    backward(rotary_triton.rotary_embedding(q, k, angles, angles))
    backward(activations_triton.swiglu(meta(4096, 2 * 8192)))
    backward(activations_triton.gelu_tanh(meta(3645, 4304), None))
    backward(activations_triton.gelu_tanh(meta(3645, 4304), meta(4304)))
    backward(rows_triton.replace_rows(meta(4096, 3072), meta(640, 3072), meta(640, dtype=torch.int64)))
    pixels_triton.normalised_patches(meta(5, 3, 384, 384, dtype=torch.uint8), 14, torch.bfloat16)


def loss() -> None:
    """The head's softmax, with and without a gradient for each row."""
    from fused_kernels.linear_loss_triton import LogProbs, SumOfNegativeLogProbs

    x, head, bias, labels = meta(512, 3072), meta(32064, 3072), meta(32064), meta(512, dtype=torch.int64)
    backward(SumOfNegativeLogProbs.apply(x, head, bias, labels, None, True))
    backward(LogProbs.apply(x, head, bias, labels, None, None))


def integers() -> None:
    """One token through quantised matrices."""
    from fused_kernels import int_matmul_triton

    x = meta(1, 3072)
    int_matmul_triton.int8_matmul(x, meta(32064, 3072, dtype=torch.int8), meta(32064))
    int_matmul_triton.int4_matmul(x, meta(144, 3072, 32, dtype=torch.uint8), meta(96, 9216, 2))


def packed_attention(head_dim: int, window: int | None = None, is_causal: bool = True) -> None:
    """A pack of 4096 tokens, q, k and v views of one product."""
    from fused_kernels.packed_triton import packed_attention as attend

    q, k, v = meta(4096, 96, head_dim).split(32, dim=1)
    bounds = meta(4096, dtype=torch.int32)
    backward(attend(q, k, v, bounds, bounds, is_causal=is_causal, window=window, scale=None))


def vision_attention() -> None:
    """Five tiles of SigLIP so400m."""
    from fused_kernels.dense_triton import attention

    q, k, v = (meta(5, 729, 16, 72) for _ in range(3))
    backward(attention(q, k, v, None, None))


def latent_attention() -> None:
    """Five tiles of the resampler, patches masked."""
    from fused_kernels.dense_triton import joint_attention

    q, more_k, more_v = (meta(5, 128, 16, 96) for _ in range(3))
    k, v = meta(5, 729, 2, 16, 96).unbind(2)
    backward(joint_attention(q, k, v, more_k, more_v, meta(5, 729, dtype=torch.bool), None))


def cases() -> dict[str, Callable[[], None]]:
    """Return the calls to write down, by name."""
    found: dict[str, Callable[[], None]] = {
        "norms": norms,
        "norms, widest": widest_norms,
        "pointwise": pointwise,
        "loss": loss,
        "integers": integers,
        "attention, vision": vision_attention,
        "attention, latents": latent_attention,
    }
    for head_dim in (64, 72, 80, 96, 128):
        found[f"attention, packed, {head_dim}"] = lambda head_dim=head_dim: packed_attention(head_dim)
    found["attention, packed, window"] = lambda: packed_attention(96, window=2047)
    found["attention, packed, both ways"] = lambda: packed_attention(96, is_causal=False)
    return found


def describe(case: str, kernel: Any, args: Sequence[object], kwargs: dict[str, Any]) -> Launch:
    """Say of a launch's arguments what Triton's own specialisation would: types, constants, multiples of 16."""
    from triton.runtime.jit import mangle_type

    named: dict[str, Any] = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
    launch = Launch(case, kernel, {}, {}, {}, options)
    for index, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            launch.signature[parameter.name] = "constexpr"
            launch.constants[parameter.name] = value
            continue
        launch.signature[parameter.name] = mangle_type(value)
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            launch.attributes[(index,)] = [["tt.divisibility", 16]]
    return launch


def launches(names: Sequence[str], arch: int) -> Iterator[Launch]:
    """Run the cases as on this architecture and yield each different launch once."""
    from triton.runtime.jit import JITFunction

    from fused_kernels import attention_triton

    written: list[Launch] = []
    case = ""

    def run(kernel: Any, *args: object, grid: object, warmup: bool, **kwargs: Any) -> None:
        del grid, warmup
        written.append(describe(case, kernel, args, kwargs))

    functions: Any = JITFunction
    original, functions.run = functions.run, run
    generation, attention_triton.generation = attention_triton.generation, lambda device: arch // 10
    try:
        for case, call in cases().items():
            if case in names:
                call()
    finally:
        functions.run = original
        attention_triton.generation = generation
    seen: set[str] = set()
    for launch in written:
        key = repr((launch.kernel.__name__, launch.signature, launch.constants, launch.attributes, launch.options))
        if key not in seen:
            seen.add(key)
            yield launch


def compiled(launch: Launch, arch: int) -> Row:
    """Compile for this architecture; the assembler's own log says what it needs."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        # From the cache there would be no log.
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        kernel: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    stores = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    if not stores or not registers:
        raise RuntimeError(f"assembler's log: expected registers and spills, got {log.getvalue()!r}; look at ptxas")
    return Row(
        launch.case,
        launch.kernel.__name__,
        arch,
        max(map(int, registers)),
        max(int(stored) + int(loaded) for stored, loaded in stores),
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        kernel.metadata.num_stages,
    )


def versions() -> dict[str, str]:
    """What decides of the result beside the kernels."""
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def merged(path: Path, found: Sequence[Row]) -> dict[str, Any]:
    """What was found, in place of the file's rows of the same cases and architectures.

    Raises:
        SystemExit: the file is of other versions.
    """
    held: dict[str, Any] = {"versions": versions(), "rows": []}
    if path.exists():
        held = json.loads(path.read_text())
    if held["versions"] != versions():
        sys.exit(f"--json {path}: expected rows of {versions()}, got {held['versions']}; name another file")
    anew = {(row.case, row.arch) for row in found}
    rows = [row for row in held["rows"] if (row["case"], row["arch"]) not in anew]
    rows += [asdict(row) | {"reason": row.reason} for row in found]
    order = list(cases())
    return {**held, "rows": sorted(rows, key=lambda row: (row["arch"], order.index(row["case"])))}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a kernel spills without a known reason."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="architecture; may be repeated")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args(argv)
    names = [name for name in cases() if args.only in name]
    if not names:
        parser.error(f"--only: expected part of one of {', '.join(cases())}, got {args.only!r}")
    # The interpreter, which this would switch on, compiles nothing; Triton reads it at its import.
    os.environ.pop("TRITON_INTERPRET", None)
    rows: list[Row] = []
    is_bad = False
    print(f"{'kernel':30} {'case':28} {'arch':>6} {'registers':>9} {'spilled':>8} {'shared':>7} warps stages")
    for arch in args.arch or ARCHS:
        for launch in launches(names, arch):
            row = compiled(launch, arch)
            rows.append(row)
            is_bad |= bool(row.spilled_bytes) and not row.reason
            print(
                f"{row.kernel.strip('_'):30} {row.case:28} {f'sm_{arch}':>6} {row.registers:9} {row.spilled_bytes:8} "
                f"{row.shared_bytes:7} {row.num_warps:5} {row.num_stages:6} {row.reason}".rstrip(),
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(merged(args.json, rows), indent=1) + "\n")
    if is_bad:
        print("a kernel spills: expected none, or a reason in KNOWN_SPILLS", file=sys.stderr)
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
