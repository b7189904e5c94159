"""Owns `sdbuild methods`: what a step can do, from the same signatures the engine uses.

Has never heard of recipes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

import click

from sdmerge_build.architectures import Architecture, architecture_named, architecture_names, is_architecture
from sdmerge_build.errors import Issue, RecipeError, nearest
from sdmerge_build.methods import Method, methods
from sdmerge_build.methods.documentation import default_of, documentation_of, families, found_for, kind_of
from sdmerge_build.methods.own import OwnError, installed_methods
from sdmerge_build.weights.presets import ALIASES, PRESETS

__all__ = ["methods_command", "signature"]


@click.command("methods")
@click.argument("name", required=False)
@click.option("--blocks", metavar="ARCHITECTURE", help="List the blocks that ratios can name, such as those of sdxl or sd3/3.5-large.")
def methods_command(name: str | None, blocks: str | None) -> None:
    """List what a step can do, or describe one method."""
    if blocks is not None:
        click.echo("\n".join(_described(blocks)))
        return
    known = {**methods(), **_installed()}
    if name is None:
        width = max(map(len, known))
        groups = families() | ({"installed packages": list(_installed().values())} if _installed() else {})
        lines = [[f"{family}:", *(f"  {method.name:{width}}  {method.title}" for method in members)] for family, members in groups.items()]
        click.echo("\n\n".join(map("\n".join, [*lines, ["`sdbuild methods NAME` explains one, also by the name that another tool gives it."]])))
        return
    if name not in known:
        raise RecipeError(Issue(what=f"there is no method `{name}`", hint=found_for(name, known)))
    click.echo("\n".join(_explained(known[name])))


def _installed() -> Mapping[str, Method]:
    try:
        return installed_methods()
    except OwnError as error:
        raise RecipeError(Issue(what=f"a package's methods: {error}", hint=error.hint)) from error


def signature(method: Method) -> str:
    """Write a method's fields as a step would hold them."""
    return f"{method.name}({', '.join([*method.roles, *([f'{method.gathers}…'] if method.gathers else []), *method.parameters])})"


def _explained(method: Method) -> Iterator[str]:
    """Explain one method: what it does, its fields, where it comes from, and what it costs."""
    said = documentation_of(method)
    yield from (signature(method), "", *_paragraph(said.title))
    for note in said.notes:
        yield from ("", *_paragraph(note))
    yield ""
    width = max(len(name) for name in (*method.roles, *method.parameters)) + 2
    for role in method.roles:
        yield f"  {role:{width}}{'a list of sources or steps' if role == method.rest else 'a source or step'}"
    if method.gathers:
        yield "  vae, …  a source or step, for each component of the architecture that is named"
    for parameter in method.parameters.values():
        default = default_of(parameter)
        yield f"  {parameter.name:{width}}{kind_of(parameter)}{f'; {default} unless said' if default else ''}"
        yield from textwrap.wrap(said.parameters.get(parameter.name, ""), 100, initial_indent=" " * (width + 2), subsequent_indent=" " * (width + 2))
    yield ""
    yield from _paragraph(f"Origin: {said.origin}") if said.origin else ()
    yield from _paragraph(f"Elsewhere: {said.elsewhere}") if said.elsewhere else ()
    yield from _paragraph(_PINNED if method.pinned else _EXACT)
    if method.survey:
        yield from _paragraph("Its models are surveyed whole before anything is merged; what was found is kept.")
    if method.cut == "nowhere":
        yield from _paragraph("It needs a tensor in one piece: memory grows with the largest.")
    yield f"Version {method.version}."


_EXACT = "Exact: the same bytes on every machine."
_PINNED = "Pinned: the same bytes for one version of torch on one kind of processor; both are in its key."


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)


def _described(name: str) -> Iterator[str]:
    """Describe an architecture's blocks: in order, with the tensors and parts of each, and how weights for them are written down."""
    if not is_architecture(name):
        raise RecipeError(
            Issue(
                what=f"there is no architecture `{name}`", hint=nearest(name, architecture_names()) or f"known are {', '.join(architecture_names())}"
            )
        )
    architecture = architecture_named(name)
    yield architecture.title
    yield f"components: {', '.join(architecture.components) or 'none'}"
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
