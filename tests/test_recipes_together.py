"""Recipes that use steps of other recipes: one graph over several files, named by where they lie, built as if it were one."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tomllib
from collections.abc import Collection
from pathlib import Path

import checkpoints
import pytest
import torch
from conftest import Space, states

from sdmerge_build import plan as planning
from sdmerge_build.cli import _run
from sdmerge_build.errors import Issue, RecipeError
from sdmerge_build.lineage import readable_formula
from sdmerge_build.plan import Origin, Plan, Step, plan_file, plan_recipe
from sdmerge_build.recipe import read_recipe
from sdmerge_build.report import Report
from sdmerge_build.steps import Step as StepOfSteps

HEAD = 'recipe = 1\narchitecture = "sd1"\n'
BASE = (
    HEAD
    + """
[source.A]
path = "A.safetensors"
[source.B]
path = "B.safetensors"
[step.mix]
formula = "0.3 * A + 0.7 * B"
"""
)
ROOT = (
    HEAD
    + """
[source.base]
uri = "recipe:base.toml#mix"
[source.C]
path = "C.safetensors"
[step.final]
formula = "0.25 * base + 0.75 * C"
"""
)
ALONE = (
    BASE
    + """
artifact = true
[source.C]
path = "C.safetensors"
[step.final]
formula = "0.25 * mix + 0.75 * C"
"""
)


def kitchen(space: Space, **recipes: str) -> Path:
    """Write checkpoints A, B and C, and recipes; return the path of `recipe.toml`."""
    for name in "ABC":
        space.checkpoint(name, checkpoints.miniature("sd1", name, every=60))
    for name, text in ({"recipe": ROOT, "base": BASE} | recipes).items():
        space.write(f"{name}.toml", text)
    return space.path / "recipe.toml"


def alias(uri: str, name: str = "other", more: str = "") -> str:
    """Write a recipe whose one step is a copy of another recipe's."""
    return f'{HEAD}[source.{name}]\nuri = "recipe:{uri}"\n{more}\n[step.mix]\nformula = "{name}"\n'


def plan(space: Space, only: Collection[str] = (), **recipes: str) -> Plan:
    """Plan `recipe.toml` among others; folders are written as `__`."""
    for name, text in recipes.items():
        space.write(f"{name.replace('__', '/')}.toml", text)
    return plan_file(space.path / "recipe.toml", only)


def issues_of(space: Space, only: Collection[str] = (), **recipes: str) -> tuple[Issue, ...]:
    """Plan recipes that must be refused."""
    with pytest.raises(RecipeError) as caught:
        plan(space, only, **recipes)
    return caught.value.issues


def tensors_of(report: Report, name: str) -> tuple[str, str]:
    """Return an artifact's tensor key and the digest of its tensors."""
    [wish] = [wish for wish in report.wishes if wish.step.name == name]
    assert wish.stored
    return wish.tensor_key, wish.stored.tensor_digest


def test_two_recipes_build_what_one_would(space: Space):
    """
    The same steps in one file and in two have the same tensor key and the same tensors, and only the root's artifacts appear.
    """
    kitchen(space, alone=ALONE)
    together, alone = space.build(), space.build("alone.toml", out=space.path / "alone", store=space.path / "other-cache")

    assert {"final": "built"} == states(together)
    assert tensors_of(alone, "final") == tensors_of(together, "final")
    assert ["final.manifest.toml", "final.safetensors"] == sorted(path.name for path in (space.path / "out").iterdir())
    assert {"final": "reused"} == states(space.build())


def test_a_step_of_another_recipe_is_used_as_model_and_in_formulas(space: Space):
    """
    A source that is a step of another recipe is no source of the plan; whatever names it names the step.
    """
    text = (
        ROOT + '[step.sum]\nmethod = "weighted_sum"\na = "C"\nb = "base"\n[step.list]\nmethod = "linear"\nmodels = ["base", "C"]\nweights = [1, -1]\n'
    )
    made = plan(space, recipe=text, base=BASE)

    assert ["C", "base.toml#A", "base.toml#B"] == list(made.sources)
    assert ["base.toml#mix", "final", "sum", "list"] == list(made.steps)
    assert ("final", "sum", "list") == made.wanted
    assert ("base.toml#A", "base.toml#B") == made.steps["base.toml#mix"].inputs
    assert ("base.toml#mix", "C") == made.steps["final"].inputs
    assert ("C", "base.toml#mix") == made.steps["sum"].inputs
    assert ("base.toml#mix", "C") == made.steps["list"].inputs
    assert {"formula": "0.25 * [1] + 0.75 * [2]"} == made.steps["final"].params
    assert "0.25 * base.toml#mix + 0.75 * C" == readable_formula(made.steps["final"])


def test_one_step_under_two_names_is_one_step(space: Space):
    """
    Two sources may be the same step; the formula counts it twice.
    """
    text = HEAD + '[source.x]\nuri = "recipe:base.toml#mix"\n[source.y]\nuri = "recipe:./base.toml#mix"\n[step.z]\nformula = "0.5 * x + 0.25 * y"\n'
    made = plan(space, recipe=text, base=BASE)

    assert ("base.toml#mix", "base.toml#mix") == made.steps["z"].inputs
    assert 10.0 == made.steps["z"].method.function(16.0, 8.0, formula="")
    assert 2 == len(made.recipes)


def test_a_plan_knows_where_every_name_was_said(space: Space):
    """
    Sources and steps name the recipe they come from, the line there, and the name they have there.
    """
    made = plan(space, recipe=ROOT, base=BASE)

    assert set(made.origins) == {*made.sources, *made.steps}
    assert isinstance(made.origins["final"], Origin)
    assert (made.recipe, "final") == (made.origins["final"].recipe, made.origins["final"].name)
    assert (made.recipes[1], "mix") == (made.origins["base.toml#mix"].recipe, made.origins["base.toml#mix"].name)
    assert f"{space.path / 'base.toml'}:8" == made.where("step", "base.toml#mix")
    assert f"{space.path / 'base.toml'}:9" == made.where("step", "base.toml#mix", "formula")
    assert f"{space.path / 'base.toml'}:5" == made.where("source", "base.toml#A", "path")
    assert f"{space.path / 'recipe.toml'}:8" == made.where("step", "final")
    assert [space.path / "recipe.toml", space.path / "base.toml"] == [recipe.path for recipe in made.recipes]
    assert Step is StepOfSteps


def test_recipes_nest(space: Space):
    """
    A recipe's recipe may name a third; each path is seen from the folder of the recipe that says it, each name from the root's.
    """
    recipes = {
        "recipe": alias("a/one.toml#mix"),
        "a__one": alias("../b/two.toml#mix"),
        "b__two": alias("deep/three.toml#mix"),
        "b__deep__three": BASE,
    }
    made = plan(space, **recipes)

    assert ["b/deep/three.toml#mix", "b/two.toml#mix", "a/one.toml#mix", "mix"] == list(made.steps)
    assert ["b/deep/three.toml#A", "b/deep/three.toml#B"] == list(made.sources)
    assert ["recipe.toml", "a/one.toml", "b/two.toml", "b/deep/three.toml"] == [r.path.relative_to(space.path).as_posix() for r in made.recipes]


def test_recipes_in_other_folders_have_their_sources_there(space: Space):
    """
    A chain of three files in three folders is built from checkpoints that lie beside the last.
    """
    kitchen(space, recipe=alias("a/one.toml#mix"))
    space.write("a/one.toml", alias("../b/two.toml#mix"))
    space.write("b/two.toml", BASE)
    for name in "AB":
        (space.path / f"{name}.safetensors").rename(space.path / "b" / f"{name}.safetensors")
    run = space.sdbuild("recipe.toml")

    assert 0 == run.returncode, run.stderr
    for name in "AB":
        shutil.copy(space.path / "b" / f"{name}.safetensors", space.path)
    assert tensors_of(space.build("base.toml"), "mix")[1] == tensors_of(space.build(), "mix")[1]


def test_a_recipe_is_read_once(space: Space, monkeypatch: pytest.MonkeyPatch):
    """
    However many recipes and links lead to a file, it is read once, and its step is one step.
    """
    read: list[str] = []
    monkeypatch.setattr(planning, "read_recipe", lambda path: read.append(path.name) or read_recipe(path))
    left = alias("base.toml#mix").replace("[step.mix]", "[step.left]")
    right = alias("../x/base.toml#mix").replace("[step.mix]", "[step.right]")
    sources = "".join(f'[source.{name}]\nuri = "recipe:x/{name}.toml#{name}"\n' for name in ("left", "right"))
    made = plan(space, recipe=f'{HEAD}{sources}[step.top]\nformula = "0.5 * left + 0.5 * right"\n', x__left=left, x__right=right, x__base=BASE)

    assert ["recipe.toml", "left.toml", "right.toml", "base.toml"] == read
    assert ["x/base.toml#mix", "x/left.toml#left", "x/right.toml#right", "top"] == list(made.steps)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_to_a_recipe_is_that_recipe(space: Space):
    """
    A file reached by its name and by a link has the name it was first reached by; a link to the root is the root.
    """
    space.write("base.toml", BASE)
    (space.path / "link.toml").symlink_to("base.toml")
    (space.path / "back.toml").symlink_to("recipe.toml")
    sources = "".join(
        f'[source.{name}]\nuri = "recipe:{uri}"\n' for name, uri in {"x": "link.toml#mix", "y": "base.toml#mix", "z": "back.toml#w"}.items()
    )
    made = plan(space, recipe=f'{HEAD}{sources}[step.top]\nformula = "x + y + z"\n[step.w]\nformula = "x"\n')

    assert ("link.toml#mix", "link.toml#mix", "w") == made.steps["top"].inputs
    assert {"link.toml"} == set(made.others)


def test_recipes_may_use_each_other_as_long_as_steps_do_not(space: Space):
    """
    One graph counts: two files that name each other are no cycle; an address that leads home is the root's own step.
    """
    there = alias("recipe.toml#first") + BASE.removeprefix(HEAD).replace("[step.mix]", "[step.unused]")
    here = alias("there.toml#mix") + '[step.first]\nformula = "0.5 * A"\n[source.A]\npath = "A.safetensors"\n'
    made = plan(space, recipe=here, there=there)

    assert ["first", "there.toml#mix", "mix"] == list(made.steps)
    assert ["A"] == list(made.sources)
    assert ("first", "mix") == (made.steps["there.toml#mix"].inputs[0], made.wanted[0])


def test_a_cycle_across_files_is_shown_with_names_and_lines(space: Space):
    """
    The path leads through both files, begins in the root, and the hint says where each step stands.
    """
    [issue] = issues_of(space, recipe=alias("a/there.toml#mix"), a__there=alias("../recipe.toml#mix"))

    here, there = f"{space.path / 'recipe.toml'}:6", f"{space.path / 'a' / 'there.toml'}:6"
    assert here == issue.where
    assert "steps depend on each other: `mix` → `a/there.toml#mix` → `mix`" == issue.what
    assert f"the steps are `mix` at {here}, `a/there.toml#mix` at {there}" == issue.hint


def test_a_step_that_names_itself_by_address_is_a_cycle(space: Space):
    """
    An address that leads to the very step that uses it is shown, in the root and in another file.
    """
    [issue] = issues_of(space, recipe=alias("recipe.toml#mix"))
    assert "steps depend on each other: `mix` → `mix`" == issue.what
    assert f"the steps are `mix` at {space.path / 'recipe.toml'}:6" == issue.hint

    [issue] = issues_of(space, recipe=alias("loop.toml#mix"), loop=alias("loop.toml#mix"))
    assert "steps depend on each other: `loop.toml#mix` → `loop.toml#mix`" == issue.what
    assert f"{space.path / 'loop.toml'}:6" == issue.where


@pytest.mark.parametrize(
    ("address", "what", "hint"),
    [
        ("nowhere.toml#mix", "source `other`: there is no recipe `nowhere.toml`", "its place is seen from this recipe's folder"),
        ("base.toml/x.toml#mix", "source `other`: there is no recipe `base.toml/x.toml`", "its place is seen from this recipe's folder"),
        ("base.toml#mxi", "source `other`: `base.toml` has no step `mxi`", "did you mean `mix`?"),
        ("base.toml#mix#A", "source `other`: `base.toml` has no step `mix#A`", "did you mean `mix`?"),
        (
            "base.toml#A",
            "source `other`: `A` is a source of `base.toml`, not a step",
            "an address names what a recipe makes; write the source itself here, with its own `path` or `uri`",
        ),
        ("recipe.toml#other", "source `other`: `other` is a source of `recipe.toml`, not a step", "an address names what a recipe makes; write"),
    ],
)
def test_an_address_must_lead_to_a_step(space: Space, address: str, what: str, hint: str):
    """
    No such file, no such step, or a source: each is told at the address, with what to do.
    """
    [issue] = issues_of(space, recipe=alias(address), base=BASE)
    assert (f"{space.path / 'recipe.toml'}:4", what) == (issue.where, issue.what)
    assert issue.hint.startswith(hint)


@pytest.mark.parametrize("name", ["a" * 400 + ".toml", "loop.toml"])
def test_an_address_that_no_system_knows_leads_nowhere(space: Space, name: str):
    """
    A name with a zero, one too long, a link to itself: no recipe is there.
    """
    if os.name != "nt":
        (space.path / "loop.toml").symlink_to("loop.toml")
    [issue] = issues_of(space, recipe=alias(f"{name}#mix"))
    assert "there is no recipe `" in issue.what


def test_a_folder_is_no_recipe(space: Space):
    """
    What lies where a recipe should is told by its own path.
    """
    (space.path / "folder.toml").mkdir()
    [issue] = issues_of(space, recipe=alias("folder.toml#mix"))
    assert (str(space.path / "folder.toml"), "is not a file") == (issue.where, issue.what)


@pytest.mark.parametrize(
    "pin",
    [
        'path = "x"',
        'filename = "x"',
        "size = 0",
        f'sha256 = "{"0" * 64}"',
        f'blake3 = "{"0" * 64}"',
        'license = "x"',
        'credit = "x"',
        'homepage = "x"',
    ],
    ids=lambda pin: pin.split()[0],
)
def test_nothing_is_said_beside_the_address_of_a_step(space: Space, pin: str):
    """
    A file that is yet to be made has no place, size or digest, and its terms are said where it is made; nothing is passed over in silence.
    """
    [issue] = issues_of(space, recipe=alias("base.toml#mix", more=pin), base=BASE)
    field = pin.split(maxsplit=1)[0]
    assert f"{space.path / 'recipe.toml'}:5" == issue.where
    assert f"source `other` has `{field}`, but it is what the other recipe makes, which says that itself" == issue.what


def test_recipes_together_are_of_one_architecture(space: Space):
    """
    A recipe of another family is refused at the address that leads to it, once, also where it is named by a recipe between.
    """
    made = issues_of(space, recipe=alias("one.toml#mix"), one=alias("base.toml#mix"), base=BASE.replace("sd1", "sdxl"))
    assert [(f"{space.path / 'one.toml'}:4", "source `other`: `base.toml` is of architecture `sdxl`, but the recipe to be built is of `sd1`")] == [
        (issue.where, issue.what) for issue in made
    ]


def test_an_unknown_architecture_is_told_of_any_file(space: Space):
    """
    A misspelt architecture is told where it stands, and hides no mistake of another file.
    """
    made = issues_of(space, recipe=alias("base.toml#mix").replace("sd1", "sdxx"), base=BASE.replace("0.3 * A", "0.3 * Q"))
    whats = [issue.what for issue in made]
    assert "architecture `sdxx` is not known" in whats
    assert any("names `Q`" in what for what in whats)


def test_mistakes_of_all_files_are_told_together(space: Space):
    """
    Form and meaning of every file, file by file, the root first, each with its own path and line.
    """
    root = alias("one.toml#mix", more='licence = "x"') + '[source.gone]\nuri = "recipe:gone.toml#x"\n[step.bad]\nformula = "other + Q"\n'
    one = alias("two.toml#mixx") + '[step.bad]\nmethod = "wieghted_sum"\n[defaults]\ndtypes = 1\n'
    two = BASE + "[step.broken\n"
    told = [
        (Path(issue.where.rpartition(":")[0]).name, int(issue.where.rpartition(":")[2])) for issue in issues_of(space, recipe=root, one=one, two=two)
    ]

    assert [("recipe.toml", 5), ("recipe.toml", 9), ("recipe.toml", 11), ("one.toml", 9), ("one.toml", 11), ("two.toml", 10)] == told


def test_a_recipe_that_cannot_be_understood_is_blamed_alone(space: Space):
    """
    Nothing is said of addresses into a file that has no meaning of its own.
    """
    [issue] = issues_of(space, recipe=alias("base.toml#anything"), base="recipe = 2\n")
    assert f"{space.path / 'base.toml'}:1" == issue.where


def test_a_hundred_recipes_are_enough(space: Space):
    """
    The hundredth file is read, and one more is refused, once.
    """
    chain = {f"r{n}": alias(f"r{n + 1}.toml#mix") for n in range(1, 99)}
    made = plan(space, recipe=alias("r1.toml#mix"), **chain, r99=BASE)
    assert 100 == len(made.recipes)
    assert 100 == len(made.steps)

    more = alias("r100.toml#mix") + '[source.more]\nuri = "recipe:r101.toml#mix"\n'
    [issue] = issues_of(space, r99=more, r100=BASE, r101=BASE)
    assert f"{space.path / 'r99.toml'}:4" == issue.where
    assert "source `other`: `r100.toml` is one recipe too many: at most 100 are read together" == issue.what


@pytest.mark.parametrize(("mark", "dtype"), [("", "F16"), ("artifact = false\n", "F32"), ('dtype = "bf16"\n', "BF16")])
def test_a_step_has_the_dtype_that_it_has_alone(space: Space, mark: str, dtype: str):
    """
    Use by another recipe does not make a step any less of an artifact: whoever uses it uses its rounded values.
    """
    made = plan(space, recipe=ROOT, base=BASE + mark)
    assert dtype == str(made.steps["base.toml#mix"].dtype)
    assert ("final",) == made.wanted

    between = BASE + mark + '[step.last]\nformula = "0.5 * mix"\n'
    assert ("F32" if dtype == "F16" else dtype) == str(plan(space, base=between).steps["base.toml#mix"].dtype)
    assert plan(space, base=between).steps["final"].is_artifact


def test_what_is_consumed_is_what_the_other_recipe_publishes(space: Space):
    """
    Merging the published file of the other recipe gives the same tensors as naming its step.
    """
    kitchen(space)
    space.build("base.toml")
    space.write("by-file.toml", ROOT.replace('uri = "recipe:base.toml#mix"', 'path = "out/mix.safetensors"').replace("final", "by-file"))
    assert tensors_of(space.build(), "final")[1] == tensors_of(space.build("by-file.toml"), "by-file")[1]
    a, b = (checkpoints.miniature("sd1", name, every=60) for name in "AB")
    for name, tensor in space.load("mix").items():
        if tensor.is_floating_point():
            assert torch.equal((0.3 * a[name].float() + 0.7 * b[name].float()).half(), tensor)


def test_defaults_are_for_the_steps_of_their_own_file(space: Space):
    """
    Neither the root's defaults nor another's cross over.
    """
    made = plan(space, recipe=ROOT + '[defaults]\ndtype = "bf16"\nmissing = "keep"\n', base=BASE + '[defaults]\ncompute = "fp64"\nauthor = "Meina"\n')
    final, mix = made.steps["final"], made.steps["base.toml#mix"]
    assert ("BF16", "fp32", "keep", {}) == (str(final.dtype), final.compute, final.missing, final.about)
    assert ("F16", "fp64", "error", {"author": "Meina"}) == (str(mix.dtype), mix.compute, mix.missing, mix.about)


def test_nothing_to_build_is_said_of_the_root_alone(space: Space):
    """
    A recipe that keeps nothing can still be used by others.
    """
    assert ("final",) == plan(space, recipe=ROOT, base=BASE + "artifact = false\n").wanted
    [issue] = issues_of(space, recipe=ROOT + "artifact = false\n")
    assert "no step is an artifact, so there is nothing to build" == issue.what


def test_only_asks_for_artifacts_of_the_root(space: Space):
    """
    What a wish does not need is not planned, in whichever file it stands; steps of other recipes cannot be wished for.
    """
    recipes = {"recipe": ROOT + '[step.plain]\nformula = "C"\n', "base": BASE}
    made = plan(space, ["plain"], **recipes)
    assert (["plain"], ["C"]) == (list(made.steps), list(made.sources))
    assert 2 == len(made.recipes)

    [issue] = issues_of(space, ["base.toml#mix"], **recipes)
    assert "there is no step `base.toml#mix`" == issue.what


def test_only_builds_what_is_asked_for(space: Space):
    """
    The command with `--only` makes that artifact, from as many files as it takes.
    """
    kitchen(space, recipe=ROOT + '[step.plain]\nformula = "base"\n')
    assert [("plain", "built")] == [(made["name"], made["state"]) for made in space.reports("recipe.toml", "--only", "plain")]
    assert not (space.path / "out" / "final.safetensors").exists()


def test_a_rehearsal_makes_stand_ins_for_every_recipe(space: Space):
    """
    Sources of other recipes have stand-ins with safe file names, and those of one name in two recipes are two.
    """
    space.write("recipe.toml", ROOT.replace("base.toml", "sub/base.toml").replace("[source.C]", "[source.A]").replace("* C", "* A"))
    space.write("sub/base.toml", BASE)
    run = space.sdbuild("recipe.toml", "--rehearse")

    assert 0 == run.returncode, run.stderr
    made = sorted(path.name for path in (space.path / "cache" / "rehearsal" / "sources").iterdir())
    assert 3 == len(made)
    assert "A-sd1-tiny-0.safetensors" == made[0]
    assert made[1].startswith("sub_base.toml_A-")
    assert made[2].startswith("sub_base.toml_B-")
    assert 3 == len({(space.path / "cache" / "rehearsal" / "sources" / name).read_bytes() for name in made})
    assert (space.path / "cache" / "rehearsal" / "out" / "final.safetensors").exists()
    assert "--rehearse=tiny" in (space.path / "cache" / "rehearsal" / "out" / "final.manifest.toml").read_text(encoding="utf-8")


def test_names_depend_on_where_recipes_lie_to_each_other_alone(space: Space):
    """
    Both files moved to another folder make the same artifact, key, header and all.
    """
    kitchen(space)
    before = space.build().wishes[0]
    moved = space.path / "moved" / "far"
    moved.mkdir(parents=True)
    for path in (*space.path.glob("*.toml"), *space.path.glob("*.safetensors")):
        path.rename(moved / path.name)
    after = space.build("moved/far/recipe.toml").wishes[0]

    assert (before.tensor_key, before.artifact_key) == (after.tensor_key, after.artifact_key)
    assert "reused" == after.state.value
    for text in after.metadata.values():
        assert str(space.path) not in text


def test_tensor_keys_do_not_know_where_recipes_lie(space: Space):
    """
    The other recipe moved, the tensors stay: only the header, which names it, is written anew.
    """
    kitchen(space, recipe=ROOT)
    before = space.build().wishes[0]
    space.edit("recipe:base.toml", "recipe:./other.toml")
    (space.path / "base.toml").rename(space.path / "other.toml")
    after = space.build().wishes[0]

    assert before.tensor_key == after.tensor_key
    assert "re-emitted" == after.state.value


def test_a_change_in_the_other_recipe_is_explained_by_its_name(space: Space):
    """
    `--explain` names the step of the other file and what changed in it, with the names in its formula.
    """
    kitchen(space)
    assert 0 == space.sdbuild("recipe.toml").returncode
    space.edit("0.3 * A + 0.7 * B", "0.4 * A + 0.6 * B", "base.toml")
    run = space.sdbuild("recipe.toml", "--explain")

    assert 0 == run.returncode, run.stderr
    expected = "base.toml#mix: param.formula = 0.3 * base.toml#A + 0.7 * base.toml#B → 0.4 * base.toml#A + 0.6 * base.toml#B"
    assert expected in run.stdout
    assert "nothing to do" not in run.stdout


def test_a_manifest_names_every_recipe_it_takes(space: Space):
    """
    It has a digest of each file; a comment in another recipe makes it be written again, and builds nothing.
    """
    kitchen(space)
    space.build()
    path = space.path / "out" / "final.manifest.toml"
    before = tomllib.loads(path.read_text(encoding="utf-8"))
    recipes = plan_file(space.path / "recipe.toml").recipes
    assert recipes[0].digest == before["reproduce"]["recipe_digest"]
    assert {"base.toml": recipes[1].digest} == before["reproduce"]["recipes"]
    assert ["base.toml#A", "base.toml#B", "C"] == sorted((source["name"] for source in before["source"]), key=lambda name: (name == "C", name))
    assert ["base.toml#mix", "final"] == [step["name"] for step in before["step"]]

    stamp = path.stat().st_mtime_ns
    assert {"final": "reused"} == states(space.build())
    assert stamp == path.stat().st_mtime_ns

    space.edit("[step.mix]", "# a word\n[step.mix]", "base.toml")
    assert {"final": "reused"} == states(space.build())
    after = tomllib.loads(path.read_text(encoding="utf-8"))
    assert before["reproduce"]["recipes"] != after["reproduce"]["recipes"]
    assert {key: value for key, value in before.items() if key != "reproduce"} == {key: value for key, value in after.items() if key != "reproduce"}


def test_a_manifest_of_one_recipe_speaks_of_no_others(space: Space):
    """
    The table of other recipes is there only when there are others.
    """
    kitchen(space)
    space.build("base.toml")
    assert "recipes" not in tomllib.loads((space.path / "out" / "mix.manifest.toml").read_text(encoding="utf-8"))["reproduce"]


def test_the_header_names_what_came_from_where(space: Space):
    """
    Sources and steps of other recipes stand in an artifact's lineage under their full names.
    """
    kitchen(space)
    metadata = space.build().wishes[0].metadata
    lineage = json.loads(metadata["sdbuild.lineage"])

    assert {"base.toml#A", "base.toml#B", "C"} == set(metadata["modelspec.merged_from"].split(", "))
    assert {"base.toml#mix", "final"} == {step["name"] for step in lineage["steps"]}
    assert "0.25 * base.toml#mix + 0.75 * C" == json.loads(metadata["sd_merge_recipe"])["formula"]


def test_what_does_not_fit_is_told_in_the_recipe_that_says_it(space: Space):
    """
    A mismatch found in a step or source of another file has that file's path and line.
    """
    kitchen(space)
    space.checkpoint("B", {f"x.{name}": tensor for name, tensor in checkpoints.miniature("sd1", "B", every=60).items()})
    with pytest.raises(RecipeError) as caught:
        space.build()
    assert f"{space.path / 'base.toml'}:6" == caught.value.issues[0].where
    assert "source `base.toml#B` is not a" in caught.value.issues[0].what

    space.checkpoint("B", checkpoints.miniature("sd1", "B", every=59))
    with pytest.raises(RecipeError) as caught:
        space.build()
    assert f"{space.path / 'base.toml'}:8" == caught.value.issues[0].where


def test_an_artifact_does_not_replace_another_recipe(space: Space):
    """
    Every recipe file is an input: a manifest that would take its place is refused.
    """
    kitchen(space, recipe=ROOT.replace("base.toml", "final.manifest.toml"))
    (space.path / "base.toml").rename(space.path / "final.manifest.toml")
    text = (space.path / "final.manifest.toml").read_text(encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        space.build(out=space.path)

    assert "which is the recipe `final.manifest.toml`" in caught.value.issues[0].what
    assert text == (space.path / "final.manifest.toml").read_text(encoding="utf-8")


def test_the_command_refuses_a_bad_address(space: Space, capsys: pytest.CaptureFixture[str]):
    """
    A mistake in an address ends with exit code 2, told on stderr with its file and line.
    """
    space.write("recipe.toml", alias("base.toml#mxi"))
    space.write("base.toml", BASE)
    assert 2 == _run([str(space.path / "recipe.toml")])
    said = capsys.readouterr()
    assert "" == said.out
    assert f"{space.path / 'recipe.toml'}:4: source `other`: `base.toml` has no step `mxi`" in said.err
    assert "did you mean `mix`?" in said.err


def test_a_recipe_that_was_read_already_is_planned_with_its_others(space: Space):
    """
    It does not matter who reads the root.
    """
    by_path = plan(space, recipe=ROOT, base=BASE)
    by_value = plan_recipe(read_recipe(space.path / "recipe.toml"))
    assert list(by_path.steps) == list(by_value.steps)
    assert all(before.name == after.name for before, after in itertools.zip_longest(by_path.origins.values(), by_value.origins.values()))
