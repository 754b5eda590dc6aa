"""The one-file program: it holds every source file, and is the program."""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import train
from gpt import bundle
from gpt.config import ROOT
from gpt.data import open_shard, write_shard
from gpt.selfextract import split

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLE = ROOT / "data/sample"
# A model small enough for a test, by the seed's own environment names.
SMALL = {
    "PRESET": "sample",
    "NUM_LAYERS": "3",
    "MODEL_DIM": "32",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "ROPE_DIMS": "4",
    "RECUR_LAYERS": "1",
    "RECUR_START_STEP": "2",
    "TRAIN_SEQ_LEN": "32",
    "TRAIN_BATCH_TOKENS": "256",
    "MICRO_BATCH_TOKENS": "256",
    "VAL_BATCH_SIZE": "1024",
    "EVAL_STRIDE": "16",
    "ITERATIONS": "4",
    "WARMUP_STEPS": "1",
    "MAX_WALLCLOCK_SECONDS": "0",
    "GPTQ_CALIBRATION_BATCHES": "2",
    "TRAIN_LOG_EVERY": "1",
    "VAL_LOSS_EVERY": "2",
    "CHECKPOINT_EVERY": "0",
}


def sample_data(folder: Path) -> Path:
    """The sample's training shard with a validation of two thousand tokens."""
    folder.mkdir()
    (folder / "fineweb_train_000000.bin").symlink_to(SAMPLE / "fineweb_train_000000.bin")
    write_shard(folder / "fineweb_val_000000.bin", np.array(open_shard(SAMPLE / "fineweb_val_000000.bin")[:2001]))
    return folder


def small_run(data: Path, runs: Path, name: str, **settings: str) -> Path:
    """A finished run of the repository's train.py, in this process."""
    places = {"DATA_PATH": str(data), "RUNS_PATH": str(runs), "RUN_ID": name}
    with pytest.MonkeyPatch.context() as patch:
        for setting, value in {**SMALL, **places, **settings}.items():
            patch.setenv(setting, value)
        assert train.main([]) == 0
    return runs / name


def script(folder: Path) -> Path:
    path = folder / "train_gpt.py"
    path.write_bytes(bundle.build(ROOT))
    return path


def run_script(path: Path, *arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """As a user: from the script's own folder, without the repository."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, path.name, *map(str, arguments)],
        cwd=path.parent,
        env={**inherited, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(path.parent / "cache"), **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_one_file_trains_and_scores_as_the_repository(tmp_path: Path) -> None:
    data = sample_data(tmp_path / "data")
    ours = small_run(data, tmp_path, "ours", SEED="42")
    folder = tmp_path / "empty"
    folder.mkdir()
    one_file = script(folder)
    done = run_script(
        one_file,
        "--data-path",
        data,
        "--seed",
        "42",
        "--run-id",
        "theirs",
        **SMALL,
        TOKENIZER_PATH=str(SAMPLE / "tokenizer.model"),
    )
    assert done.returncode == 0, done.stderr
    theirs = folder / "runs/theirs"
    curves = []
    for run in (ours, theirs):
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        keys = ("step", "train_loss", "gradient_norm", "layers", "val_loss", "val_bpb")
        curves.append([[entry.get(key, -1) for key in keys] for entry in entries])
    assert len(curves[0]) == 7
    assert curves[0] == curves[1]
    one, other = (json.loads((run / "summary.json").read_text()) for run in (ours, theirs))
    for name, score in one["scores"].items():
        assert other["scores"][name]["bpb"] == score["bpb"]
    assert one["artifact"]["sha256"] == other["artifact"]["sha256"]
    # What was counted in either place is the file itself, and both know their code by one name.
    size = one_file.stat().st_size
    assert one["artifact"]["code_nbytes"] == other["artifact"]["code_nbytes"] == size
    first, second = (json.loads((run / "environment.json").read_text()) for run in (ours, theirs))
    assert first["code_sha256"] == second["code_sha256"] == bundle.code_sha256(ROOT)
    assert second["git_commit"] is None
    assert second["command"].startswith("train_gpt.py")

    done = run_script(
        one_file, "quantize", "score", theirs / "model.pga", "--data-path", data, "--json", folder / "score.json",
        "--tokenizer-path", SAMPLE / "tokenizer.model",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{size:,d} code" in done.stdout
    scored = json.loads((folder / "score.json").read_text())["scores"]
    assert scored["plain"]["bpb"] == other["scores"]["artifact"]["bpb"]


def test_processes_unpack_at_once(tmp_path: Path) -> None:
    """Eight at a time into an empty cache, into a damaged one, and where there is no cache to write to."""
    path = script(tmp_path)

    def folders(**environ: str) -> set[str]:
        with ThreadPoolExecutor(8) as threads:
            done = list(threads.map(lambda _: run_script(path, "source", **environ), range(8)))
        assert not any(one.returncode for one in done), done[0].stderr
        return {one.stdout.strip() for one in done}

    (folder,) = folders()
    source = Path(folder)
    assert source.is_relative_to(tmp_path / "cache")
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    assert files.pop(bundle.CARRIED) == path.read_bytes()
    assert files == bundle.source_files(path.read_bytes())
    assert {"train.py", "quantize.py", "gpt/config.py", "kernels/reference.py", "kernels/configs/h100.json"} <= set(
        files
    )
    assert all(bundle.lean(name, (ROOT / name).read_bytes()) == data for name, data in files.items())
    assert bundle.code_sha256(source) == bundle.code_sha256(ROOT)
    assert bundle.build(source) == path.read_bytes()

    (source / "train.py").write_text("damaged")
    (source / "gpt/config.py").unlink()
    assert folders() == {folder}
    assert (source / "train.py").read_bytes() == files["train.py"]
    assert (source / "gpt/config.py").read_bytes() == files["gpt/config.py"]

    elsewhere = folders(XDG_CACHE_HOME="/dev/null", TMPDIR=str(tmp_path))
    assert len(elsewhere) == 8
    for other in elsewhere:
        assert (Path(other) / "train.py").read_bytes() == files["train.py"]
        shutil.rmtree(other)


def test_kernels_have_their_source(tmp_path: Path) -> None:
    """Triton reads a kernel's source from its file; workers import the script and find the modules."""
    pytest.importorskip("triton")
    path = script(tmp_path)
    probe = (
        "import train_gpt, inspect, kernels.attention as a\n"
        "print(sum('def ' + k.fn.__name__ in inspect.getsource(k.fn) for k in vars(a).values() if hasattr(k, 'fn')))\n"
        "print(a.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count, file = done.stdout.split()
    assert int(count) > 2
    assert Path(file).is_relative_to(tmp_path / "cache")
    assert run_script(path, "data", "--help").returncode == 0
    assert "Rotated dimensions of each head." in " ".join(run_script(path, "--help").stdout.split())


def test_kernels_run_from_their_lean_source(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script(tmp_path)
    probe = """
import importlib, pkgutil, train_gpt, torch
import kernels
names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
for name in names:
    importlib.import_module("kernels." + name)
from kernels import reference
from kernels.embedding import embed
tokens, starts = torch.tensor([[1, 5, 2], [3, 1, 4]]), torch.tensor([[True, False, False], [False, True, False]])
weight, gate = torch.randn(8, 32), torch.randn(32)
found, wanted = (f(tokens, weight, gate, starts, torch.float32) for f in (embed, reference.embed))
torch.testing.assert_close(found, wanted)
print(len(names), embed.__code__.co_filename)
"""
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(tmp_path),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "TRITON_INTERPRET": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count, file = done.stdout.split()
    assert int(count) == len(list((ROOT / "kernels").glob("*.py"))) - 1
    assert Path(file).is_relative_to(tmp_path / "cache")


def test_what_is_counted_is_the_file(tmp_path: Path) -> None:
    (tmp_path / "gpt").mkdir()
    shutil.copy(ROOT / bundle.STUB, tmp_path / "gpt")
    (tmp_path / "train.py").write_text("print(1)\n")
    empty = bundle.count_code(tmp_path)
    (tmp_path / "gpt" / "noise.py").write_bytes(random.Random(1).randbytes(10_000))
    (tmp_path / "notes.md").write_bytes(bytes(10_000))
    assert 12_500 < bundle.count_code(tmp_path) - empty < 12_900
    built = bundle.build(tmp_path)
    assert bundle.count_code(tmp_path) == len(built)
    assert bundle.source_files(built) == split(bundle.archive(tmp_path))
    assert bundle.build(ROOT).count(b"\n") < 120
    assert 10_000 < bundle.count_code(ROOT) < 200_000


class Bare(ast.NodeTransformer):
    """Takes out strings that are statements, and `pass`."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    def visit_Pass(self, node: ast.Pass) -> None:
        return None


def test_lean_files_say_the_same() -> None:
    files = split(bundle.archive(ROOT))
    for name, data in files.items():
        source = (ROOT / name).read_bytes()
        assert bundle.lean(name, data) == data, name
        if name.endswith(".json"):
            assert json.loads(data) == json.loads(source)
            continue
        compile(data, name, "exec")
        assert ast.dump(Bare().visit(ast.parse(data))) == ast.dump(Bare().visit(ast.parse(source))), name
    assert b"#" not in files["gpt/clock.py"]
    assert b'"""' not in files["gpt/clock.py"]
    # What is shown at run time is still there.
    assert ast.dump(ast.parse(files["gpt/config.py"])) == ast.dump(ast.parse((ROOT / "gpt/config.py").read_bytes()))
    for name in bundle.SHOWN:
        assert ast.get_docstring(ast.parse(files[name])) == ast.get_docstring(ast.parse((ROOT / name).read_bytes()))


def test_lean_of_odd_files() -> None:
    source = b'''"""Docs."""


class A:  # comment
    """Only
    docs."""


class P:
    def f(self) -> str: ...

    async def g(self):
        """Docs."""
        "More."
        return f"""# no comment

            {self}

        """  # comment


X = (
    1,  # one

    "#",
)
'''
    lean = b'''class A:
    pass
class P:
    def f(self) -> str: ...
    async def g(self):
        return f"""# no comment

            {self}

        """
X = (
    1,
    "#",
)
'''
    assert bundle.lean("gpt/a.py", source) == bundle.lean("gpt/a.py", lean) == lean
    assert bundle.lean("train.py", source) == b'"""Docs."""\n' + lean
    assert bundle.lean("a.json", b'{"a": [1, 2.5],\n "b": null}\n') == b'{"a":[1,2.5],"b":null}'
    for name in ("a.py", "a.json"):
        assert bundle.lean(name, b"\xff (") == b"\xff ("


def test_foreign_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle.source_files(b"print(1)\n") is None
    body = (
        b'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("' + bundle.packed(b"print(1)\n" * 99) + b'")))'
    )
    assert bundle.unwrapped(body) == b"print(1)\n" * 99
    assert bundle.source_files(body) is None
    assert bundle.source_files(b'b85decode("' + b"a" * 100 + b'")') is None
    monkeypatch.setattr(bundle, "MAX_SOURCE", 1000)
    assert bundle.unwrapped(b'b85decode("' + bundle.packed(bytes(100_000)) + b'")') == bytes(1000)
