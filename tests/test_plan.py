"""Plans: names resolved, steps in a stable order, cycles shown, defaults applied."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Collection

import pytest
from conftest import Space
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdmerge_build.errors import Issue, RecipeError
from sdmerge_build.plan import Plan, Step, plan_file, plan_recipe
from sdmerge_build.recipe import read_recipe
from sdmerge_build.weights.ratio import Ratio

HEAD = """\
recipe = 1
architecture = "sd1"
[source.A]
path = "A.safetensors"
[source.B]
path = "B.safetensors"
[source.C]
path = "C.safetensors"
"""
DIAMOND = """
[step.top]
formula = "0.5 * left + 0.5 * right"
[step.right]
formula = "base - B"
[step.left]
formula = "base + B"
[step.base]
formula = "0.5 * A"
"""


def plan(space: Space, text: str, only: Collection[str] = (), head: str = HEAD) -> Plan:
    """Plan a recipe."""
    return plan_recipe(read_recipe(space.write("recipe.toml", head + text)), only)


def issues_of(space: Space, text: str, only: Collection[str] = (), head: str = HEAD) -> tuple[Issue, ...]:
    """Plan a recipe that must be refused."""
    with pytest.raises(RecipeError) as caught:
        plan(space, text, only, head)
    return caught.value.issues


def one(space: Space, text: str, head: str = HEAD) -> Step:
    """Plan a recipe and return its first step."""
    return next(iter(plan(space, text, head=head).steps.values()))


def chain(length: int, first: str = "A") -> str:
    """Write a long chain of steps, each made of the one before it."""
    return "".join(f'[step.s{n}]\nformula = "0.5 * {f"s{n - 1}" if n else first} + 0.5 * B"\n' for n in range(length))


def test_every_step_comes_after_what_it_needs(space: Space):
    """
    A diamond is planned from its base, whatever the order of its tables.
    """
    made = plan(space, DIAMOND)
    assert ["base", "right", "left", "top"] == list(made.steps)
    assert ("top",) == made.wanted
    assert ["A", "B"] == list(made.sources)


def test_steps_that_could_stand_anywhere_stand_as_in_the_recipe(space: Space):
    """
    Ties break by position in the file, never by name or hash.
    """
    names = [f"s{n}" for n in range(30)]
    random.Random(7).shuffle(names)
    made = plan(space, "".join(f'[step.{name}]\nformula = "A"\n' for name in names))
    assert names == list(made.steps)
    assert tuple(names) == made.wanted


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edges=st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9))), order=st.permutations(range(10)))
def test_any_graph_without_cycles_is_ordered_and_any_other_shown(space: Space, edges: set[tuple[int, int]], order: list[int]):
    """
    When edges point one way, every step follows its parents; one edge back is a cycle whose path is walked by the message.
    """
    forward = {(min(edge), max(edge)) for edge in edges if edge[0] != edge[1]}
    made = plan(space, web(forward, order))
    position = {name: n for n, name in enumerate(made.steps)}
    assert all(position[f"s{parent}"] < position[f"s{child}"] for parent, child in forward)
    assert tuple(f"s{n}" for n in order) == made.wanted

    for parent, child in sorted(forward)[:1]:
        knotted = {*forward, (child, parent)}
        [issue] = issues_of(space, web(knotted, order))
        path = [int(name) for name in re.findall(r"`s(\d)`", issue.what)]
        assert path[0] == path[-1]
        assert set(itertools.pairwise(path)) <= knotted


def web(edges: set[tuple[int, int]], order: list[int]) -> str:
    """Write ten artifacts in some order, each made of A and of the steps that edges lead from."""
    sums = {n: " + ".join(["A", *(f"s{parent}" for parent, child in sorted(edges) if child == n)]) for n in order}
    return "".join(f'[step.s{n}]\nformula = "{terms}"\nartifact = true\n' for n, terms in sums.items())


def test_a_chain_of_ten_thousand_steps_is_planned(space: Space):
    """
    Length costs no stack.
    """
    made = plan(space, chain(10_000))

    assert [f"s{n}" for n in range(10_000)] == list(made.steps)
    assert ("s9999",) == made.wanted
    assert ["A", "B", "s0", "s1"] == sorted(made.ancestors("s9999"))[:4]
    assert 10_002 == len(made.ancestors("s9999"))


def test_a_chain_of_thousands_of_artifacts_is_planned(space: Space):
    """
    Every step of a long chain may be kept.
    """
    made = plan(space, chain(4000), head=HEAD + "[defaults]\nartifact = true\n")

    assert 4000 == len(made.wanted)


def test_a_ring_of_thousands_is_shown_in_short(space: Space):
    """
    A cycle too long to read is abridged; it still begins and ends with the same step.
    """
    [issue] = issues_of(space, chain(2000, first="s1999"))
    assert issue.what.startswith("steps depend on each other: `s0` → `s1` → ")
    assert issue.what.endswith("→ `s1999` → `s0`")
    assert "…" in issue.what
    assert len(str(issue)) < 2000


def test_a_cycle_shows_its_path_and_lines(space: Space):
    """
    The path is closed, begins with the step that sorts first, and the hint says where each stands.
    """
    [issue] = issues_of(space, '[step.repair]\nformula = "blend"\n[step.blend]\nformula = "0.5 * repair + 0.5 * A"\n')
    path = space.path / "recipe.toml"

    assert "steps depend on each other: `blend` → `repair` → `blend`" == issue.what
    assert f"{path}:11" == issue.where
    assert f"the steps are `blend` at {path}:11, `repair` at {path}:9" == issue.hint


def test_each_knot_is_shown_once(space: Space):
    """
    Two cycles that share a step are one knot; a third elsewhere is another.
    """
    text = '[step.p]\nformula = "q + r"\n[step.q]\nformula = "p"\n[step.r]\nformula = "p"\n[step.z]\nformula = "z"\n'
    whats = [issue.what for issue in issues_of(space, text)]
    assert 2 == len(whats)
    assert whats[0].startswith("steps depend on each other: `p` → `")
    assert "steps depend on each other: `z` → `z`" == whats[1]


@pytest.mark.parametrize(
    ("extra", "defaults", "expected"),
    [
        ({}, "", ("top",)),
        ({"base": "artifact = true"}, "", ("top", "base")),
        ({"top": "artifact = false", "left": "artifact = true"}, "", ("left",)),
        ({}, "artifact = true", ("top", "right", "left", "base")),
        ({"base": "artifact = false"}, "artifact = true", ("top", "right", "left")),
        ({}, "artifact = false", ("top",)),
    ],
)
def test_artifacts_are_what_nobody_uses_or_what_says_so(space: Space, extra: dict[str, str], defaults: str, expected: tuple[str, ...]):
    """
    A step says whether it is kept, or the defaults say, or it is kept because nothing else is made of it; artifacts come in recipe order.
    """
    text = DIAMOND
    for name, line in extra.items():
        text = text.replace(f"[step.{name}]", f"[step.{name}]\n{line}")
    made = plan(space, text, head=HEAD + f"[defaults]\n{defaults}\n")
    assert expected == made.wanted
    assert set(expected) == {step.name for step in made.steps.values() if step.is_artifact}


def test_what_no_artifact_needs_is_not_planned(space: Space):
    """
    Steps and sources that lead nowhere are left alone.
    """
    made = plan(space, '[step.unused]\nformula = "C"\nartifact = false\n[step.mix]\nformula = "A + B"\n')
    assert ["mix"] == list(made.steps)
    assert ["A", "B"] == list(made.sources)


def test_only_picks_artifacts_and_what_they_need(space: Space):
    """
    Whatever else the recipe makes is not planned; the order asked for does not matter.
    """
    text = DIAMOND + '[step.other]\nformula = "C"\n[step.third]\nformula = "A"\n'
    made = plan(space, text, only=["third", "top"])
    assert ("top", "third") == made.wanted
    assert ["base", "right", "left", "top", "third"] == list(made.steps)
    assert ["A", "B"] == list(made.sources)


@pytest.mark.parametrize(
    ("wish", "what", "hint"),
    [
        ("tpo", "there is no step `tpo`", "did you mean `top`?"),
        ("A", "there is no step `A`", ""),
        ("base", "step `base` is not an artifact: other steps use it", "write `artifact = true` in it to keep its result as a file"),
    ],
)
def test_only_asks_for_artifacts(space: Space, wish: str, what: str, hint: str):
    """
    A wish for something that is not kept says why it is not.
    """
    assert [(what, hint)] == [(issue.what, issue.hint) for issue in issues_of(space, DIAMOND, only=[wish])]


def test_a_step_that_asks_not_to_be_kept_is_not_said_to_be_used(space: Space):
    """
    A wish for a step with `artifact = false` that nothing uses names the true reason.
    """
    text = '[step.mix]\nformula = "A"\n[step.aside]\nformula = "B"\nartifact = false\n'
    [issue] = issues_of(space, text, only=["aside"])
    assert "other steps use it" not in issue.what


def test_defaults_apply_where_a_step_says_nothing(space: Space):
    """
    A step's own word counts first, then the recipe's, then sdbuild's.
    """
    defaults = """
[defaults]
dtype = "bf16"
compute = "fp64"
missing = "keep"
extra = "drop"
mismatch = "keep"
nonfinite = "allow"
author = "Estrilda"
license = "CreativeML-OpenRAIL-M"
"""
    plain = one(space, '[step.mix]\nformula = "A"\n')
    assert ("F16", "fp32", "error", "error", "error", "error") == policies(plain)
    assert {} == plain.about
    assert "mix" == plain.title

    told = one(space, '[step.mix]\nformula = "A"\n', head=HEAD + defaults)
    assert ("BF16", "fp64", "keep", "drop", "keep", "allow") == policies(told)
    assert {"author": "Estrilda", "license": "CreativeML-OpenRAIL-M"} == told.about

    own = 'dtype = "keep"\ncompute = "native"\nmissing = "error"\nextra = "keep"\nauthor = "Meina"\ntitle = "Mix 3"\n'
    says = one(space, f'[step.mix]\nformula = "A"\n{own}', head=HEAD + defaults)
    assert ("keep", "native", "error", "keep", "keep", "allow") == policies(says)
    assert "Meina" == says.about["author"]
    assert "Mix 3" == says.title


def policies(step: Step) -> tuple[str, ...]:
    """List what a step says of numbers and of tensors that do not fit."""
    return str(step.dtype), step.compute, step.missing, step.extra, step.mismatch, step.nonfinite


@pytest.mark.parametrize(
    ("line", "dtype"),
    [("", "F32"), ('dtype = "fp16"', "F16"), ('dtype = "keep"', "keep"), ("artifact = true", "BF16"), ('artifact = true\ndtype = "fp64"', "F64")],
)
def test_steps_that_are_not_kept_stay_float32(space: Space, line: str, dtype: str):
    """
    The defaults' dtype is for artifacts; a step in between is rounded only when it says so itself.
    """
    head = HEAD + '[defaults]\ndtype = "bf16"\n'
    made = plan(space, f'[step.base]\nformula = "A + B"\n{line}\n[step.mix]\nformula = "0.5 * base"\n', head=head)
    assert dtype == str(made.steps["base"].dtype)
    assert "BF16" == str(made.steps["mix"].dtype)


def test_a_formula_is_a_method_over_the_names_it_reads(space: Space):
    """
    Its inputs are named once each, in reading order; keys see places and not names.
    """
    step = one(space, '[step.mix]\nformula = "B + 0.5 * (A - B)"\n')
    assert ("B", "A") == step.inputs
    assert ("1", "2") == step.roles
    assert {"formula": "[1] + 0.5 * ([2] - [1])"} == step.params
    assert 15.0 == step.method.function(10.0, 20.0, formula="")


def test_a_method_gets_its_models_in_its_own_order(space: Space):
    """
    The order of fields in the table does not matter.
    """
    step = one(space, '[step.mix]\nmethod = "add_difference"\nalpha = 0.8\nc = "C"\na = "B"\nb = "A"\n')
    assert ("B", "A", "C") == step.inputs
    assert ("a", "b", "c") == step.roles
    assert {"alpha": Ratio(base=0.8, blocks={})} == step.params


def test_parameters_have_the_defaults_of_their_method(space: Space):
    """
    What a step does not say, the method's signature does.
    """
    assert {"alpha": Ratio(base=0.5, blocks={})} == one(space, '[step.mix]\nmethod = "weighted_sum"\na = "A"\nb = "B"\n').params
    assert {"pick": ("*",), "drop": ()} == one(space, '[step.mix]\nmethod = "copy"\na = "A"\n').params


def test_linear_takes_a_ratio_per_model(space: Space):
    """
    Weights are numbers or tables, one for each model; a model may be named twice.
    """
    step = one(space, '[step.mix]\nmethod = "linear"\nmodels = ["B", "A", "B"]\nweights = [1, { base = 0.5, blocks = { IN04 = 0 } }, -1]\n')
    assert ("B", "A", "B") == step.inputs
    assert ("1", "2", "3") == step.roles
    assert (Ratio(base=1.0, blocks={}), Ratio(base=0.5, blocks={"IN04": 0.0}), Ratio(base=-1.0, blocks={})) == step.params["weights"]


def test_linear_needs_a_model(space: Space):
    """
    A sum of nothing has no tensors; it is refused before anything is read.
    """
    issues = issues_of(space, '[step.mix]\nmethod = "linear"\nmodels = []\nweights = []\n')
    assert "models" in issues[0].what


@pytest.mark.parametrize(
    "models",
    ['models = ["A", "X"]', 'models = "A"', ""],
    ids=["a model that is unknown", "models that are no list", "no models"],
)
def test_weights_are_not_blamed_for_bad_models(space: Space, models: str):
    """
    When the models are wrong, how many weights there should be is not known, and nothing is said of it.
    """
    issues = issues_of(space, f'[step.mix]\nmethod = "linear"\n{models}\nweights = [0.5, 0.5]\n')
    assert [] == [issue.what for issue in issues if "weights" in issue.what]


@pytest.mark.parametrize(
    ("line", "pick"),
    [('pick = "unet"', ("unet",)), ('pick = ["vae", "unet", "vae"]', ("unet", "vae")), ('pick = ["*.attn2.*"]', ("*.attn2.*",))],
)
def test_a_selection_is_a_set_of_components_and_globs(space: Space, line: str, pick: tuple[str, ...]):
    """
    One or several, in any order, each counted once.
    """
    assert pick == one(space, f'[step.unet]\nmethod = "copy"\na = "A"\n{line}\n').params["pick"]


def test_every_problem_is_told_at_once_in_file_order(space: Space):
    """
    What does not resolve is gathered over the whole recipe and told from top to bottom.
    """
    text = """
[step.one]
method = "wieghted_sum"
[step.two]
formula = "A + Z"
[step.three]
method = "weighted_sum"
a = "Y"
b = "B"
alpha = "half"
[step.four]
formula = "four"
[source.D]
credit = "nobody"
"""
    path = space.path / "recipe.toml"
    expected = [11, 13, 16, 18, 19, 21]
    assert expected == [int(issue.where.removeprefix(f"{path}:")) for issue in issues_of(space, text)]


def test_many_undefined_names_are_all_told(space: Space):
    """
    A recipe full of mistakes has every one of them told.
    """
    issues = issues_of(space, "".join(f'[step.s{n}]\nformula = "A + x{n}"\n' for n in range(1500)))
    assert 1500 == len(issues)


def test_a_whole_number_beyond_floats_is_a_mistake_in_the_recipe(space: Space):
    """
    TOML reads integers of hundreds of digits; as a ratio they are refused with their line.
    """
    [issue] = issues_of(space, f'[step.mix]\nmethod = "weighted_sum"\na = "A"\nb = "B"\nalpha = {"9" * 400}\n')
    assert f"{space.path / 'recipe.toml'}:13" == issue.where


def test_mistakes_of_form_and_of_meaning_are_told_together(space: Space):
    """
    Unknown fields and words do not hide names, methods and formulas that mean nothing.
    """
    text = HEAD + (
        '[defaults]\ndtypes = "fp16"\n[step.one]\nformula = "A + Q"\ndtype = "fp17"\n'
        '[step.two]\nmethod = "wieghted_sum"\na = "A"\n[step.three]\nmethod = "weighted_sum"\na = "A"\nalpha = 0.5\n'
    )
    with pytest.raises(RecipeError) as caught:
        plan_file(space.write("recipe.toml", text))
    told = "\n".join(issue.what for issue in caught.value.issues)

    for mistake in ("unknown field `dtypes`", "names `Q`", "`dtype` is 'fp17'", "method `wieghted_sum`, which does not exist", "`three` lacks `b`"):
        assert mistake in told


@pytest.mark.parametrize(
    ("step", "what", "hint"),
    [
        ('method = "ties"\nbase = "A"\nmodels = ["A", "B"]\ndensity = 1', "names `A` as `base` and among `models`", "mergekit does so by itself"),
        ('method = "dare_ties"\nbase = "A"\nmodels = ["B"]', "asks for method `dare_ties`, which does not exist", "see `sdbuild methods dare`"),
        ('method = "ties"\nbase_model = "A"\nmodels = ["B"]\ndensity = 1', "unknown field `base_model`", "here it is `base`"),
        ('merge_method = "ties"', "needs either `formula` or `method`", "`merge_method` is `method` here"),
        ('method = "slerp"\na = "A"\nb = "B"\nt = 0.3', "unknown field `t`", "here it is `alpha`"),
        ('method = "slerp"\na = "A"\nb = "B"\nalpha = [0.5, 0.3]', "which is not a finite number", "curve = [0.2, 0.8]"),
    ],
)
def test_words_of_other_tools_lead_to_ours(space: Space, step: str, what: str, hint: str):
    """
    What people bring from mergekit or another merger is answered with the word that is used here.
    """
    with pytest.raises(RecipeError) as caught:
        plan(space, f"[step.mix]\n{step}\n")

    assert what in str(caught.value)
    assert hint in str(caught.value)


def test_a_model_may_bound_itself(space: Space):
    """
    Only a base is not a model among others: `clamp` keeps a model between itself and another.
    """
    made = plan(space, '[step.mix]\nmethod = "clamp"\na = "A"\nmodels = ["A", "B"]\n')

    assert made.steps["mix"].inputs == ("A", "A", "B")
