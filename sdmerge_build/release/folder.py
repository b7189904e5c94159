"""Owns release folders: all documents of a release and its artifact, put together beside the folder and made to appear by one rename.

Has never heard of licences or formats. A folder that holds anything sdbuild did not write is left alone.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path, PurePosixPath

from sdmerge_build.errors import IntegrityError, Issue, SdbuildError, named_briefly
from sdmerge_build.files import as_space_error, is_abandoned, owner_tag, place, read_regular, replacing, sync_folder
from sdmerge_build.release.card import card
from sdmerge_build.release.cyclonedx import bill_of_materials
from sdmerge_build.release.intoto import provenance
from sdmerge_build.release.notice import licence_texts, notice
from sdmerge_build.release.reading import Manifest, stem_of
from sdmerge_build.release.signing import SIGNATURE
from sdmerge_build.release.writing import sound

__all__ = ["documents", "refuse_foreign", "write_release"]

MANIFEST = ".manifest.toml"
_OTHERS = (".safetensors", ".intoto.jsonl", ".cdx.json")
LICENCES = "LICENSES"


def documents(manifest: Manifest, base: Path = Path()) -> dict[str, str | Path]:
    """Compute a release's documents: their place in the folder, and their text, or the file that is to be copied.

    `base` is the folder that the `license_file` of a layer is seen from. The same manifest gives the same documents.
    """
    manifest = sound(manifest)
    stem = stem_of(manifest)
    licences = {f"{LICENCES}/{text.name}": text.path or text.text() for text in licence_texts(manifest, base)}
    return {
        "NOTICE": notice(manifest),
        "README.md": card(manifest),
        f"{stem}.cdx.json": bill_of_materials(manifest),
        f"{stem}.intoto.jsonl": provenance(manifest),
        **licences,
    }


def write_release(
    folder: Path,
    artifact: Path,
    manifest_path: Path,
    manifest: Manifest,
    base: Path | None = None,
    finish: Callable[[Path], object] = lambda _: None,
) -> list[Path]:
    """Write the whole folder, or nothing, and return its files; an older release at the same place is replaced.

    `base` is the folder that licence files are seen from; the manifest's own, where it is not said. `finish` is given the folder, under its
    own name but elsewhere, before anybody sees it: what it raises leaves the older release as it is.
    Raises `SdbuildError` where the folder holds what sdbuild did not write, `IntegrityError` where a file is not what the manifest says.
    """
    artifact, size = artifact.resolve(), manifest["artifact"]["size"]
    if artifact.stat().st_size != size:
        what = f"has {artifact.stat().st_size} bytes, and its manifest speaks of {size}"
        raise IntegrityError(Issue(where=str(artifact), what=what, hint="build it again"))
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    tag = owner_tag()
    aside, old = (folder.with_name(f".{folder.name[:64]}.{tag}.{what}") for what in ("part", "old"))
    part = aside / folder.name
    try:
        with as_space_error(folder.parent, size):
            part.mkdir(parents=True)
            names = _fill(part, artifact, manifest_path, manifest, manifest_path.parent if base is None else base)
        finish(part)
        _swap(part, folder, old)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(folder.parent)
    return [folder / name for name in names]


def _fill(part: Path, artifact: Path, manifest_path: Path, manifest: Manifest, base: Path) -> list[str]:
    """Write every file of a release into an empty folder, and name them."""
    stem = stem_of(manifest)
    digests = {f"{LICENCES}/{text.name}": text.sha256 for text in licence_texts(sound(manifest), base) if text.path}
    contents = {f"{stem}{MANIFEST}": read_regular(manifest_path)}
    for name, document in documents(manifest, base).items():
        contents[name] = _licence(document, digests[name]) if isinstance(document, Path) else document.encode()
    for name, content in contents.items():
        target = part / PurePosixPath(name)
        target.parent.mkdir(exist_ok=True)
        with replacing(target) as file:
            file.write(content)
    place(artifact, part / f"{stem}.safetensors")
    for made in {part, *((part / PurePosixPath(name)).parent for name in contents)}:
        sync_folder(made)
    return sorted([*contents, f"{stem}.safetensors"])


def _licence(path: Path, digest: str) -> bytes:
    """Read a licence's text, which must be the one the manifest speaks of."""
    try:
        content = read_regular(path, limit=4 << 20)
    except OSError as error:
        raise SdbuildError(
            Issue(where=str(path), what=f"this licence's text cannot be read: {error.strerror}", hint="correct `license_file`")
        ) from error
    found = sha256(content).hexdigest()
    if found != digest:
        what = f"this licence's text has changed: its sha256 is {found}, and the manifest says {digest}"
        raise IntegrityError(Issue(where=str(path), what=what, hint="build again, so that the manifest speaks of this text"))
    return content


def _swap(part: Path, folder: Path, old: Path) -> None:
    """Make the new folder appear where the old one was; the old one comes back if that fails."""
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    try:
        part.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise


def _sweep(folder: Path) -> None:
    """Remove what processes that are gone left half-made beside the folder."""
    start = f".{folder.name[:64]}."
    for path in folder.parent.glob(f"{start.replace('[', '[[]')}*"):
        tag, _, what = path.name.removeprefix(start).rpartition(".")
        if what in {"part", "old"} and is_abandoned(tag):
            shutil.rmtree(path, ignore_errors=True)


def refuse_foreign(folder: Path) -> None:
    """Raise `SdbuildError` unless a release can be put here: nothing is here, an empty folder, or a release and nothing else."""
    if not folder.is_symlink() and not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise SdbuildError(Issue(where=str(folder), what="this is not a folder, and a release is one", hint="move it away"))
    strangers = sorted(_strangers(folder))
    if strangers:
        what = f"holds what sdbuild did not write: {named_briefly(strangers)}; replacing the release would remove it"
        raise SdbuildError(Issue(where=str(folder), what=what, hint="move it elsewhere, or copy the release before adding to it"))


def _strangers(folder: Path) -> Iterator[str]:
    """Name what is in a folder and in no release."""
    stems = [path.name.removesuffix(MANIFEST) for path in folder.glob(f"*{MANIFEST}")]
    ours = {"NOTICE", "README.md", SIGNATURE} | {f"{stem}{ending}" for stem in stems[:1] for ending in (MANIFEST, *_OTHERS)} if stems else set()
    for path in folder.iterdir():
        if path.name == LICENCES and stems and path.is_dir() and not path.is_symlink():
            yield from (f"{LICENCES}/{p.name}" for p in path.iterdir() if p.suffix != ".txt" or not p.is_file() or p.is_symlink())
        elif path.name not in ours or path.is_symlink() or not path.is_file():
            yield path.name
