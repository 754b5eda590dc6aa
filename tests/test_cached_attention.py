"""cached_attention(): against the reference in float64, interpreted on the CPU and on a GPU; its compiled kernel."""

import re

import pytest
import torch

from kernels import cached_attention as module
from kernels import reference
from kernels.cached_attention import cached_attention, cached_attention_kernel, cached_attention_merge_kernel
from kernels.launch import configs
from tests.aot import compile_for_h100
from tests.kernel_tools import CUDA, compiled, error, gpu, graphed, interpreted

# H, G, D, R/2, C
SHAPES = [(4, 2, 16, 4, 40), (2, 1, 32, 16, 100), (8, 4, 64, 8, 150), (6, 2, 16, 2, 20)]


def make(shape, dtype, device, seed=0):
    heads, kv_heads, dim, half, context = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator, device=device)

    angles = reference.rotary_table(context, 2 * half, 1e4, context, device)
    qkv = normal(1, heads + 2 * kv_heads, dim).to(dtype)
    return qkv, normal(heads), *angles, *(normal(context, kv_heads, dim).to(dtype) for _ in range(2))


def borders(context):
    """Positions at both ends, and where another program begins or has its first key."""
    return sorted(x for x in {0, 1, 63, 64, 65, 128, 129, context // 2, context - 2, context - 1} if x < context)


def check(shape, position, dtype, device, least):
    """Later positions hold NaN for the kernel and zeros for the reference, which wants them finite."""
    qkv, gain, cos, sin, keys, values = make(shape, dtype, device)
    exact = [x.double() for x in (keys, values)]
    for found, x in zip((keys, values), exact, strict=True):
        found[position + 1 :], x[position + 1 :] = torch.nan, 0
    at = torch.tensor([position], device=device)
    y = cached_attention(qkv, gain, cos, sin, at, keys, values)
    wanted = reference.cached_attention(qkv.double(), gain.double(), cos.double(), sin.double(), at, *exact)
    for found, x in ((y, wanted), (keys[: position + 1], exact[0][: position + 1])):
        assert error(found, x, 1e-3) < least
    assert torch.equal(values[: position + 1].double(), exact[1][: position + 1])
    assert keys[position + 1 :].isnan().all()


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_interpreted_values(shape, poisoned):
    for position in borders(shape[4]):
        check(shape, position, torch.float32, "cpu", 1e-6)


@interpreted
def test_more_splits_than_are_merged_at_a_time(poisoned, monkeypatch):
    tiles = {"split": {"BLOCK_C": 16}, "merge": {"BLOCK_S": 2}}
    monkeypatch.setattr(module, "settings", lambda op, device: tiles)
    for position in (0, 15, 16, 17, 32, 33, 65, 80, 99):
        check(SHAPES[1], position, torch.float32, "cpu", 1e-6)


@interpreted
def test_several_tokens_are_one_after_the_other(poisoned):
    _, gain, cos, sin, keys, values = make(SHAPES[0], torch.float32, "cpu")
    several = torch.cat([make(SHAPES[0], torch.float32, "cpu", seed)[0] for seed in range(5)])
    cached = [x.clone() for x in (keys, values)]
    at = torch.arange(10, 15)
    wanted = cached_attention(several, gain, cos, sin, at, keys, values)
    found = [cached_attention(several[i : i + 1], gain, cos, sin, at[i : i + 1], *cached) for i in range(5)]
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cached, [keys, values])


@interpreted
def test_registration():
    qkv, gain, cos, sin, keys, values = make(SHAPES[0], torch.float32, "cpu")
    given = qkv, gain, cos, sin, torch.tensor([3]), keys, values
    torch.library.opcheck(torch.ops.golf.cached_attention.default, given)


@interpreted
@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, torch.zeros(8, 16), r"qkv \(T, H \+ 2G, D\).*got \(8, 16\)"),
        (0, torch.zeros(1, 8, 24), r"got \(1, 8, 24\)"),
        (0, torch.zeros(1, 9, 16), "5 query and 2 KV heads"),
        (1, torch.zeros(4).double(), "gain .* got .* torch.float64"),
        (2, torch.zeros(40, 9), "R 18 and D 16"),
        (4, torch.tensor([3], dtype=torch.int32), "position .* got .* torch.int32"),
        (5, torch.zeros(39, 2, 16), r"cos \(39, 4\).*got \(40, 4\)"),
        (6, torch.zeros(40, 2, 16).half(), "values .* got .* torch.float16"),
    ],
)
def test_errors_name_what_was_found(place, change, message):
    qkv, gain, cos, sin, keys, values = make(SHAPES[0], torch.float32, "cpu")
    given = [qkv, gain, cos, sin, torch.tensor([3]), keys, values]
    given[place] = change
    with pytest.raises(ValueError, match=message):
        cached_attention(*given)


@compiled
@pytest.mark.parametrize(("dim", "group", "registers"), [(64, 2, 128), (64, 16, 128), (128, 16, 255)])
def test_compiled_for_h100(dim, group, registers):
    config = configs("h100")["cached_attention"]
    types = dict.fromkeys(("gain", "cos", "sin", "parts"), "*fp32") | {"position": "*i64"}
    types |= dict.fromkeys(("QUERIES", "KV_HEADS", "SPLITS"), "i32")
    shape = {"D": dim, "GROUP": group, "EARLY": True}
    built = compile_for_h100(cached_attention_kernel, types, shape | {"HALF": 8}, config["split"])
    assert built.stack == 0
    assert built.registers <= registers
    assert built.shared <= 48 * 1024
    if dim == 64:  # the model's: memory is waited for twice, for the position, then for all else at once
        lines = re.findall(r"ACQBULK|PREEXIT|LDG\.|BAR\.SYNC|EXIT", built.sass)
        after = lines.index("PREEXIT")
        assert lines[:3] == ["ACQBULK", "LDG.", "EXIT"]
        assert set(lines[3:after]) == {"LDG."}
        assert "LDG." not in lines[after:]
    shape |= {"BLOCK_C": config["split"]["BLOCK_C"]}
    built = compile_for_h100(cached_attention_merge_kernel, types, shape, config["merge"])
    assert built.stack == 0
    assert built.registers <= 128
    lines = re.findall(r"ACQBULK|PREEXIT|LDG\.|BAR\.SYNC", built.sass)
    assert "LDG." not in lines[lines.index("BAR.SYNC", lines.index("ACQBULK")) :]


@gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
class TestOnGPU:
    @pytest.mark.parametrize(
        "shape", [(8, 4, 64, 8, 2048), (4, 4, 128, 64, 300), (16, 1, 64, 16, 333), (2, 1, 64, 8, 8192), *SHAPES]
    )
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_values(self, shape, dtype, poisoned):
        for position in borders(shape[4]):
            check(shape, position, dtype, "cuda", 6e-3)

    def test_one_graph_for_every_position(self, poisoned):
        qkv, gain, cos, sin, keys, values = make((8, 4, 64, 8, 512), torch.bfloat16, "cuda")
        at = torch.zeros(1, dtype=torch.int64, device="cuda")
        graph, out = graphed(lambda: cached_attention(qkv, gain, cos, sin, at, keys, values))
        for position in (3, 511, 0, 400, 64, 65, 128, 77):
            at.fill_(position)
            graph.replay()
            found = out.clone()
            for _ in range(3):
                assert torch.equal(found, cached_attention(qkv, gain, cos, sin, at, keys, values))

    def test_each_token_sees_what_the_one_ahead_wrote(self):
        """Launches that follow each other at once, in a graph, are those that wait for each other."""
        shape, count = (8, 4, 64, 8, 512), 300
        _, gain, cos, sin, *cache = make(shape, torch.bfloat16, "cuda")
        rows = torch.cat([make(shape, torch.bfloat16, "cuda", seed)[0] for seed in range(count)])
        at = torch.arange(100, 100 + count, device="cuda")
        together, apart = ([x.clone() for x in cache] for _ in range(2))

        def tokens(cached, between=lambda: None):
            found = []
            for i in range(count):
                found.append(cached_attention(rows[i : i + 1], gain, cos, sin, at[i : i + 1], *cached))
                between()
            return torch.cat(found)

        graph, out = graphed(lambda: tokens(together))
        for x, before in zip(together, cache, strict=True):
            x.copy_(before)
        graph.replay()
        assert torch.equal(out, tokens(apart, torch.cuda.synchronize))
        assert all(map(torch.equal, together, apart))
