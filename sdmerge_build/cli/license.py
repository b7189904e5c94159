"""Owns `sdbuild license`: what the texts say about a recipe's artifacts or about a file, as a tree of whose terms they come under.

Has never heard of how terms are composed; it prints conclusions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from sdmerge_build.ancestry import ancestors_of_file, concluded
from sdmerge_build.cli.reaching import reach_from, store_from
from sdmerge_build.console import print_json, watcher_for
from sdmerge_build.errors import Issue, LicenceError, RecipeError, printable
from sdmerge_build.licences import NAMES, conclude, in_words
from sdmerge_build.lock import lock_path, read_lock
from sdmerge_build.manifest import terms_in
from sdmerge_build.plan import plan_file
from sdmerge_build.store import Store
from sdmerge_build.supply import Supply
from sdmerge_build.tensorfile import read_header

__all__ = ["license_command"]

Terms = Mapping[str, Any]
MOST_DEEP = 60  # columns of indentation


@click.command("license")
@click.argument("target", metavar="RECIPE|FILE", type=click.Path(path_type=Path))
@click.option("--only", multiple=True, metavar="STEP", help="Speak of this artifact alone; may be given several times.")
@click.option("--models", multiple=True, type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="A folder that holds models you own; may be given several times, or SDBUILD_MODELS.")  # fmt: skip
@click.option("--store", type=click.Path(path_type=Path, file_okay=False), help="Where finished work is kept, or SDBUILD_STORE.  [default: cache]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of lines.")
def license_command(target: Path, only: tuple[str, ...], models: tuple[Path, ...], store: Path | None, as_json: bool) -> int:
    """Show what the texts say about a result.

    A tree of what it is made of with each one's terms, what follows for the result and why, what
    contradicts, and what must be passed on. Nobody is asked; run `sdbuild lock` first to know
    what hubs say. Exits with code 3 when the terms forbid to share it.
    """
    if not target.exists():
        raise RecipeError(Issue(where=str(target), what="there is no such file"))
    if target.is_dir() or target.name.endswith(".manifest.toml"):
        raise RecipeError(
            Issue(where=str(target), what="this is neither a recipe nor a checkpoint", hint="name the .safetensors file in it or beside it")
        )
    said = _of_recipe(target, only, models, store, as_json=as_json) if target.suffix == ".toml" else {target.name: _of_file(target)}
    if as_json:
        print_json({"target": str(target), "artifacts": [{"name": name, "terms": terms} for name, terms in said.items()]})
    else:
        click.echo("\n\n".join("\n".join(_shown(names, terms)) for names, terms in _grouped(said)))
    return LicenceError.exit_code if any(terms["share"] != "on-terms" for terms in said.values()) else 0


def _of_recipe(recipe: Path, only: tuple[str, ...], models: tuple[Path, ...], store: Path | None, *, as_json: bool) -> dict[str, Terms]:
    plan = plan_file(recipe, only=only)
    watcher = watcher_for(is_quiet=as_json)
    reach = reach_from(models=models, jobs=None, offline=True)
    supply = Supply(plan, Store(store_from(store)), read_lock(lock_path(recipe)), reach, watcher, lambda: None)
    try:
        supply.look()
    finally:
        watcher.finished()
    return {name: concluded(plan, plan.steps[name], supply.facts).table() for name in plan.wanted}


def _of_file(file: Path) -> Terms:
    """Take what the manifest beside a file says, if it is this file's; otherwise what its header claims."""
    metadata = read_header(file).metadata
    return terms_in(file, metadata.get("sdbuild.key", "")) or conclude(ancestors_of_file(file.name, metadata)).table()


def _grouped(said: Mapping[str, Terms]) -> Iterator[tuple[list[str], Terms]]:
    """Put artifacts together of which the texts say the same."""
    groups: dict[str, list[str]] = {}
    for name, terms in said.items():
        groups.setdefault(json.dumps(terms, sort_keys=True), []).append(name)
    yield from ((names, said[names[0]]) for names in groups.values())


def _shown(names: Sequence[str], terms: Terms) -> Iterator[str]:
    yield _line(", ".join(names))
    yield from _tree(terms.get("ancestor", []))
    yield ""
    yield _line(f"terms: {terms['summary']}")
    concluded = terms.get("concluded", {})
    for component, value in concluded.items():
        yield _line(f"  {NAMES.get(component, component.replace('_', ' '))}: {in_words(value)}")
        for (licence, clause), whose in _together(terms.get("reason", []), component).items():
            yield _line(f"    {', '.join(whose)}: {licence}, {clause}")
    for conflict in terms.get("conflict", []):
        yield _line(f"{conflict['level']} {conflict['id']}: {conflict['what']}")
        yield from (_line(f"    {text}") for text in conflict.get("rests_on", []))
        if conflict.get("hint"):
            yield _line(f"    hint: {conflict['hint']}")
    if duties := terms.get("duty", []):
        yield "whoever shares it must"
    owed: dict[str, dict[str, None]] = {}
    for duty in duties:
        owed.setdefault(duty["what"], {}).update(dict.fromkeys(map(str, duty.get("ancestors", []))))
    yield from (_line(f"  {what}  ({', '.join(whose)})") for what, whose in owed.items())
    texts = dict.fromkeys((entry["license"], str(entry["url"])) for entry in terms.get("reason", []) if entry.get("url"))
    if texts:
        yield "the texts"
    yield from (_line(f"  {title}  {url}") for title, url in texts)
    yield _line(terms["advice"])


def _together(reasons: Sequence[Mapping[str, Any]], component: str) -> dict[tuple[str, str], list[str]]:
    """Put the ancestors together of which one text says the same."""
    found: dict[tuple[str, str], list[str]] = {}
    for reason in reasons:
        if reason["component"] == component:
            found.setdefault((reason["license"], reason["clause"]), []).append(reason["ancestor"])
    return found


def _tree(ancestors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Draw the ancestors, those that somebody's header names below whom it belongs to."""
    below: dict[str, list[Mapping[str, Any]]] = {}
    for ancestor in ancestors:
        below.setdefault(ancestor.get("claimed_by", ""), []).append(ancestor)

    def draw(name: str, indent: str) -> Iterator[str]:
        children = below.pop(name, [])  # each once: a manifest that somebody edited may go in circles
        for n, ancestor in enumerate(children, 1):
            is_last = n == len(children)
            yield _line(f"{indent}{'└─' if is_last else '├─'} {_ancestor(ancestor)}")
            stem = indent + ("   " if is_last else "│  ")
            yield from (_line(f"{stem}· {text}") for text in ancestor.get("notes", []))
            if len(stem) <= MOST_DEEP:
                yield from draw(ancestor["name"], stem)

    yield from draw("", "")


def _ancestor(ancestor: Mapping[str, Any]) -> str:
    layers = "; ".join(f"{layer['title']} ({layer['source']})" for layer in ancestor.get("layer", []))
    note = "" if ancestor.get("contributes", True) else ", contributes nothing"
    return f"{ancestor['name']}: {layers or 'no terms'} [{ancestor['status']}{note}]"


def _line(text: str) -> str:
    return printable(text)
