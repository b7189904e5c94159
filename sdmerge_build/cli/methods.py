"""Owns `sdbuild methods`: what a step can do, from the same signatures the engine uses.

Has never heard of recipes.
"""

from __future__ import annotations

import inspect

import click

from sdmerge_build.errors import Issue, RecipeError, nearest
from sdmerge_build.methods import REQUIRED, Method, Parameter, methods

__all__ = ["methods_command", "signature"]

_KINDS = {
    "Ratio": "a number, or a table over blocks and tensor names",
    "list[Ratio]": "one ratio per model",
    "Selection": "a list of components, or globs over tensor names",
}


@click.command("methods")
@click.argument("name", required=False)
def methods_command(name: str | None) -> None:
    """List what a step can do, or describe one method."""
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
    for model in method.models or ("models",):
        click.echo(f"  {model:8} {'a list of sources or steps' if not method.models else 'a source or step'}")
    for parameter in method.parameters.values():
        click.echo(f"  {parameter.name:8} {_KINDS[parameter.kind]}{_default(parameter)}")
    click.echo(f"\nversion {method.version}, exact: the same bytes on every machine")


def signature(method: Method) -> str:
    """Write a method's fields as a step would hold them."""
    return f"{method.name}({', '.join([*(method.models or ('models',)), *method.parameters])})"


def _default(parameter: Parameter) -> str:
    if parameter.default is REQUIRED:
        return ""
    return f"; {', '.join(parameter.default) or 'none' if isinstance(parameter.default, tuple) else parameter.default} unless said"
