"""Attention with XSA beside its peers: values first, then milliseconds, TFLOP/s and percent of the measured ceiling.

    python -m bench.attention --tokens data/val.bin --out bench/results/attention-h100.json

The peers compute attention with their own kernel and XSA with torch.compile. Medians of triton.testing.do_bench; every
implementation of a case is timed in the same run. Set TORCHINDUCTOR_MIX_ORDER_REDUCTION=0 for a fair compiled XSA.
"""

import argparse
import json
import subprocess
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.testing import do_bench

from kernels import reference
from kernels.attention import attention

# batch, length, query heads, KV heads, head dimension; documents only where the name says so
CASES = {
    "seed": (48, 2048, 8, 4, 64),
    "documents": (48, 2048, 8, 4, 64),
    "long": (1, 32768, 8, 4, 64),
    "short": (192, 512, 8, 4, 64),
    "single": (1, 2048, 8, 4, 64),
    "d128": (48, 2048, 4, 2, 128),
    "h16-2": (48, 2048, 16, 2, 64),
}


def transposed(f):
    def call(q, k, v):
        return f(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return call


def peers(shape, starts):
    """Name -> attention and XSA as one callable of q, k, v."""
    batch, length = shape[:2]
    compiled_xsa = torch.compile(reference.exclusive)
    found = {}
    if starts is None:

        def cudnn(q, k, v):
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        found["cudnn+xsa"] = transposed(cudnn)
        try:
            from flash_attn.cute import flash_attn_func

            def fa4(q, k, v):
                out = flash_attn_func(q, k, v, causal=True)
                return out[0] if isinstance(out, tuple) else out

            found["fa4+xsa"] = fa4
        except ImportError:
            print("flash-attn-4 is not installed: left out")

    def visible(b, h, q, k):
        return (k <= q) if starts is None else (k <= q) & (k >= starts[b, q])

    mask = create_block_mask(visible, None if starts is None else batch, None, length, length, device="cuda")
    flex = torch.compile(flex_attention)
    found["flex+xsa"] = transposed(lambda q, k, v: flex(q, k, v, block_mask=mask, enable_gqa=True))
    return {name: (lambda q, k, v, f=f: compiled_xsa(f(q, k, v), v)) for name, f in found.items()}


def truth(q, k, v, g, starts):
    """float64 output and gradients of a few rows."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    mask = None
    if starts is not None:
        t = torch.arange(q.shape[1], device=q.device)
        mask = ((t[None, :] <= t[:, None])[None] & (t[None, None, :] >= starts[:, :, None]))[:, None]
    out = reference.attention(q, k, v, mask)
    return out, *torch.autograd.grad(out, (q, k, v), g.double())


def error(f, q, k, v, g, expected):
    """Worst relative Frobenius error of the output and the three gradients, on the first rows."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = f(q, k, v)
    rows = expected[0].shape[0]
    got = (out, *torch.autograd.grad(out, (q, k, v), g))
    errors = [
        ((a[:rows].double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(got, expected, strict=True)
    ]
    return errors[0], max(errors[1:])


def document_starts(path, batch, length):
    """Positions where each token's document starts, in the first rows of a shard (BOS is token 1)."""
    raw = torch.from_file(path, size=512 + batch * length, dtype=torch.uint16)[512:]
    first = raw.view(batch, length).to(torch.int32) == 1
    first[:, 0] = True
    position = torch.arange(length, dtype=torch.int32)
    return torch.where(first, position, 0).cummax(1).values.to(torch.int32).cuda()


def measure(name, shape, starts, ceiling):
    batch, length, heads, kv_heads, dim = shape
    x = torch.randn(batch, length, (heads + 2 * kv_heads) * dim, device="cuda").bfloat16()
    sizes = [n * dim for n in (heads, kv_heads, kv_heads)]
    q, k, v = (y.unflatten(-1, (-1, dim)) for y in x.split(sizes, -1))
    g = torch.randn(batch, length, heads, dim, device="cuda").bfloat16()
    pairs = batch * length * (length + 1) / 2
    if starts is not None:
        pairs = (torch.arange(length, device="cuda") - starts + 1).sum().item()
    rows = 2 if length <= 4096 else 0
    expected = (
        truth(q[:rows], k[:rows], v[:rows], g[:rows], None if starts is None else starts[:rows]) if rows else None
    )
    implementations = {
        "triton": lambda q, k, v: attention(q, k, v, starts),
        "triton-deterministic": lambda q, k, v: attention(q, k, v, starts, True),
        **peers(shape, starts),
    }
    table = []
    for impl, f in implementations.items():
        try:
            errors = error(f, q, k, v, g, expected) if rows else (None, None)
            if rows and not max(errors) < 2e-2:
                raise ValueError(f"wrong values: {errors}")
            leaves = [y.detach().clone().requires_grad_() for y in (q, k, v)]
            out = f(*leaves)
            times = (
                do_bench(lambda f=f: f(q, k, v), quantiles=[0.5, 0.2, 0.8]),
                do_bench(lambda: torch.autograd.grad(out, leaves, g, retain_graph=True), quantiles=[0.5, 0.2, 0.8]),  # noqa: B023
            )
        except Exception as failure:
            print(f"{name:10s} {impl:22s} {type(failure).__name__}: {str(failure)[:80]}")
            continue
        for op, flops, (ms, low, high), e in zip(("forward", "backward"), (4, 10), times, errors, strict=True):
            tflops = flops * dim * heads * pairs / ms / 1e9
            table.append(
                {"op": f"attention_{op}", "case": name, "impl": impl, "ms": round(ms, 4), "ms_p20": round(low, 4),
                 "ms_p80": round(high, 4), "tflops": round(tflops, 1), "gb_s": None,
                 "percent_of_ceiling": round(100 * tflops / ceiling, 1), "error": e}
            )  # fmt: skip
            print(
                f"{name:10s} {op:9s} {impl:22s} {ms:8.3f} ms {tflops:7.1f} TFLOP/s {100 * tflops / ceiling:5.1f} %  {e}"
            )
    for row in table:
        other = [r["error"] for r in table if r["op"] == row["op"] and not r["impl"].startswith("triton")]
        row["reference_error"] = other[0] if other else None
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--tokens", help="a token shard, for the case 'documents'")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    ceiling = 2 * 8192**3 / do_bench(lambda: a @ b, return_mode="median") / 1e9
    rows = []
    for name in arguments.cases:
        starts = None
        if name == "documents":
            if arguments.tokens is None:
                print("documents: needs --tokens, left out")
                continue
            starts = document_starts(arguments.tokens, *CASES[name][:2])
        rows += measure(name, CASES[name], starts, ceiling)
        torch.cuda.empty_cache()
    if arguments.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = {
            "bench": "attention", "gpu": torch.cuda.get_device_name(), "gpus": 1, "torch": torch.__version__,
            "triton": triton.__version__, "commit": commit, "date": date.today().isoformat(),
            "command": "python -m bench.attention " + " ".join(arguments.cases),
            "ceilings": {"bf16_tflops": round(ceiling, 1)}, "rows": rows,
        }  # fmt: skip
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
