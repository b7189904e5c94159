"""Owns the store: artifacts under their keys, each a folder that appears by one rename, with its trace beside it.

Has never heard of recipes or merging. Correctness comes from unique temporary names, fsync, rename and content, never from locks.

    cache/artifacts/3f/3f9a…/b01c…/model.safetensors    tensor key, then artifact key; never changed
                                  /tensors.json         every tensor's digest
                                  /trace.json           what was described, made and measured
    cache/partial/HOST-PID-…/                           what a running build writes
    cache/findings/KEY.json                             what a survey found
    cache/digests.json                                  a memo, never the truth
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdmerge_build.digest import blake3_hex, is_hex
from sdmerge_build.errors import SdbuildError
from sdmerge_build.files import is_abandoned, owner_tag, place, read_regular, sync_folder, umask
from sdmerge_build.sources.hashing import Request, learn_digests
from sdmerge_build.sources.memo import Memo
from sdmerge_build.sources.stock import Stock
from sdmerge_build.tensorfile import read_header
from sdmerge_build.writer import Written

__all__ = ["Store", "Stored"]

TRACE_VERSION = 1
MODEL, TRACE, TENSORS = "model.safetensors", "trace.json", "tensors.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An artifact in the store."""

    path: Path
    trace: dict[str, Any]

    @property
    def size(self) -> int:
        """Return the file's size in bytes."""
        return int(self.trace["size"])

    @property
    def sha256(self) -> str:
        """Return the file's sha256."""
        return str(self.trace["sha256"])

    @property
    def tensor_digest(self) -> str:
        """Return the digest of its tensors."""
        return str(self.trace["tensor_digest"])


class Store:
    """A folder of artifacts. `rm -rf` of any part of it is a valid way to prune."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.memo = Memo(root / "digests.json")
        self.stock = Stock(root)

    def find(self, tensor_key: str, artifact_key: str) -> Stored | None:
        """Return the artifact of a key, if the store holds it whole."""
        return self._open(self._folder(tensor_key) / artifact_key, artifact_key)

    def find_tensors(self, tensor_key: str) -> Stored | None:
        """Return any artifact that holds the tensors of a key, behind whatever header."""
        folder = self._folder(tensor_key)
        with contextlib.suppress(OSError):
            for child in sorted(folder.iterdir()):
                if stored := self._open(child, child.name):
                    return stored
        return None

    def findings(self, key: str) -> dict[str, Any] | None:
        """Return what the survey of a key found, if the store has it."""
        try:
            known = json.loads(read_regular(self.root / "findings" / f"{key}.json"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(known, dict) or known.get("digest") != _findings_digest(known.get("findings")):
            return None
        return dict(known["findings"])

    def keep_findings(self, key: str, findings: Mapping[str, Any], aside: Path) -> None:
        """Keep what a survey found; `aside` is a folder for the unfinished file."""
        ready = aside / f"{key}.json"
        _write_json(ready, {"digest": _findings_digest(findings), "findings": findings})
        (self.root / "findings").mkdir(exist_ok=True)
        ready.replace(self.root / "findings" / ready.name)

    @contextlib.contextmanager
    def partial(self) -> Iterator[Path]:
        """Provide a folder of its own for a running build, gone afterwards."""
        folder = self.root / "partial" / owner_tag()
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what builds of this machine left behind when they were killed."""
        self.stock.sweep()
        with contextlib.suppress(OSError):
            for folder in (self.root / "partial").iterdir():
                if is_abandoned(folder.name):
                    shutil.rmtree(folder, ignore_errors=True)

    def commit(self, model: Path, written: Written, tensor_key: str, artifact_key: str, facts: dict[str, Any]) -> Stored:
        """Make a finished file an artifact. If another build was first, its artifact is the one that stays."""
        ready = model.with_name(f"{artifact_key}.ready")
        ready.mkdir()
        model.chmod(0o444 & ~umask())
        model.replace(ready / MODEL)
        trace = facts | {
            "trace": TRACE_VERSION,
            "tensor_key": tensor_key,
            "artifact_key": artifact_key,
            "size": written.size,
            "sha256": written.sha256,
            "header_size": written.header_size,
            "header_digest": written.header_digest,
            "tensor_digest": written.tensor_digest,
            "mtime_ns": (ready / MODEL).stat().st_mtime_ns,
        }
        _write_json(ready / TENSORS, written.tensors)
        _write_json(ready / TRACE, trace)
        sync_folder(ready)
        final = self._folder(tensor_key) / artifact_key
        final.parent.mkdir(parents=True, exist_ok=True)
        stored = self._move(ready, final, artifact_key)
        for folder in (final.parent, final.parent.parent):
            sync_folder(folder)
        return stored

    def publish(self, stored: Stored, target: Path) -> str:
        """Make an artifact appear at `target`, and say how; empty when it was there already."""
        if self._is_published(stored, target):
            return ""
        target.parent.mkdir(parents=True, exist_ok=True)
        how = place(stored.path, target)
        if how != "hard link":
            self.memo.note(target, tensors=stored.tensor_digest, sha256=stored.sha256)
        return how

    def discard(self, stored: Stored, aside: Path) -> None:
        """Move a damaged artifact out of the way, into a folder that is removed."""
        with contextlib.suppress(OSError):
            stored.path.parent.rename(aside / f"damaged-{uuid.uuid4().hex}")

    def _is_published(self, stored: Stored, target: Path) -> bool:
        try:
            if target.is_symlink() or not target.is_file():
                return False
            if target.samefile(stored.path):
                return True
        except OSError:
            return False
        known = self.memo.recall(target)
        return known is not None and known.sha256 == stored.sha256

    def _folder(self, tensor_key: str) -> Path:
        return self.root / "artifacts" / tensor_key[:2] / tensor_key

    def _move(self, ready: Path, final: Path, artifact_key: str) -> Stored:
        """Rename a finished folder into place; a damaged one that is in the way is moved aside, a sound one wins."""
        while True:
            try:
                ready.rename(final)
            except OSError:
                if stored := self._open(final, artifact_key):
                    return stored
                final.rename(ready.with_name(f"{artifact_key}.damaged-{uuid.uuid4().hex}"))
            else:
                stored = self._open(final, artifact_key)
                assert stored, "BUG: what was just committed cannot be read"
                return stored

    def _open(self, folder: Path, artifact_key: str) -> Stored | None:
        """Read an artifact's trace, and look at its file and its header; anything odd is a miss, not an error."""
        try:
            trace = json.loads(read_regular(folder / TRACE))
            stored = Stored(path=folder / MODEL, trace=trace)
            model = stored.path.lstat()
            if not (_is_trace(trace) and trace["artifact_key"] == artifact_key and stat.S_ISREG(model.st_mode) and model.st_size == stored.size):
                return None
            with stored.path.open("rb") as file:
                if blake3_hex(file.read(trace["header_size"])) != trace["header_digest"]:
                    return None
            if model.st_mtime_ns != trace["mtime_ns"] and not self._is_unchanged(stored):
                return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SdbuildError):
            return None
        return stored

    def _is_unchanged(self, stored: Stored) -> bool:
        """Tell by content whether a file whose time was touched still is what its trace says."""
        known = self.memo.recall(stored.path)
        if known is None or known.sha256 is None:
            request = Request(path=stored.path, header=read_header(stored.path), sha256=True)
            [(known, snapshot)] = learn_digests([request], 1, lambda _: None)
            self.memo.remember(stored.path, known, snapshot)
            self.memo.save()
        return known.sha256 == stored.sha256 and known.tensors == stored.tensor_digest


def _findings_digest(findings: Any) -> str:
    return blake3_hex(json.dumps(findings, sort_keys=True).encode())


def _is_trace(trace: Any) -> bool:
    """Tell whether a trace has everything that is read of it, in the right types."""
    versions = trace["versions"]
    return (
        trace["trace"] == TRACE_VERSION
        and all(is_hex(trace[field]) for field in ("tensor_key", "artifact_key", "sha256", "header_digest", "tensor_digest"))
        and all(type(trace[field]) is int and 0 <= trace[field] < 2**63 for field in ("size", "header_size", "mtime_ns"))
        and isinstance(versions, dict)
        and all(isinstance(version, str) and version.isprintable() for version in versions.values())
    )


def _write_json(path: Path, value: Any) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(
            value,
            file,
            ensure_ascii=False,
            separators=(",", ":") if isinstance(value, tuple) else None,
            indent=None if isinstance(value, tuple) else 1,
        )
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
