"""The one-file program: train.py, quantize.py, gpt and kernels, compressed. Source: python train_gpt.py source

python train_gpt.py ...              what train.py does: train, quantise, write the artifact, read it back, score it
python train_gpt.py quantize ...     what quantize.py does: score, sample, ... an artifact
python train_gpt.py data ...         what python -m gpt.data does: get, make and check shards
python train_gpt.py source           print the folder in which the source files lie
"""

# Files and not strings: Triton reads the source of its kernels, and a traceback shows lines.

from __future__ import annotations

import atexit
import base64
import hashlib
import lzma
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

ARCHIVE = base64.b85decode("")
PROGRAMS = {"quantize": "quantize", "data": "gpt.data"}


def split(archive: bytes) -> dict[str, bytes]:
    """Files of an archive: for each a line "NAME SIZE" and its bytes."""
    files, at = {}, 0
    while at < len(archive):
        end = archive.index(b"\n", at)
        name, _, size = archive[at:end].decode().rpartition(" ")
        at = end + 1 + int(size)
        files[name] = archive[end + 1 : at]
    return files


def unpack() -> Path:
    """A folder with the archive's files, named by the hash of this one.

    Any number of processes may do this at once: each file takes its name once it is whole, and its content is fixed.
    """
    this = Path(__file__).read_bytes()
    files = {**split(lzma.decompress(ARCHIVE)), ".train_gpt.py": this}
    name = f"train_gpt-{hashlib.sha256(this).hexdigest()[:32]}"
    try:
        return write(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name, files)
    except (OSError, RuntimeError):  # no home, or not ours to write
        folder = tempfile.mkdtemp(prefix=name)
        if sys.argv[1:] != ["source"]:
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return write(Path(folder), files)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
                part.write(data)
            Path(part.name).replace(path)
    return folder


def main() -> None:
    """Run what the first argument names, with the arguments after it."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name == "source":
        print(SOURCE)
        return
    if name in PROGRAMS:
        del sys.argv[1]
    runpy.run_module(PROGRAMS.get(name, "train"), run_name="__main__")


if ARCHIVE:  # also where a worker process imports this file anew
    SOURCE = unpack()
    sys.path.insert(0, str(SOURCE))
    if __name__ == "__main__":
        main()
