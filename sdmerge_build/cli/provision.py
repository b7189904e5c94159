"""Owns `sdbuild fetch` and `sdbuild lock`: sources without a build.

Has never heard of steps or artifacts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from sdmerge_build.cli.reaching import reach_from, store_from
from sdmerge_build.console import print_json, watcher_for
from sdmerge_build.errors import printable
from sdmerge_build.events import Watcher
from sdmerge_build.files import readable_size
from sdmerge_build.provision import Locked, fetch_sources, lock_sources

__all__ = ["fetch_command", "lock_command"]


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command what both have."""
    options = [
        click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True, type=click.Path(path_type=Path)),
        click.option("--store", type=click.Path(path_type=Path, file_okay=False), help="Where files are kept, or SDBUILD_STORE.  [default: cache]"),
        click.option(
            "--models",
            multiple=True,
            type=click.Path(path_type=Path, file_okay=False),
            metavar="DIR",
            help="A folder that holds models you own; may be given several times, or SDBUILD_MODELS.",
        ),
        click.option("--jobs", type=click.IntRange(1, 256), help="How many threads hash.  [default: one per core]"),
        click.option("--offline", is_flag=True, help="Ask nobody: use what is on this machine."),
        click.option("--allow-private", is_flag=True, help="Download from private addresses too, such as a server of your own."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of lines."),
        click.option("--quiet", is_flag=True, help="Print nothing but errors."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command("fetch")
@_common
@click.option("--locked", is_flag=True, help="Fail if anything is not as the recipe's lock says.")
def fetch_command(recipes: tuple[Path, ...], store: Path | None, as_json: bool, quiet: bool, **said: Any) -> None:
    """Download what recipes are made of, and verify it.

    What lies in your folders of models or in the store is not downloaded again. Nothing is built.
    """
    reach, root = reach_from(**said), store_from(store)
    documents = []
    for recipe in recipes:
        with _watching(is_quiet=quiet or as_json) as watcher:
            sources = fetch_sources(recipe, root, reach, watcher)
        width = max(map(len, sources), default=0)
        for name, (found, is_new) in sources.items():
            path = found.original or found.path
            if not as_json and not quiet:
                click.echo(f"{name:{width}}  {'downloaded' if is_new else 'found':10}  {readable_size(found.size):>8}  {printable(str(path))}")
        documents.append(
            {
                "recipe": str(recipe),
                "sources": [
                    {"name": name, "downloaded": is_new, "path": str(found.original or found.path), "size": found.size}
                    | {"sha256": found.digests.sha256, "blake3": found.digests.blake3, "tensor_digest": found.digests.tensors}
                    for name, (found, is_new) in sources.items()
                ],
            }
        )
    if as_json:
        print_json({"recipes": documents})


@click.command("lock")
@_common
def lock_command(recipes: tuple[Path, ...], store: Path | None, as_json: bool, quiet: bool, **said: Any) -> None:
    """Write down what the sources of recipes are today.

    RECIPE.lock, beside the recipe, holds each source's address, size and digests, and the terms its page
    states. With it, the same bytes are used from now on, and plans are complete before any download.
    """
    reach, root = reach_from(**said), store_from(store)
    documents = []
    for recipe in recipes:
        with _watching(is_quiet=quiet or as_json) as watcher:
            locked = lock_sources(recipe, root, reach, watcher)
        if not as_json and not quiet:
            _print(locked)
        documents.append(
            {"recipe": str(recipe), "lock": str(locked.path), "written": locked.is_written, "changes": dict(locked.changes)}
            | {"sources": {name: entry.table() for name, entry in locked.entries.items()}}
        )
    if as_json:
        print_json({"recipes": documents})


@contextlib.contextmanager
def _watching(*, is_quiet: bool) -> Iterator[Watcher]:
    """Watch what is done; whatever becomes of it, the terminal is left as it was."""
    watcher = watcher_for(is_quiet=is_quiet)
    try:
        yield watcher
    finally:
        watcher.finished()


def _print(locked: Locked) -> None:
    width = max(map(len, map(printable, locked.changes)), default=0)
    for name, changes in locked.changes.items():
        entry = locked.entries.get(name)
        digest = f"  sha256 {entry.sha256[:10]}…" if entry and entry.sha256 else ""
        size = f"{readable_size(entry.size):>8}" if entry else ""
        state = "locked" if changes == ["is new"] else "removed" if changes == ["is gone"] else "changed" if changes else "unchanged"
        click.echo(f"{printable(name):{width}}  {state:9}  {size}{digest}".rstrip())
        if state == "changed":
            click.echo("\n".join(f"    {change}" for change in changes))
    click.echo(f"{locked.path} {'written' if locked.is_written else 'is up to date'}")
