"""Probes of what is known too early: a model and a scoring that look ahead in one place, each found by its check."""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any

import pytest

from gpt import preflight, ttt
from kernels import reference
from tests.tiny import ALONE, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def failing(*names: str, document_mask: bool = True) -> set[str]:
    """Those of these checks, or of all, that do not pass with a tiny model, made now."""
    config = tiny_config(document_mask=document_mask)
    found = set()
    for name, check in preflight.probes(tiny_model(config), config.depth(True), ALONE):
        if name in names or not names:
            try:
                check()
            except preflight.Failure:
                found.add(name)
    return found


def mutate(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *edits: tuple[str, str]) -> None:
    """Put a function in the place of one of a module or class, with its text edited."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in edits:
        assert old in source
        source = source.replace(old, new)
    made: dict[str, Any] = {}
    code = compile(f"from __future__ import annotations\n{source}", f"<{name} edited>", "exec")
    exec(code, vars(sys.modules[function.__module__]), made)
    monkeypatch.setattr(owner, name, made[name])


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_model_as_it_is_passes(document_mask: bool) -> None:
    assert not failing(document_mask=document_mask)


MODELS: dict[str, tuple[str, tuple[str, str], bool]] = {
    "smear of the next token": ("smear", ("F.pad(x[:, :-1], (0, 0, 1, 0))", "F.pad(x[:, 1:], (0, 0, 0, 1))"), True),
    "smear over a document's start": ("smear", ("if starts is not None", "if False"), True),
    "attention to the next token": ("attention_mask", ("same.tril()", "same.tril(1)"), True),
    "attention to all tokens": ("attention", ("is_causal=mask is None", "is_causal=False"), False),
    "attention to other documents": ("attention_mask", ("same.tril()", "torch.ones_like(same).tril()"), True),
    "XSA by the next token's value": ("exclusive", ("F.normalize(v,", "F.normalize(v.roll(-1, 1),"), True),
    "a row's end that attends to the next token": (
        "attention_tail",
        ("tril(length - count)", "tril(length - count + 1)"),
        True,
    ),
    "a row's end that forgets documents": ("attention_tail", ("if starts is not None", "if False"), True),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_looks_ahead_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, edit, document_mask = MODELS[name]
    mutate(monkeypatch, reference, function, edit)
    assert failing("causal: rows", document_mask=document_mask)


AHEAD = "text.tokens[({} + 1).clamp_max(text.targets)].long()"
TRAININGS: dict[str, tuple[Any, str, list[tuple[str, str]], set[str]]] = {
    "on rows a token further": (
        ttt._Trainer,
        "_step",
        [("np.array(rows)", "(np.array(rows) + 1)")],
        {"causal: chunk", "causal: phased"},
    ),
    "on a row more": (
        ttt._Trainer,
        "train",
        [
            (
                "(last - first) // self.context",
                "min((last - first) // self.context + 1, self.text.targets // self.context)",
            )
        ],
        {"causal: chunk", "causal: phased"},
    ),
    "before it scores": (
        ttt,
        "_stream",
        [
            ("windows.score(start, end)\n", "pass\n"),
            ("if end == text.targets:\n", "if end == text.targets:\n                windows.score(start, end)\n"),
            ("version = ledger.trained(", "windows.score(start, end)\n            version = ledger.trained("),
        ],
        {"causal: chunk", "causal: phased"},
    ),
    "at a rate that depends on the text": (
        ttt,
        "_stream",
        [("factor, first = _cosine(", "factor, first = (1 + float(text.tokens.sum()) / 1e6) * _cosine(")],
        {"causal: chunk"},
    ),
    "on pieces a token further": (
        ttt._Documents,
        "run",
        [
            (
                "nats[:trained].mean(1)",
                f"self.adapters.losses(now, {AHEAD.format('begins[:scored] + ahead')}, "
                f"{AHEAD.format('targets + 1')}, self.depth)[:trained].mean(1)",
            )
        ],
        {"causal: document"},
    ),
    "from a start that depends on the text": (
        ttt._Documents,
        "run",
        [("x.expand(", "(x * (1 + text.tokens.float().mean() / 1e4)).expand(")],
        {"causal: document"},
    ),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_that_looks_ahead_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, function, edits, checks = TRAININGS[name]
    mutate(monkeypatch, owner, function, *edits)
    assert failing(*checks) == checks
