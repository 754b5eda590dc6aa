"""The code of a submission as one file, train_gpt.py: what the limit counts is the size of this very file.

It is gpt/selfextract.py with the programs, gpt and kernels in one LZMA stream, as base85 text: a submission's code is
one Python file, and this is what the field's own submissions carry.
"""

from __future__ import annotations

import base64
import hashlib
import lzma
import re
from pathlib import Path

from gpt.selfextract import split

# Program files that a submission carries.
CODE = ("train.py", "quantize.py", "gpt/**/*.py", "gpt/**/*.json", "kernels/**/*.py", "kernels/**/*.json")
TOOLS = ("gpt/submission.py", "gpt/folder.py", "gpt/review.py")  # hand runs in; 16 kB that no model needs
CARRIED = ".train_gpt.py"  # the file that this program was unpacked from, where it was
STUB, EMPTY = "gpt/selfextract.py", 'b85decode("")'
# No more context than a byte: text has no words of two or four bytes.
FILTERS = ({"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0},)
MAX_SOURCE = 1 << 26  # bytes that a foreign file may unpack to


def archive(root: str | Path) -> bytes:
    """The program files under a root, in the order of their names; selfextract.split takes them apart."""
    files = sorted({path.relative_to(root).as_posix() for pattern in CODE for path in Path(root).glob(pattern)})
    contents = [(name, (Path(root) / name).read_bytes()) for name in files if name not in TOOLS]
    return b"".join(f"{name} {len(data)}\n".encode() + data for name, data in contents)


def code_sha256(root: str | Path) -> str:
    """Names the code, whether it lies in a repository or was unpacked from a submission."""
    return hashlib.sha256(archive(root)).hexdigest()


def build(root: str | Path) -> bytes:
    """train_gpt.py of the program under a root."""
    carried = Path(root) / CARRIED
    if carried.is_file():
        return carried.read_bytes()
    stub = (Path(root) / STUB).read_text()
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
