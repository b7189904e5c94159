"""Owns the recipe: what its author said, field by field, with the line each was said on.

Has never heard of methods, graphs or files; whether names mean anything is for `plan` to find out.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, JsonValue, Tag, ValidationError

from sdmerge_build.digest import blake3_hex
from sdmerge_build.errors import Issue, RecipeError, in_file_order, nearest
from sdmerge_build.matrix import MAX_STEPS, expand_matrix
from sdmerge_build.tomltext import Lines, read_toml

__all__ = ["Defaults", "Evidence", "FormError", "MethodsFile", "Recipe", "RecipeTable", "Release", "SourceTable", "StepTable", "read_recipe"]

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_UNFILLED = re.compile(r".\{\w+\}|\{\w+\}.")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?|[.-].*|.*\.")  # Windows devices, hidden files, options, trailing dots

Hex64 = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
DtypeName = Literal["fp16", "bf16", "fp32", "fp64", "fp8_e4m3", "fp8_e5m2", "keep"]
_ONE, _TABLE = "(one)", "(table)"  # what pydantic calls the two ways to say a dtype, in addresses of complaints
DtypeField = Annotated[
    Annotated[DtypeName, Tag(_ONE)] | Annotated[dict[str, DtypeName], Tag(_TABLE)],
    Discriminator(lambda value: _TABLE if isinstance(value, dict) else _ONE),
]
Text = Annotated[str, Field(min_length=1, max_length=10_000)]


class Table(BaseModel):
    """A table of a recipe: strict types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Evidence(Table):
    """Where a model's terms can be read, and when somebody did."""

    url: Annotated[str, Field(pattern=r"^https?://", max_length=2000)] = Field(description="The page that shows the terms.")
    date: dt.date = Field(description="The day on which it showed them, such as 2026-11-01.")


class SourceTable(Table):
    """A checkpoint that comes from outside."""

    path: Text | None = Field(None, description="Where the file lies, relative to the recipe's folder.")
    uri: Text | None = Field(
        None, description="Where it comes from: an https address, civitai:MODEL@VERSION, hf:OWNER/REPO/FILE@REVISION, recipe:OTHER.toml#STEP."
    )
    filename: Text | None = Field(None, description="The name to look for in the folders given by --models.")
    size: int | None = Field(None, ge=0, description="Its size in bytes.")
    sha256: Hex64 | None = Field(None, description="The sha256 of the whole file, 64 hex digits.")
    blake3: Hex64 | None = Field(None, description="The blake3 of the whole file, 64 hex digits.")
    architecture: Text | None = Field(None, description="Its variant, where others of the recipe are another: `sd1/inpainting`.")
    adapter: bool | None = Field(
        None, description="Whether it is an adapter, such as a LoRA. Its file tells; rehearsals must be told where a formula names it."
    )
    license: Text | None = Field(None, description="Its licence, as its author declares it.")
    credit: Text | None = Field(None, description="Whom to credit.")
    homepage: Text | None = Field(None, description="Its page, for people.")
    permissions: dict[str, JsonValue] | None = Field(
        None, description="What its author permits beside the licence, as Civitai names it: allowNoCredit, allowCommercialUse, …"
    )
    evidence: Evidence | None = Field(None, description="Where licence and permissions can be read, and when they were.")
    license_file: Text | None = Field(None, description="A file with the text of its licence, relative to the recipe's folder; copied into releases.")


class Defaults(Table):
    """What every step says unless it says otherwise."""

    dtype: DtypeField | None = Field(
        None, description="The number format of artifacts: fp16 unless said; `keep` is the widest of the parents; or a table, per component."
    )
    compute: Literal["fp32", "fp64", "native"] | None = Field(
        None, description="The precision of the arithmetic: fp32 unless said; `native` is AUTOMATIC1111's, in the parents' own dtype."
    )
    missing: Literal["error", "keep"] | None = Field(None, description="A tensor that a later model lacks: `keep` takes the first model's.")
    extra: Literal["error", "keep", "drop"] | None = Field(None, description="A tensor that only a later model has.")
    mismatch: Literal["error", "keep", "overlap", "zeros"] | None = Field(
        None, description="A tensor whose shapes differ: `keep` takes the first model's; `overlap` merges what they have in common."
    )
    nonfinite: Literal["error", "allow", "saturate"] | None = Field(
        None, description="A result that is infinite or not a number: `saturate` takes the largest number instead of an infinite one."
    )
    artifact: bool | None = Field(None, description="Keep the result as a file, even if another step uses it.")
    author: Text | None = Field(None, description="Who made the artifact; written into its header.")
    description: Text | None = Field(None, description="What it is; written into its header.")
    license: Text | None = Field(None, description="The licence declared for the artifact; written into its header.")


class StepTable(Defaults):
    """A method applied to sources or steps; the method's models and parameters stand beside these fields."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    formula: Text | None = Field(None, description="A sum over names, such as `0.3 * A + 0.7 * B` or `A + 1.0 * (B - C)`.")
    method: Text | None = Field(None, description="The name of a method; see `sdbuild methods`.")
    title: Text | None = Field(None, description="The artifact's title; its name unless said.")


class Release(Table):
    """What is said of artifacts that are to be published; with it, a build refuses what the ancestors' terms forbid."""

    title: Text | None = Field(None, description="The name it is published under; the artifact's title unless said.")
    author: Text | None = Field(None, description="Who publishes it; written into the header where the step names nobody.")
    version: Text | None = Field(None, description="The version that is published.")
    license: Text | None = Field(None, description="The licence it is published under; refused when it is looser than what the ancestors ask for.")
    policy: Literal["strict", "minimal"] = Field(
        "strict", description="`minimal` drops the permissions of authors who allow other ones on merges; `strict` passes them on."
    )
    lineage: Literal["full", "licences", "none"] = Field(
        "full", description="What is embedded in the file: all, only the parents' names and terms, or nothing. The manifest always has all."
    )


class MethodsFile(Table):
    """A Python file that defines methods."""

    path: Text = Field(description="Where the file lies, relative to the recipe's folder.")
    sha256: Hex64 | None = Field(None, description="The sha256 of the file; `--locked` refuses one that is not pinned.")


def _filed(value: Any) -> Any:
    """Read a path alone as the table that says no more."""
    return {"path": value} if isinstance(value, str) else value


def _whole(value: Any) -> Any:
    """Keep `true` and `1.0`, which Python takes for 1, from passing for it."""
    return value if type(value) is int else repr(value)


class RecipeTable(Table):
    """A recipe, whole."""

    recipe: Annotated[Literal[1], BeforeValidator(_whole)] = Field(description="The version of the recipe format.")
    architecture: Text = Field(description="The family of every source, checked against their headers.")
    methods: list[Annotated[MethodsFile, BeforeValidator(_filed)]] = Field(
        default_factory=list, max_length=100, description="Python files that define methods of your own; running a recipe runs them."
    )
    defaults: Defaults = Field(default_factory=Defaults)
    release: Release | None = Field(None, description="What is said of artifacts that are to be published.")
    source: dict[str, SourceTable] = Field(description="The checkpoints that come from outside, by name.")
    step: dict[str, StepTable] = Field(description="What is made of them, by name.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe as it was said, with matrices spelled out."""

    path: Path
    digest: str  # blake3 of its text
    table: RecipeTable
    lines: Lines
    templates: Mapping[str, str]  # step → the name its table has in the file

    def where(self, *address: str | int) -> str:
        """Name the file and line of a table or field; steps of a matrix share their template's."""
        if len(address) > 1 and address[0] == "step":
            address = ("step", self.templates.get(str(address[1]), address[1]), *address[2:])
        return self.lines.where(*address)


class FormError(RecipeError):
    """The form of a recipe is wrong; `sound` is what is left without the fields at fault, if that still is a recipe to be understood."""

    def __init__(self, *issues: Issue, sound: Recipe | None = None) -> None:
        super().__init__(*issues)
        self.sound = sound


def read_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises `RecipeError` with everything that is wrong with its form, in file order."""
    table, lines = read_toml(path)
    version = table.get("recipe", FORMAT)
    if type(version) is int and version > FORMAT:
        what = f"is written in recipe format {version}; this sdbuild reads format {FORMAT}"
        raise RecipeError(Issue(where=lines.where("recipe"), what=what, hint="a newer sdbuild may read it"))
    issues: list[Issue] = []
    templates = _expand_steps(table, lines, issues)
    is_whole = not issues  # a matrix that could not be spelled out leaves names undefined that are not
    recipe = _validated(path, table, lines, templates, issues)
    if recipe:
        issues += _bad_names(recipe)
    if issues or not recipe:
        raise FormError(*in_file_order(issues), sound=recipe if is_whole else None)
    return recipe


def _validated(path: Path, table: dict[str, Any], lines: Lines, templates: Mapping[str, str], issues: list[Issue]) -> Recipe | None:
    """Validate a recipe's form; when only fields that can be left out are at fault, what is left is returned beside the issues."""
    digest = blake3_hex(lines.text.encode())
    for _ in range(2):
        try:
            return Recipe(path=path, digest=digest, table=RecipeTable.model_validate(table), lines=lines, templates=templates)
        except ValidationError as error:
            mistakes = error.errors(include_url=False)
            issues += [_issue(mistake, lines, templates) for mistake in mistakes]
            if not all(_leave_out(table, mistake) for mistake in mistakes):
                return None
    return None


def _address(mistake: Any) -> tuple[Any, ...]:
    """Return the keys that lead to what pydantic complains of."""
    return tuple(part for part in mistake["loc"] if part not in {_ONE, _TABLE})


def _leave_out(table: dict[str, Any], mistake: Any) -> bool:
    """Take a field at fault out of a recipe, where what is left still means something."""
    *around, field = _address(mistake)
    if mistake["type"] not in {"extra_forbidden", "literal_error", "string_pattern_mismatch"} or field == "recipe":
        return False
    for part in around:
        table = table[part]
    return table.pop(field, None) is not None


def _expand_steps(table: dict[str, Any], lines: Lines, issues: list[Issue]) -> dict[str, str]:
    """Spell out matrices in place, and remember which table each step comes from."""
    written = table.get("step")
    if not isinstance(written, dict):
        return {}
    steps: dict[str, Any] = {}
    templates: dict[str, str] = {}
    for template, fields in written.items():
        expanded = expand_matrix(template, fields, lines, issues) if isinstance(fields, dict) else iter([(template, fields)])
        for name, filled in expanded:
            if len(steps) >= MAX_STEPS and "matrix" in fields:
                what = f"the matrices of this recipe make more steps than the {MAX_STEPS} that are built; at most {MAX_STEPS} may be made"
                raise RecipeError(*in_file_order([*issues, Issue(where=lines.where("step", template), what=what)]))
            if name in steps:
                what = f"step `{name}` is made twice, by `{templates[name]}` and by `{template}`"
                issues.append(Issue(where=lines.where("step", template), what=what))
            steps[name] = filled
            templates[name] = template
    table["step"] = steps
    return templates


def _bad_names(recipe: Recipe) -> list[Issue]:
    """Find names that could not be file names everywhere, or that differ only in case."""
    issues = []
    seen: dict[str, str] = {}
    for kind, names in (("source", recipe.table.source), ("step", recipe.table.step)):
        for name in names:
            where = recipe.where(kind, name)
            if not _NAME.fullmatch(name) or _RESERVED.fullmatch(name):
                hint = (
                    "`{…}` in a name needs a `matrix` that says its values"
                    if "{" in name
                    else "use up to 128 letters, digits, `-`, `_` and `.`; no dot at either end, no dash in front, no Windows device name"
                )
                issues.append(Issue(where=where, what=f"`{name[:128]}` cannot be the name of a {kind}", hint=hint))
            elif (twin := seen.setdefault(name.casefold(), f"{kind} `{name}`")) != f"{kind} `{name}`":
                issues.append(
                    Issue(where=where, what=f"{kind} `{name}` has the same name as {twin}", hint="names are compared without regard to case")
                )
    return issues


def _issue(error: Any, lines: Lines, templates: Mapping[str, str]) -> Issue:
    """Say one of pydantic's complaints in our words, with its line."""
    address = _address(error)
    if len(address) > 1 and address[0] == "step":
        address = ("step", templates.get(address[1], address[1]), *address[2:])
    where = lines.where(*address)
    field, table = str(address[-1]), _table_shown(address)
    match error["type"]:
        case "extra_forbidden":
            return Issue(where=where, what=f"{table} has an unknown field `{field}`", hint=nearest(field, _fields_around(address)))
        case "missing":
            return Issue(where=where, what=f"{table} lacks `{field}`", hint=_MISSING_HINTS.get(field, ""))
        case "literal_error":
            expected = error["ctx"]["expected"].replace("'", "`")
            said = {"fp8": "fp8_e4m3", "float8": "fp8_e4m3", "float8_e4m3fn": "fp8_e4m3"}.get(str(error["input"]), str(error["input"]))
            hint = nearest(said.replace("float", "fp"), expected.replace(" or ", ", ").replace("`", "").split(", "))
            return Issue(where=where, what=f"`{field}` is {repr(error['input'])[:60]}; it must be {expected}", hint=hint)
        case "string_pattern_mismatch" if field == "url":
            return Issue(where=where, what=f"`url` is {repr(error['input'])[:60]}; it must begin with https://")
        case "string_pattern_mismatch":
            said = str(error["input"])
            wrong = f"has {len(said)} characters" if len(said) != 64 else f"holds {next(c for c in said if c not in '0123456789abcdefABCDEF')!r}"
            hint = "this is the short model hash; `sdbuild inspect FILE` prints the whole" if len(said) in {8, 10, 12} else ""
            return Issue(where=where, what=f"`{field}` of {table} must be 64 hex digits, but {wrong}", hint=hint)
        case "model_type" | "dict_type":
            return Issue(where=where, what=f"`{field}` of {table} is {repr(error['input'])[:60]}; it must be a table")
        case _:
            shown = repr(error["input"])
            return Issue(where=where, what=f"`{field}` of {table} is {shown[:60]}: {error['msg'][:1].lower() + error['msg'][1:]}")


def _table_shown(address: tuple[str | int, ...]) -> str:
    """Name the table that a field stands in: the recipe, `defaults`, or a source or step."""
    match address:
        case (kind, name, _, *_):
            return f"{kind} `{name}`"
        case ("defaults" | "release" as name, _):
            return f"`{name}`"
        case ("source" | "step" as kind, _):
            return f"[{kind}]"
    return "the recipe"


_MISSING_HINTS = {
    "recipe": "write `recipe = 1` at the top",
    "architecture": 'write `architecture = "sd1"` (or `sdxl`, or `generic`)',
    "source": "write a [source.NAME] with a `path` or `filename`",
    "step": "write a [step.NAME] with a `formula`",
}


def _fields_around(address: tuple[str | int, ...]) -> list[str]:
    if "evidence" in address[2:]:
        return list(Evidence.model_fields)
    models: dict[str, type[Table]] = {"defaults": Defaults, "release": Release, "source": SourceTable, "step": StepTable}
    model = models.get(str(address[0]), RecipeTable) if len(address) > 1 else RecipeTable
    return list(model.model_fields)
