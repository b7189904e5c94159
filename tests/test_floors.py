"""The architecture, as a test: imports go down only, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import sdmerge_build

PACKAGE = Path(sdmerge_build.__file__).parent

FLOORS = [
    {"errors", "dtypes", "events", "rounding"},
    {"digest", "files", "tomltext"},
    {"formula", "matrix", "tensorfile", "architectures", "licences", "claims"},
    {"recipe", "writer", "weights", "adapters"},
    {"methods", "formats", "lock"},
    {"sources"},
    {"blend", "rehearse", "schema"},
    {"steps"},
    {"plan", "store", "emit", "facts"},
    {"keys", "check", "supply", "contribution", "testimony", "bars"},
    {"ancestry", "coverage", "programs"},
    {"compiling", "questions", "slices"},
    {"lineage", "passes", "evaluate"},
    {"merge", "manifest", "surveys"},
    {"release", "making"},
    {"prepare", "provision"},
    {"report", "stage"},
    {"build"},
    {"console"},
    {"cli"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

HOMES = {
    "torch": {"merge", "making", "evaluate", "slices", "rounding", "surveys", "methods", "formats"},
    "networkx": {"plan"},
    "click": {"cli"},
    "rich": {"console", "cli"},
    "pydantic": {"recipe"},
    "tomli_w": {"manifest", "lock"},
    "httpx": {"sources"},
    "scipy": {"methods"},
    "mpmath": {"methods"},
}


def modules(package: Path) -> dict[Path, str]:
    """Every file, and the module or folder of plugs it belongs to."""
    paths = (p for p in sorted(package.rglob("*.py")) if p.parent != package or not p.stem.startswith("__"))
    return {p: p.relative_to(package).parts[0].removesuffix(".py") for p in paths}


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, anywhere in it, for types or in earnest."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from [node.module] if node.module != "sdmerge_build" else [f"sdmerge_build.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def violations(package: Path) -> Iterator[str]:
    for path, here in modules(package).items():
        for name in imports(path):
            head, _, rest = name.partition(".")
            there = rest.split(".")[0]
            if head == "sdmerge_build" and there not in {here, "__version__", ""} and FLOOR_OF.get(there, 99) >= FLOOR_OF[here]:
                yield f"{path.name} on floor {FLOOR_OF[here]} imports {there} from floor {FLOOR_OF.get(there)}"


def test_nothing_imports_upwards():
    """A module imports only from floors below its own."""
    assert list(violations(PACKAGE)) == []


def test_the_check_sees_an_import_that_goes_up(tmp_path):
    """A package in which the ground floor imports the door is caught."""
    package = tmp_path / "sdmerge_build"
    package.mkdir()
    (package / "errors.py").write_text("from sdmerge_build import cli\n")
    (package / "files.py").write_text("def f():\n    from sdmerge_build.store import Store\n")

    assert len(list(violations(package))) == 2


def test_every_module_has_a_floor():
    """A new module is given a place before it can be merged."""
    assert set(FLOOR_OF) == set(modules(PACKAGE).values())


def test_heavy_libraries_stay_home():
    """torch, networkx, click and the others are imported only by the modules that own them."""
    strays = [
        f"{path.name} imports {name}"
        for path, here in modules(PACKAGE).items()
        for name in imports(path)
        if here not in HOMES.get(name.partition(".")[0], {here})
    ]

    assert strays == []


def test_files_and_functions_stay_small():
    """No file exceeds 350 lines and no function 40, docstrings not counted."""
    long = [path.name for path in modules(PACKAGE) if len(path.read_text(encoding="utf-8").splitlines()) > 350]
    for path in modules(PACKAGE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
                if lines > 40:
                    long.append(f"{path.name}:{node.name} has {lines} lines")

    assert long == []


def test_every_module_says_what_it_owns():
    """The first sentences of a file say what it owns, and what it has never heard of."""
    silent = [
        path.name for path in modules(PACKAGE) if not (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").startswith("Owns ")
    ]

    assert silent == []
