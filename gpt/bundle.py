"""The code of a submission as one file, train_gpt.py: what the limit counts is the size of this very file.

It is gpt/selfextract.py with the programs, gpt and kernels in one LZMA stream, as base85 text: a submission's code is
one Python file, and this is what the field's own submissions carry. Files are carried without what is for readers alone
(`lean`), a quarter of their size compressed.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import lzma
import re
import tokenize
from functools import lru_cache
from pathlib import Path

from gpt.selfextract import split

# Program files that a submission carries.
CODE = ("train.py", "quantize.py", "gpt/**/*.py", "gpt/**/*.json", "kernels/**/*.py", "kernels/**/*.json")
TOOLS = ("gpt/submission.py", "gpt/folder.py", "gpt/review.py")  # hand runs in; 16 kB that no model needs
SHOWN = ("train.py", "quantize.py", "gpt/selfextract.py")  # their modules' docstrings stay: --help, and who opens one
HELP = "gpt/config.py"  # its docstrings are the settings' help
CARRIED = ".train_gpt.py"  # the file that this program was unpacked from, where it was
STUB, EMPTY = "gpt/selfextract.py", 'b85decode("")'
# No more context than a byte: text has no words of two or four bytes.
FILTERS = ({"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0},)
MAX_SOURCE = 1 << 26  # bytes that a foreign file may unpack to


def archive(root: str | Path) -> bytes:
    """The program files under a root, in the order of their names; selfextract.split takes them apart."""
    files = sorted({path.relative_to(root).as_posix() for pattern in CODE for path in Path(root).glob(pattern)})
    contents = [(name, lean(name, (Path(root) / name).read_bytes())) for name in files if name not in TOOLS]
    return b"".join(f"{name} {len(data)}\n".encode() + data for name, data in contents)


@lru_cache(maxsize=512)  # twenty milliseconds a file, and both the code's name and its size need all
def lean(name: str, data: bytes) -> bytes:
    """A file as it is carried: Python without comments, docstrings and blank lines, JSON without spaces.

    lean(name, lean(name, data)) == lean(name, data): unpacked, the code has the same name as in the repository. Lines
    are left out by their place, not written anew by ast.unparse: what that writes depends on the version of Python, and
    3.12's does not run on 3.11. A file that cannot be read (nothing that ran) is carried as it is.
    """
    try:
        if name.endswith(".json"):
            return json.dumps(json.loads(data), separators=(",", ":")).encode()
        text = data.decode()
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return data
    lines = text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    inside: set[int] = set()  # rows that begin within a string: a blank one is text
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant):
            inside.update(range(node.lineno, node.end_lineno or node.lineno))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if name == HELP or (name in SHOWN and node is tree):
            continue
        docs = [line for line in node.body if _is_string(line)]
        for doc in docs:
            rows = range(doc.lineno - 1, doc.end_lineno or doc.lineno)
            inside.difference_update(rows)
            lines[rows.start : rows.stop] = [""] * len(rows)
        if docs and len(docs) == len(node.body) and node is not tree:
            lines[docs[0].lineno - 1] = " " * docs[0].col_offset + "pass"
    return "".join(f"{line}\n" for row, line in enumerate(lines) if line.strip() or row in inside).encode()


def _is_string(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def code_sha256(root: str | Path) -> str:
    """Names the code, whether it lies in a repository or was unpacked from a submission."""
    return hashlib.sha256(archive(root)).hexdigest()


def build(root: str | Path) -> bytes:
    """train_gpt.py of the program under a root."""
    carried = Path(root) / CARRIED
    if carried.is_file():
        return carried.read_bytes()
    stub = lean(STUB, (Path(root) / STUB).read_bytes()).decode()
    return stub.replace(EMPTY, f'b85decode("{packed(archive(root)).decode()}")').encode()


def packed(data: bytes) -> bytes:
    """As Python source can carry it: LZMA in base85."""
    return base64.b85encode(lzma.compress(data, check=lzma.CHECK_CRC32, filters=FILTERS))


def count_code(root: str | Path) -> int:
    """Bytes that the program adds to a submission."""
    return len(build(root))


def unwrapped(script: bytes) -> bytes | None:
    """What a self-extracting script of the field, ours or another, has in its base85 literal; None where it has none.

    Nothing of the script is run.
    """
    found = re.search(rb"b85decode\(\s*[\"']([^\"'\\]{64,})[\"']", script)
    if not found:
        return None
    try:
        data = lzma.LZMADecompressor().decompress(base64.b85decode(found[1]), MAX_SOURCE)
    except (ValueError, lzma.LZMAError):
        return None
    return data


def source_files(script: bytes) -> dict[str, bytes] | None:
    """The files in a train_gpt.py that `build` made; None for any other script."""
    data = unwrapped(script)
    try:
        return split(data) if data and data[:1].isalpha() else None
    except ValueError:
        return None
