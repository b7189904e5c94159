"""Owns what is said of methods: their docstrings, read into parts, so that command, README and schema say the same.

Has never heard of terminals or files. A docstring is a line of what the method does, paragraphs, a line `name: text` for each parameter, and
at last `Origin:` and `Elsewhere:`; further lines of an entry are indented.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sdmerge_build.errors import nearest
from sdmerge_build.methods import MODULES, REQUIRED, Method, Parameter, methods

__all__ = ["FAMILIES", "Documentation", "default_of", "documentation_of", "families", "found_for", "kind_of", "table"]

FAMILIES = {
    "sums of models": ("linear",),
    "by likeness": ("similarity",),
    "filtered differences": ("difference",),
    "several fine-tunes of one base": ("task_vectors", "sparse", "centers", "low_rank"),
    "rows, ranks and frequencies": ("structural",),
    "directions": ("spherical",),
    "order of channels": ("rebasin",),
    "finishing": ("finishing",),
    "one model": ("copying",),
    "parts of models": ("parts",),
    "adapters": ("baking", "extraction"),
}
"""What the files of methods are about, for people who look for one."""

_ENTRY = re.compile(r"(\w+): (.*)")
_RANGES = {"Ratio": "a number", "Unit": "a number from 0 to 1", "Positive": "a number, not negative"}
_KINDS = {
    "Selection": "a list of components, globs over tensor names, or /regular expressions/",
    "Seed": "a whole number, not negative",
    "int": "a whole number",
    "bool": "true or false",
}


@dataclass(slots=True, kw_only=True)
class Documentation:
    """What a method's docstring says."""

    title: str
    notes: list[str] = field(default_factory=list)  # paragraphs
    parameters: dict[str, str] = field(default_factory=dict)
    origin: str = ""
    elsewhere: str = ""


def documentation_of(method: Method) -> Documentation:
    """Read a method's docstring."""
    title, _, body = (inspect.getdoc(method.function) or "").partition("\n")
    made = Documentation(title=title)
    for paragraph in re.split(r"\n\s*\n", body.strip()):
        text = re.sub(r"\n\s+", " ", paragraph)
        notes: list[str] = []
        for line in text.split("\n"):
            entry = _ENTRY.fullmatch(line)
            if entry and entry[1] in method.parameters:
                made.parameters[entry[1]] = entry[2]
            elif entry and entry[1] == "Origin":
                made.origin = entry[2]
            elif entry and entry[1] == "Elsewhere":
                made.elsewhere = entry[2]
            elif line:
                notes.append(line)
        made.notes += [" ".join(notes)] if notes else []
    return made


def found_for(name: str, known: Mapping[str, Method]) -> str:
    """Say which method is meant by a name that is none here: another tool's, or a misspelt one."""
    wanted = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])", re.IGNORECASE)
    others = [made.name for made in known.values() if wanted.search(inspect.getdoc(made.function) or "")] if len(name) > 1 else []
    if others:
        return f"another tool's name; see {', '.join(f'`sdbuild methods {other}`' for other in others[:3])}"
    return nearest(name, known) or "`sdbuild methods` lists them"


def kind_of(parameter: Parameter) -> str:
    """Say what a parameter takes."""
    if parameter.words:
        return " or ".join(f'"{word}"' for word in parameter.words)
    if parameter.ratio:
        plain = f"{_RANGES[parameter.ratio]}, or a table over blocks and tensor names"
        return f"{plain}; one for all models, or a list with one for each" if parameter.is_list else plain
    return _KINDS[parameter.kind]


def default_of(parameter: Parameter) -> str:
    """Say what holds when a parameter is left out; nothing when it must not be."""
    if parameter.default is REQUIRED:
        return ""
    if isinstance(parameter.default, bool):
        return str(parameter.default).lower()
    if isinstance(parameter.default, tuple):
        return ", ".join(map(str, parameter.default)) or "none"
    return str(parameter.default)


def families() -> dict[str, list[Method]]:
    """Return the built-in methods by what they are about, in the order they are listed."""
    assert {module for modules in FAMILIES.values() for module in modules} == set(MODULES), "BUG: a file of methods is about nothing"
    of = {module: family for family, modules in FAMILIES.items() for module in modules}
    found: dict[str, list[Method]] = {}
    for method in methods().values():
        found.setdefault(of[method.function.__module__.rpartition(".")[2]], []).append(method)
    return found


def table() -> str:
    """Return the table of methods, in Markdown: fields, defaults, and what each does."""
    return "\n".join(["| Method | Fields | Does |", "|---|---|---|", *_rows()]) + "\n"


def _rows() -> Iterator[str]:
    for family, members in families().items():
        yield f"| **{family}** | | |"
        for method in members:
            fields = [f"`{role}`" for role in method.roles] + (["components, such as `vae`"] if method.gathers else [])
            for parameter in method.parameters.values():
                default = default_of(parameter)
                shown = default if default in {"none", ""} or not isinstance(parameter.default, (tuple, str)) else f"`{default}`"
                fields.append(f"`{parameter.name}`" + (f" ({shown})" if shown else ""))
            yield f"| `{method.name}` | {', '.join(fields)} | {method.title.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    print(table(), end="")
