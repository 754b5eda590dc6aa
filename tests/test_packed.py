"""A model that runs from packed codes: bit for bit the dequantised one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpt import artifact
from gpt.artifact import Artifact
from gpt.generate import Decoder, generate
from gpt.gptq import INPUTS, QuantisationError
from gpt.ledger import fingerprint
from gpt.model import GPT, Matrices
from gpt.pack import pack
from gpt.packed import PackedGPT
from kernels import select
from tests.kernel_tools import CUDA, gpu
from tests.tiny import ALONE, CPU, random_tokens, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
OPS = select("reference", CPU)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path: Path = tmp_path_factory.mktemp("packed") / "model.pga"
    config = tiny_config(model_dim=64, num_heads=4, num_kv_heads=2, rope_dims=8)  # the least that GPU kernels take
    pack(tiny_model(config), config.depth(True), "0" * 64, [random_tokens(64, 64).view(4, 16)], path, ALONE, 0)
    return artifact.load(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_and_score_is_the_dequantised_models(made: Artifact, dtype: torch.dtype) -> None:
    whole, packed = made.model(OPS, CPU, dtype), made.packed_model(OPS, CPU, dtype)
    for kind in Matrices._fields:
        for a, b in zip(getattr(whole.matrices(), kind), getattr(packed.matrices(), kind), strict=True):
            assert torch.equal(a, b)
            assert b.dtype == dtype
    for a, b in zip(whole.parameters(), packed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(fingerprint(whole.parameters()), fingerprint(packed.parameters()))
    tokens = random_tokens(68, 64).view(4, 17)
    given = tokens[:, :-1], tokens[:, 1:], made.depth, whole.rotary(16)
    assert torch.equal(whole.losses(*given), packed.losses(*given))
    assert torch.equal(whole.embedding(tokens), packed.embedding(tokens))


def test_its_matrices_take_six_bits(made: Artifact) -> None:
    packed = made.packed_model(OPS, CPU, torch.float32)
    assert not any(name in INPUTS for name, _ in packed.named_parameters())
    for kind, matrices in packed.packed.items():
        assert {matrix.codes.dtype for matrix in matrices} == {torch.int8 if kind == "head" else torch.uint8}


def test_text_is_the_dequantised_models(made: Artifact) -> None:
    whole, packed = made.model(OPS, CPU, torch.float64), made.packed_model(OPS, CPU, torch.float64)
    texts = [list(generate(model, made.depth, [5, 6], 30, 0.7, 0.9, 3, stop=())) for model in (whole, packed)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 5
    found = [Decoder(model, made.depth).extend([1, 5, 6]) for model in (whole, packed)]
    assert torch.equal(*found)


def test_a_mixture_of_bits_and_what_is_not_quantised(made: Artifact) -> None:
    tensors = dict(made.tensors)
    keys = tensors["kv_bank"]
    assert not isinstance(keys, torch.Tensor)
    tensors["kv_bank"] = keys._replace(kind="int8")
    mixed = PackedGPT(made.config, tensors, OPS, CPU, torch.float32)
    assert mixed.packed["qkv"][0].codes.dtype == torch.int8
    for a, b in zip(made.model(OPS, CPU, torch.float32).parameters(), mixed.parameters(), strict=True):
        assert torch.equal(a, b)
    tensors["mlp_up_bank"] = torch.zeros(3, 128, 64)
    with pytest.raises(QuantisationError, match=r"mlp_up_bank is torch\.float32: a packed model wants it quantised"):
        PackedGPT(made.config, tensors, OPS, CPU, torch.float32)


@gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_graph_of_a_step_is_the_whole_forward(made: Artifact) -> None:
    """Packed with the kernels of a GPU, and dense with eager ops: steps from the graph, at any place of a row."""
    device = torch.device("cuda")
    ours = made.packed_model(select("auto", device), device, torch.bfloat16)
    eager, exact = (made.model(select("reference", device), device, dtype) for dtype in (torch.bfloat16, torch.float32))
    tokens = [token for token in random_tokens(40, 64).tolist() if token != 1][:16]

    def whole(model: GPT) -> Tensor:
        rows = (torch.tensor([tokens[:end]], device=device) for end in range(1, 17))
        return torch.stack([model.logits(row, made.depth, model.rotary(row.size(1)))[0] for row in rows])

    wanted = whole(exact)
    bound = 2 * (whole(eager) - wanted).norm()
    for model in (ours, eager):
        decoder = Decoder(model, made.depth)
        found = torch.stack([decoder.extend([token]).clone() for token in tokens])
        assert (found - wanted).norm() < bound
        assert decoder._graph is not None
        drawn = [list(generate(model, made.depth, [5, 6], 40, 0.8, 0.9, 3, stop=())) for _ in range(2)]
        assert drawn[0] == drawn[1]
        assert len(set(drawn[0])) > 5
