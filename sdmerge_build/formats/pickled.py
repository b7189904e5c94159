"""Owns the conversion of a pickled checkpoint (`.ckpt`, `.pt`, `.pth`, `.bin`) as its user sees it: one call that makes a file or says why not.

Has never heard of torch, nor of what a pickle means: another process reads it (`unpickle`), without this one's secrets and for a limited time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from sdmerge_build.errors import IntegrityError, Issue
from sdmerge_build.files import Snapshot, as_space_error
from sdmerge_build.tensorfile import read_header

__all__ = ["convert_pickle", "looks_pickled"]

STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # a zip file, or a pickle of a protocol since 2003
PATIENCE, SPEED = 120, 20e6  # seconds, and bytes per second: a hundredth of what a laptop does
MAX_ANSWER = 64 << 10
KEPT = (  # names of variables; a token is in none of them
    "DYLD_LIBRARY_PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "PATH",
    "SYSTEMROOT",
    "TEMP",
    "TMP",
    "TMPDIR",
    "USERPROFILE",
)


def looks_pickled(start: bytes) -> bool:
    """Tell from a file's first 16 bytes whether it may be a pickle. A safetensors file whose header's length begins alike is not.

    >>> looks_pickled(b"PK" + bytes([3, 4])), looks_pickled((640).to_bytes(8, "little") + b'{"a')
    (True, False)
    """
    is_safetensors = start[4:9] == b"\0\0\0\0{"
    return start.startswith(STARTS) and not is_safetensors


def convert_pickle(path: Path, target: Path, *, seconds: float | None = None) -> list[str]:
    """Convert a pickled checkpoint into a safetensors file at `target`, which must not exist, and return the names of what was left out.

    The same tensors make the same bytes. Nothing in the pickle is run: what is neither a tensor nor known to be harmless makes it refused.
    Raises `IntegrityError` when the file is refused, when it changes meanwhile, or when reading it takes more than `seconds` or too much memory;
    `SpaceError`; and `OSError` when the files cannot be opened. The target is gone then.
    """
    before = _checked(path)
    patience = PATIENCE + before.size / SPEED if seconds is None else seconds
    with target.open("xb"):
        pass
    try:
        answer = _ask(path, target, patience)
        if "ok" not in answer:
            with as_space_error(target.parent, before.size):
                _complain(path, answer)
        if Snapshot.of(path) != before:
            raise _refusal(path, "it changed while it was converted", hint="run the build again")
        read_header(target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return [str(name) for name in answer.get("left_out", ())]


def _refusal(path: Path, what: str, hint: str = "") -> IntegrityError:
    return IntegrityError(Issue(where=str(path), what=what, hint=hint))


def _checked(path: Path) -> Snapshot:
    """Take a snapshot of what may be a pickle; anything else is refused here."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
        raise _refusal(path, "is not a regular file")
    if path.name.endswith(".safetensors"):  # torch would believe the name
        raise _refusal(path, "is named .safetensors, but is not one", hint="rename it to .ckpt if that is what it is")
    with path.open("rb") as file:
        if not looks_pickled(file.read(16)):
            raise _refusal(path, "is not a pickled checkpoint", hint="is the download complete?")
    return Snapshot.of(path)


def _ask(path: Path, target: Path, patience: float) -> Mapping[str, Any]:
    """Have another process convert, and return its answer; it is ended when it takes too long, and when this process is interrupted."""
    flags = ["-E", "-P", "-B", "-W", "ignore"]  # not -I: that would hide an sdbuild installed with `pip install --user`
    module = ["-m", "sdmerge_build.formats.unpickle"]
    command = [sys.executable, *flags, *module, os.path.abspath(path), os.path.abspath(target), str(int(patience) + 1)]  # noqa: PTH100  as typed
    surroundings = {name: os.environ[name] for name in KEPT if name in os.environ} | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile(dir=target.parent) as said:  # not a pipe: a stranger could fill it, or memory
        process = subprocess.Popen(command, env=surroundings, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.DEVNULL)  # noqa: S603
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            raise _refusal(path, f"reading it takes more than {patience:.0f} s", hint="it is damaged, or meant to do harm") from None
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        text = said.read(MAX_ANSWER)
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(text)
        if isinstance(answer, dict) and process.returncode == 0:
            return answer
    raise _refusal(path, f"reading it ended the process that read it: {_cause(process.returncode)}", hint="it is damaged, or meant to do harm")


def _cause(code: int) -> str:
    """Say why a process ended, from its exit code."""
    if code == -getattr(signal, "SIGXCPU", 0):
        return "it took too long"
    try:
        return f"exit code {code}" if code >= 0 else f"{signal.Signals(-code).name}, perhaps for want of memory"
    except ValueError:
        return f"signal {-code}"


def _complain(path: Path, answer: Mapping[str, Any]) -> NoReturn:
    """Raise what the other process complains of."""
    if number := answer.get("errno"):
        raise OSError(int(number), str(answer.get("error")), str(path))
    raise _refusal(path, str(answer.get("error")), hint=str(answer.get("hint", "")))
