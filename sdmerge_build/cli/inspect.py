"""Owns `sdbuild inspect`: what a checkpoint is, what it is made of, and what it says of its origin.

Has never heard of recipes or the store.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from sdmerge_build.adapters import Adapter, is_adapter, recognise_adapter
from sdmerge_build.architectures import GENERIC, Architecture, recognise
from sdmerge_build.architectures.components import Components, recognise_components
from sdmerge_build.claims import read_claims
from sdmerge_build.cli.reaching import reach_from, store_from
from sdmerge_build.console import print_json, watcher_for
from sdmerge_build.errors import Issue, RecipeError
from sdmerge_build.events import Watcher
from sdmerge_build.files import readable_size
from sdmerge_build.formula import relabelled
from sdmerge_build.recipe import SourceTable
from sdmerge_build.sources import Search, Wanted, find_sources
from sdmerge_build.sources.foreign import kind_of
from sdmerge_build.sources.hashing import Digests, Request, learn_digests
from sdmerge_build.store import Store
from sdmerge_build.tensorfile import Header, read_header

__all__ = ["inspect_command"]

_SHOWN = 100  # characters of a metadata value
_KINDS = {"pickle": "a pickle", "shards": "shards with an index", "diffusers": "a diffusers folder"}


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, metadata in full.")
def inspect_command(file: Path, as_json: bool) -> None:
    """Show what a checkpoint holds.

    Architecture, dtypes, components, hashes, metadata and lineage of any safetensors file, .ckpt, sharded
    checkpoint or diffusers folder, and at the end a [source] table to paste into a recipe. What is no
    safetensors file is converted once, into the store: `cache`, or SDBUILD_STORE.
    """
    if not file.exists():
        raise RecipeError(Issue(where=str(file), what="there is no such file"))
    watcher = watcher_for(is_quiet=as_json)
    kind = kind_of(file)
    try:
        header, digests, size = _read(file, watcher) if kind == "safetensors" else _converted(file, watcher)
    finally:
        watcher.finished()
    facts = _facts(header) | {
        "size": size,
        "kind": kind,
        "sha256": digests.sha256,
        "model_hash": (digests.sha256 or "")[:10],
        "blake3": digests.blake3,
        "tensor_digest": digests.tensors,
        "metadata": header.metadata,
        "lineage": _lineage(header.metadata),
        "claims": asdict(read_claims(header.metadata)),
    }
    if as_json:
        print_json({"file": str(file)} | facts)
    else:
        _print(file, facts)


def _read(file: Path, watcher: Watcher) -> tuple[Header, Digests, int]:
    """Read a safetensors file whole."""
    header = read_header(file)
    watcher.started("hashing", header.file_size)
    [(digests, _)] = learn_digests([Request(path=file, header=header, sha256=True, blake3=True)], os.cpu_count() or 1, watcher.advanced)
    return header, digests, header.file_size


def _converted(file: Path, watcher: Watcher) -> tuple[Header, Digests, int]:
    """Read a pickle or a folder as a build would: converted once, into the store. Its own digests are those of the file as it is."""
    store = Store(store_from(None))
    wanted = Wanted(name=file.name, table=SourceTable(path=str(file.resolve())), folder=Path(), where=str(file))
    reach = reach_from(models=(), jobs=None, searches=False)
    search = Search(folders=(), stock=store.stock, memo=store.memo, jobs=reach.jobs, watcher=watcher, on_read=lambda: None)
    found, errors = find_sources([wanted], search)
    if errors:
        raise errors[file.name]
    source = found[file.name]
    return source.header, source.digests, source.size


def _facts(header: Header) -> dict[str, Any]:
    """Summarise a header by component."""
    architecture = recognise(header.tensors)
    if architecture.name == GENERIC and is_adapter(header.tensors) and (found := recognise_adapter(header.tensors)):
        return _facts_of_adapter(header, *found)
    alone = recognise_components(header.tensors.keys()) if architecture.name == GENERIC else []
    component_of = _components_of(*alone[0]) if alone else {}
    return {
        "architecture": architecture.name,
        "title": _title(alone) if alone else architecture.title,
        "components_of": [family.name for family, _ in alone],
    } | _counts(header, lambda name: component_of.get(name) or architecture.component_of(name))


def _facts_of_adapter(header: Header, architecture: Architecture, adapter: Adapter) -> dict[str, Any]:
    """Summarise an adapter by the components that it changes."""
    changes = [change for said in adapter.changes.values() for change in said]
    component_of = {name: architecture.component_of(change.target) for change in changes for name in change.factors.values()}
    kinds = sorted({change.kind for change in changes})
    ranks = sorted({header.tensors[change.factors["down"]].shape[0] for change in changes if "down" in change.factors})
    rank = f", rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}" if ranks else ""
    unknown = f", {len(adapter.strays)} of its tensors not understood" if adapter.strays else ""
    title = f"adapter ({', '.join(kinds)}{rank}) for {architecture.title}, changes {len(adapter.changes)} tensors{unknown}"
    return {"architecture": architecture.name, "title": title, "components_of": [], "adapter": {"kinds": kinds, "ranks": ranks}} | _counts(
        header, lambda name: component_of.get(name, "other")
    )


def _counts(header: Header, component_of: Callable[[str], str]) -> dict[str, Any]:
    """Count a file's tensors, together and by component."""
    components: dict[str, dict[str, Any]] = defaultdict(lambda: {"tensors": 0, "parameters": 0, "bytes": 0, "dtypes": Counter()})
    for spec in header.tensors.values():
        component = components[component_of(spec.name)]
        component["tensors"] += 1
        component["parameters"] += spec.numel
        component["bytes"] += spec.nbytes
        component["dtypes"][spec.dtype] += 1
    return {
        "tensors": len(header.tensors),
        "parameters": sum(spec.numel for spec in header.tensors.values()),
        "dtypes": dict(sorted(Counter(spec.dtype for spec in header.tensors.values()).items())),
        "components": {name: components[name] for name in sorted(components)},
    }


def _components_of(architecture: Architecture, alone: Components) -> dict[str, str]:
    """Name the component of every tensor of a file that is none of a whole checkpoint."""
    return {name: architecture.component_of(tensor) for tensor, made in alone.tensors.items() for name in made.names}


def _title(alone: Sequence[tuple[Architecture, Components]]) -> str:
    """Say what a file of some components is; the VAEs of several architectures have the same names."""
    architecture, found = alone[0]
    kind = " and ".join(sorted(set(_components_of(architecture, found).values())))
    return f"{kind} by itself, in {found.naming} naming, as in {' and '.join(family.title for family, _ in alone)}"


def _lineage(metadata: Mapping[str, str]) -> Any:
    """Read the ancestry that sdbuild wrote, if it did and it can still be read."""
    try:
        lineage = json.loads(metadata.get("sdbuild.lineage", "null"))
    except (ValueError, RecursionError):
        return None
    return lineage if isinstance(lineage, dict) else None


def _print(file: Path, facts: Mapping[str, Any]) -> None:
    click.echo(f"{file}: {facts['title']}, {readable_size(facts['size'])} ({facts['size']} bytes)")
    click.echo(f"  {facts['tensors']} tensors, {facts['parameters'] / 1e6:.1f} M parameters, {_counted(facts['dtypes'])}")
    for name, part in facts["components"].items():
        click.echo(f"  {name:10} {part['tensors']:5} tensors {part['parameters'] / 1e6:9.1f} M  {_counted(part['dtypes'])}")
    if facts["kind"] != "safetensors":
        click.echo(f"  kept as {_KINDS[facts['kind']]}; the tensor digest is that of the safetensors file made of it")
    for name in ("sha256", "model_hash", "blake3", "tensor_digest"):
        if not facts[name]:
            continue  # a folder is no file
        click.echo(f"  {name.replace('_', ' '):13} {facts[name]}")
    if facts["metadata"]:
        click.echo("metadata")
    for key, value in sorted(facts["metadata"].items()):
        click.echo(f"  {_printable(key)} = {_printable(value)}")
    for entry in _entries(facts["lineage"], "sources"):
        said = (entry.get("name"), entry.get("license", "licence not said"), f"sha256 {entry.get('sha256', 'not pinned')}")
        click.echo("  ".join(["source", *(_printable(str(item)) for item in said)]))
    for entry in _entries(facts["lineage"], "steps"):
        click.echo(f"step    {_printable(str(entry.get('name')))}  {_described(entry)}")
    _print_claims(facts)
    known_by = (
        f'filename = "{_printable(file.name)}"\nsize = {facts["size"]}\nsha256 = "{facts["sha256"]}"'
        if facts["sha256"]
        else f'path = "{_printable(str(file))}"'
    )
    click.echo(f"as a source of a recipe:\n\n[source.NAME]\n{known_by}{f'{chr(10)}adapter = true' if 'adapter' in facts else ''}")


def _print_claims(facts: Mapping[str, Any]) -> None:
    claims = facts["claims"]
    told = [claims["made_by"] and f"made by {claims['made_by']}", claims["recipe"], claims["license"] and f"licence {claims['license']}"]
    if claims["ancestors"] or any(told):
        click.echo(f"claimed, the word of whoever made the file{': ' if any(told) else ''}{_printable('; '.join(filter(None, told)))}")
    for entry in claims["ancestors"]:
        known = [entry["sha256"] and f"sha256 {entry['sha256']}", entry["short_hash"], entry["license"], entry["recipe"]]
        click.echo("  ".join(["claimed", *map(_printable, filter(None, (entry["name"], *known)))]))
    for note in claims["notes"]:
        click.echo(f"note    {_printable(note)}")


def _described(entry: Mapping[str, Any]) -> str:
    """Say what a step of a lineage did, with the names of its inputs in its formula."""
    facts, inputs = entry.get("facts"), entry.get("inputs")
    if not isinstance(facts, dict) or not isinstance(inputs, dict):
        return "(not readable)"
    params = ", ".join(f"{key.removeprefix('param.')} = {value}" for key, value in facts.items() if key.startswith("param."))
    params = relabelled(params[: 2 * _SHOWN], {role: name for role, name in inputs.items() if isinstance(name, str)})
    return _printable(f"{facts.get('method')}  {params}")


def _entries(lineage: Any, kind: str) -> list[dict[str, Any]]:
    entries = lineage.get(kind) if isinstance(lineage, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _counted(dtypes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {dtype}" for dtype, count in sorted(dtypes.items()))


def _printable(text: str) -> str:
    """Shorten a stranger's text, and take the control characters out of it."""
    clean = "".join(c if c.isprintable() else "·" for c in text[:_SHOWN])
    return clean + (f"… ({len(text)} characters)" if len(text) > _SHOWN else "")
