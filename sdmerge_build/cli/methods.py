"""Owns `sdbuild methods`: what a step can do, from the same signatures the engine uses.

Has never heard of recipes.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Sequence

import click

from sdmerge_build.architectures import Architecture, architecture_named, architecture_names, is_architecture
from sdmerge_build.errors import Issue, RecipeError, nearest
from sdmerge_build.methods import REQUIRED, Method, Parameter, methods
from sdmerge_build.weights.presets import ALIASES, PRESETS

__all__ = ["methods_command", "signature"]

_KINDS = {
    "Ratio": "a number, or a table over blocks and tensor names",
    "list[Ratio]": "one ratio per model",
    "Selection": "a list of components, or globs over tensor names",
}


@click.command("methods")
@click.argument("name", required=False)
@click.option("--blocks", metavar="ARCHITECTURE", help="List the blocks that ratios can name, such as those of sdxl or sd3/3.5-large.")
def methods_command(name: str | None, blocks: str | None) -> None:
    """List what a step can do, or describe one method."""
    if blocks is not None:
        click.echo("\n".join(_described(blocks)))
        return
    known = methods()
    if name is None:
        width = max(len(signature(method)) for method in known.values())
        for method in known.values():
            click.echo(f"{signature(method):{width}}  {method.title}")
        return
    if name not in known:
        raise RecipeError(Issue(what=f"there is no method `{name}`", hint=nearest(name, known)))
    method = known[name]
    click.echo(f"{signature(method)}\n\n{inspect.getdoc(method.function)}\n")
    for model in method.roles:
        click.echo(f"  {model:8} {'a list of sources or steps' if model == 'models' and method.is_open else 'a source or step'}")
    for parameter in method.parameters.values():
        click.echo(f"  {parameter.name:8} {_KINDS[parameter.kind]}{_default(parameter)}")
    click.echo(f"\nversion {method.version}, exact: the same bytes on every machine")


def signature(method: Method) -> str:
    """Write a method's fields as a step would hold them."""
    return f"{method.name}({', '.join([*method.roles, *method.parameters])})"


def _default(parameter: Parameter) -> str:
    if parameter.default is REQUIRED:
        return ""
    return f"; {', '.join(parameter.default) or 'none' if isinstance(parameter.default, tuple) else parameter.default} unless said"


def _described(name: str) -> Iterator[str]:
    """Describe an architecture's blocks: in order, with the tensors and parts of each, and how weights for them are written down."""
    if not is_architecture(name):
        raise RecipeError(Issue(what=f"there is no architecture `{name}`", hint=nearest(name, architecture_names())))
    architecture = architecture_named(name)
    yield architecture.title
    yield from _places(architecture) if architecture.blocks else ("", "no blocks: ratios are numbers, or tables with `base`, `elemental` and `rules`")
    for title, names in architecture.lists.items():
        shown = [word or "(dropped)" for word in names]
        yield from ("", f"mbw of {len(names)} values ({title}):", *_wrapped(shown))
        if architecture.spelled[title] != names:
            yield from ("  written there as", *_wrapped([word or "(dropped)" for word in architecture.spelled[title]]))
    if architecture.maps:
        yield from ("", "map:")
    for title, moved in architecture.maps.items():
        others = [f"{part} follows {block}" if block else f"{part} is not merged" for part, block in moved.items()]
        yield f"  {title:15} {', '.join(others) or 'parts follow the blocks above'}"
    if architecture.depth:
        yield from ("", f"curve over {len(architecture.depth)} layers, {architecture.depth[0]} to {architecture.depth[-1]}")
        yield from ("", "preset:", *_wrapped([*PRESETS, *ALIASES]))


def _places(architecture: Architecture) -> Iterator[str]:
    """Yield every block, and behind it its parts, with the tensors of each."""
    parts = {block: [part for part, (owner, _) in architecture.parts.items() if owner == block] for block in architecture.blocks}
    width = max(map(len, (*architecture.blocks, *architecture.parts))) + 2
    for block, prefixes in architecture.blocks.items():
        yield f"{block:{width}}  {_tensors(prefixes, architecture) or 'what no other block has'}"
        for part in parts[block]:
            yield f"{f'  {part}':{width}}  {_tensors(architecture.parts[part][1], architecture)}"


def _tensors(prefixes: Sequence[str], architecture: Architecture) -> str:
    """Name tensors by prefixes, those of a file that holds nothing but the diffusion model left out."""
    return ", ".join(f"{prefix}*" for prefix in prefixes if not architecture.bare or f"{architecture.bare}{prefix}" not in prefixes)


def _wrapped(words: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(words), 100, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
