"""Measures: what a method asks of a whole tensor is the same for every slicing, thread count and CPU, and right."""

from __future__ import annotations

import math
from fractions import Fraction

import applied
import checkpoints
import pytest
import torch
from conftest import Space
from hypothesis import given, settings
from hypothesis import strategies as st

from sdmerge_build import passes, programs
from sdmerge_build.errors import SdbuildError
from sdmerge_build.methods import collecting, method, methods
from sdmerge_build.methods.lanes import added_up, compiled
from sdmerge_build.methods.measures import CHUNK, Partials, answer_alone, columns, count, dot, gram, kth, least, most, row_sums, total

NUMBERS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6), min_size=1, max_size=300)


def answers(*measures):
    """Answer measures of a tensor that is one chunk."""
    return answer_alone(0, measures)


@settings(deadline=None)
@given(NUMBERS)
def test_a_sum_is_the_exact_sum_of_its_terms_rounded(numbers):
    """
    Up to the last bits that additions in a fixed order leave, a sum is that of exact fractions; of products too.
    """
    x = torch.tensor(numbers, dtype=torch.float32)
    exact = sum(Fraction(n) for n in x.tolist())
    squares = sum(Fraction(n) ** 2 for n in x.tolist())
    scale = float(sum(abs(Fraction(n)) for n in x.tolist()))

    [plain, product] = answers(total(x), dot(x, x))

    assert plain == pytest.approx(float(exact), rel=0, abs=1e-14 * scale)
    assert product == pytest.approx(float(squares), rel=1e-14)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000, CHUNK - 1, CHUNK])
def test_a_gram_matrix_holds_the_dot_products_of_each_two(count):
    """
    All at once they are to the last bit what each would be alone, and nothing that was asked about is changed.
    """
    vectors = [checkpoints.numbers(letter, "w", (count,), torch.float64) for letter in "ABC"]
    before = [vector.clone() for vector in vectors]

    [found] = answers(gram(*vectors))

    assert found == tuple(tuple(answers(dot(x, y))[0] for y in vectors) for x in vectors)
    assert all(torch.equal(x, y) for x, y in zip(vectors, before, strict=True))
    assert answers(total(vectors[0]))[0] == pytest.approx(math.fsum(vectors[0].tolist()), rel=1e-12)
    assert torch.equal(vectors[0], before[0])


@settings(max_examples=60, deadline=None)
@given(NUMBERS, st.data())
def test_an_order_statistic_is_that_of_sorting(numbers, data):
    """
    The k-th smallest is what sorting would find, in every dtype.
    """
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    x = torch.tensor(numbers, dtype=torch.float32).clamp(-60000, 60000).to(dtype).abs()
    rank = data.draw(st.integers(1, len(x)))

    measure, expected = kth(x, rank), torch.sort(x).values[rank - 1].item()
    final, found = False, None
    while not final:
        final, found = measure.joined(measure.added(measure.partial(found), torch.zeros(1 << 16, dtype=torch.int64)), found)

    assert answers(measure) == (expected,)  # looked through
    assert found == expected  # counted digit by digit


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(width=32, allow_nan=False)] * 2), min_size=1, max_size=2000))
def test_sums_of_products_of_float32_are_rounded_as_if_products_were_rounded_first(pairs):
    """
    Whether a CPU adds a product with one rounding or two cannot be seen: the product of two float32 numbers is exact in float64.
    """
    x, y = (torch.tensor(numbers, dtype=torch.float32) for numbers in zip(*pairs, strict=True))

    assert answers(dot(x, y)) == pytest.approx(answers(dot(x.double(), y.double())), rel=0, abs=0, nan_ok=True)
    assert all(float(a) * float(b) == Fraction(a) * Fraction(b) for a, b in pairs if math.isfinite(a) and math.isfinite(b))


@pytest.mark.parametrize("count", [1, 300, 32_768, 32_769, CHUNK])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_the_same_with_and_without_torchscript(count, dtype):
    """
    What runs without Python's lock is what is written in Python, bit for bit.
    """
    x, y = (checkpoints.numbers(letter, "w", (count,), dtype) for letter in "AB")
    pairs = [(0, 0), (0, 1), (1, -1)]

    assert compiled() is not added_up
    assert compiled()([x, y], pairs, 1 << 15, 256).equal(added_up([x, y], pairs, 1 << 15, 256))


def test_sums_over_several_chunks_stay_what_they_are():
    """
    What changes these numbers changes what methods make of large tensors: the versions of those that ask for sums go up with them.
    """
    x, y = (checkpoints.numbers(letter, "w", (900, 1024), torch.float32) for letter in "AB")
    answered = []

    with collecting() as own:

        @method(version=1, cut="filters")
        def summed(a, b, /):
            """Ask for sums of every kind."""
            answered.append((yield total(a), dot(a, b), gram(a, b), columns(a, b)))
            return a

    applied.evaluate(own["summed"], [x, y], {})

    plain, product, ((aa, ab), (_, bb)), down = answered[0]
    assert [number.hex() for number in (plain, product, aa, ab, bb, *down[:2].tolist())] == [
        "0x1.9f945b8afc000p+4",
        "-0x1.c2f90b0589173p+1",
        "0x1.31e9d9172f438p+12",
        "-0x1.c2f90b0589173p+1",
        "0x1.31de712361a7fp+12",
        "0x1.aeca32a0a75a0p-3",
        "0x1.8b98c82e4514cp-2",
    ]


@given(st.integers(1, 40), st.randoms(use_true_random=False))
def test_vectors_of_chunks_are_added_in_one_order_whichever_comes_first(chunks, random):
    """
    Sums over columns do not depend on which chunk was measured first, and few of them are kept.
    """
    x = checkpoints.numbers("A", "w", (3 * chunks, 7), torch.float32)
    measures = [columns(part, part) for part in x.chunk(chunks)]

    def gathered(order):
        known = Partials(chunks)
        for number in order:
            known.add(measures[number], number, measures[number].partial(None))
            assert order != range(chunks) or len(known._known) <= chunks.bit_length()
        return known.joined(measures[0], None)[1].tolist()

    assert gathered(random.sample(range(chunks), chunks)) == gathered(range(chunks))


def test_counts_and_extremes():
    """
    A count counts what is true; the extremes of a tensor with a NaN are NaN.
    """
    x = torch.tensor([3.0, -2.0, 7.5])

    assert answers(count(x > 0), least(x), most(x)) == (2, -2.0, 7.5)
    assert math.isnan(answers(most(torch.tensor([1.0, math.nan])))[0])


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (7, 3), (64, 33)])
def test_rows_and_columns_are_summed(shape):
    """
    Sums along rows and down columns are those of exact fractions, as far as float64 goes.
    """
    x = checkpoints.numbers("A", "w", shape, torch.float32)
    rows = [float(sum(Fraction(n) for n in row)) for row in x.tolist()]
    down = [float(sum(Fraction(n) ** 2 for n in column)) for column in x.t().tolist()]

    assert row_sums(x).tolist() == pytest.approx(rows, rel=1e-13, abs=1e-15)
    assert answers(columns(x, x))[0].tolist() == pytest.approx(down, rel=1e-13)


with collecting() as OWN:

    @method(version=1)
    def centred(a, /):
        """Scale by the median magnitude, after taking the mean away: two questions, the second about an answer."""
        mean = (yield total(a)) / 300_007
        middle, size = yield kth((a - mean).abs(), 150_000), dot(a - mean, a - mean)
        return (a - mean) * (1 / middle) * (1 / math.sqrt(size))

    @method(version=1, cut="filters")
    def by_column(a, /):
        """Divide by the sums of squares of the columns."""
        return a / (yield columns(a, a)).to(a.dtype)


@pytest.mark.parametrize(("name", "shape"), [("centred", (300_007,)), ("by_column", (900, 1024))])
@pytest.mark.parametrize("slice_size", [CHUNK, 40_000, 8 * 1024 + 8])
def test_what_is_asked_of_a_tensor_does_not_depend_on_how_it_is_cut(name, shape, slice_size):
    """
    A tensor of several chunks gives the same bits for every size of slice.
    """
    a = checkpoints.numbers("A", "w", shape, torch.float32)
    whole = applied.evaluate(OWN[name], [a], {})

    assert applied.evaluate(OWN[name], [a], {}, slice_size=slice_size).equal(whole)


METHODS = '''
from sdmerge_build.methods import Place, Ratio, method

@method(version=1)
def centred(a, b, /, *, alpha: Ratio = 0.5):
    """Ask twice: for a sum, and for a median of what the sum changes."""
    from sdmerge_build.methods.measures import dot, kth, total
    mean, size = yield total(a), dot(a, b)
    middle = yield kth((a - mean / 100_000).abs(), 1)
    return a * (1 - alpha) + b * (alpha * size) + middle

@method(version=1, cut="rows")
def rows(a, /):
    """Divide rows by their sums."""
    from sdmerge_build.methods.measures import row_sums
    return a / row_sums(a.abs()).to(a.dtype).unsqueeze(1)

@method(version=1, cut="filters")
def filters(a, /):
    """Multiply by sums over columns."""
    from sdmerge_build.methods.measures import columns
    return a * (yield columns(a, a)).to(a.dtype)

@method(version=1, cut="nowhere")
def whole(a, /):
    """Turn a tensor round in every dimension."""
    return a.flip(tuple(range(a.ndim)))

@method(version=1)
def placed(a, /, *, place: Place):
    """Add to every element its position, in millionths."""
    import torch
    return a + torch.arange(place.start, place.start + place.count, dtype=a.dtype) * 1e-6
'''

RECIPE = """
recipe = 1
architecture = "generic"
methods = ["own.py"]
[defaults]
dtype = "fp32"
[source.A]
path = "A.safetensors"
[source.B]
path = "B.safetensors"
[step.first]
method = "centred"
a = "A"
b = "B"
artifact = true
[step.second]
method = "rows"
a = "nested"
[step.third]
method = "filters"
a = "nested"
artifact = true
[step.fourth]
method = "whole"
a = "third"
[step.fifth]
method = "placed"
a = "whole-of-B"
[step.whole-of-B]
method = "whole"
a = "B"
[step.sixth]
method = "smooth_add"
a = "third"
b = "nested"
c = "A"
artifact = true
[step.seventh]
method = "smooth_add"
a = "B"
b = "A"
c = "sixth"
[step.nested]
method = "centred"
a = "B"
b = "unkept"
alpha = 0.25
[step.unkept]
formula = "0.5 * A + 0.5 * B"
"""

SHAPES = {"big.weight": (700, 513), "conv.weight": (40, 70, 3, 3), "vector": (200_003,), "small": (5, 7), "one": (1,), "scalar": ()}


def lay_down(space: Space) -> dict[str, dict[str, torch.Tensor]]:
    models = {m: {name: checkpoints.numbers(m, name, shape, torch.float32) + 0.01 for name, shape in SHAPES.items()} for m in "AB"}
    for name, tensors in models.items():
        space.checkpoint(name, tensors)
    space.write("own.py", METHODS)
    space.write("recipe.toml", RECIPE)
    return models


def test_the_engine_gives_measured_methods_what_whole_tensors_would(space: Space):
    """
    Steps on steps that ask about whole tensors, see rows, filters, neighbours, or everything, have the bits of evaluating whole tensors one by one.
    """
    from sdmerge_build.methods.own import methods_in

    models = lay_down(space)
    space.build()
    own = methods_in(space.path / "own.py", None)
    for name in SHAPES:
        a, b = models["A"][name], models["B"][name]
        first = applied.evaluate(own["centred"], [a, b], {}, name=name)
        nested = applied.evaluate(own["centred"], [b, a * 0.5 + b * 0.5], {"alpha": 0.25}, name=name)
        third = applied.evaluate(own["filters"], [nested], {}, name=name)
        assert space.load("first")[name].equal(first), name
        assert space.load("second")[name].equal(applied.evaluate(own["rows"], [nested], {}, name=name)), name
        assert space.load("third")[name].equal(third), name
        assert space.load("fourth")[name].equal(applied.evaluate(own["whole"], [third], {}, name=name)), name
        turned = applied.evaluate(own["whole"], [b], {}, name=name)
        assert space.load("fifth")[name].equal(applied.evaluate(own["placed"], [turned], {}, name=name)), name
        sixth = applied.evaluate(methods()["smooth_add"], [third, nested, a], {}, name=name)
        assert space.load("sixth")[name].equal(sixth), name
        assert space.load("seventh")[name].equal(applied.evaluate(methods()["smooth_add"], [b, a, sixth], {}, name=name)), name


@pytest.mark.parametrize(("slice_", "batch", "jobs"), [(10_000, 30_000, 3), (1 << 20, 1 << 22, 1)])
def test_measured_methods_do_not_depend_on_slices_and_threads(space: Space, monkeypatch, slice_, batch, jobs):
    """
    Artifacts have one sha256 whatever is worked on at once, and by however many.
    """
    lay_down(space)
    usual = {wish.step.name: wish.stored.sha256 for wish in space.build().wishes}
    monkeypatch.setattr(programs, "SLICE", slice_)
    monkeypatch.setattr(programs, "_REACHING", slice_)
    monkeypatch.setattr(passes, "BATCH", batch)
    again = space.build(store=space.path / "other", out=space.path / "other-out", jobs=jobs)

    assert {wish.step.name: wish.stored.sha256 for wish in again.wishes} == usual


def test_a_method_that_fails_ends_the_build_and_not_in_a_wait(space: Space):
    """
    When a method raises while others wait for its measures, the build ends with the error, and nothing is left behind.
    """
    lay_down(space)
    space.write("own.py", METHODS.replace("return a * (yield", "1 / 0\n    return a * (yield"))
    with pytest.raises(SdbuildError) as caught:
        space.build(jobs=3)

    assert "method `filters` fails on tensor `" in str(caught.value)
    assert "ZeroDivisionError: division by zero" in str(caught.value)
    assert list((space.path / "cache" / "partial").iterdir()) == []


def digest_of(report, name: str) -> tuple[str, str]:
    """Return an artifact's tensor key and the digest of its tensors."""
    [wish] = [wish for wish in report.wishes if wish.step.name == name]
    return wish.tensor_key, wish.stored.tensor_digest


def test_a_sum_does_not_depend_on_what_else_is_made_in_the_pass(space: Space):
    """
    A step has the bytes of its key, alone or beside one whose method cuts the same tensor elsewhere.
    """
    for name in "AB":
        space.checkpoint(name, {"v": checkpoints.numbers(name, "v", (700, 1000), torch.float64)})
    head = (
        RECIPE.split("[step.first]", maxsplit=1)[0]
        .replace('dtype = "fp32"', 'dtype = "fp64"\ncompute = "fp64"')
        .replace('methods = ["own.py"]\n', "")
    )
    one = '[step.X]\nmethod = "slerp"\na = "A"\nb = "B"\nalpha = 0.3\n'
    other = '[step.Y]\nmethod = "nuslerp_rows"\na = "A"\nb = "B"\nalpha = 0.3\n[step.Z]\nmethod = "add_cosine_b"\na = "A"\nb = "B"\n'
    space.write("recipe.toml", head + one)
    alone = digest_of(space.build(), "X")
    space.write("recipe.toml", head + one + other)
    beside = digest_of(space.build(store=space.path / "other", out=space.path / "other-out"), "X")

    assert alone == beside


UNEVEN = """
from sdmerge_build.methods import Ratio, method

@method(version=1)
def uneven(a, b, /, *, alpha: Ratio = 0.5):
    \"\"\"Ask only where models differ.\"\"\"
    from sdmerge_build.methods.measures import dot
    if (a == b).all():
        return a
    size = yield dot(a - b, a - b)
    return a + (b - a) * alpha * size

@method(version=1)
def careless(a, b, /):
    \"\"\"Change a model that others read too.\"\"\"
    return a.mul_(2).add_(b)
"""


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("equal", [0, 1, 2])
def test_a_method_that_asks_on_some_slices_only_is_refused(space: Space, jobs, equal):
    """
    One that returns early where a slice has nothing to do would get another slice's answers, or none: an error, whichever slice it is.
    """
    a, b = (checkpoints.numbers(name, "v", (3 * CHUNK,), torch.float32) for name in "AB")
    b[equal * CHUNK : (equal + 1) * CHUNK] = a[equal * CHUNK : (equal + 1) * CHUNK]
    space.checkpoint("A", {"v": a})
    space.checkpoint("B", {"v": b})
    space.write("own.py", UNEVEN)
    space.write("recipe.toml", RECIPE.split("[step.first]", maxsplit=1)[0] + '[step.X]\nmethod = "uneven"\na = "A"\nb = "B"\n')
    with pytest.raises(SdbuildError, match="returns without asking on others"):
        space.build(jobs=jobs)


def test_a_method_that_changes_its_models_changes_nobody_elses(space: Space):
    """
    What a careless method does to the tensors it is given, other steps over the same sources do not see.
    """
    lay_down(space)
    space.write("own.py", UNEVEN)
    head = RECIPE.split("[step.first]", maxsplit=1)[0]
    plain = '[step.X]\nmethod = "weighted_sum"\na = "A"\nb = "B"\nalpha = 0.3\n'
    space.write("recipe.toml", head + plain)
    alone = digest_of(space.build(), "X")
    space.write("recipe.toml", head + '[step.A1]\nmethod = "careless"\na = "A"\nb = "B"\n' + plain)

    assert digest_of(space.build(store=space.path / "other", out=space.path / "other-out"), "X") == alone


def test_empty_tensors_are_nothing_to_ask_about(space: Space):
    """
    A tensor without elements goes through measured, surveyed and uncut methods, and hangs none.
    """
    for name in "AB":
        space.checkpoint(name, {"e": torch.zeros(0, 5), "v": checkpoints.numbers(name, "v", (6, 5), torch.float32)})
    head = RECIPE.split("[step.first]", maxsplit=1)[0].replace('methods = ["own.py"]\n', "")
    steps = [
        f'[step.X{n}]\nmethod = "{name}"\na = "A"\nb = "B"\n{more}\n'
        for n, (name, more) in enumerate(
            [("slerp", ""), ("cosine_a", "alpha = 0.1"), ("add_cosine_b", ""), ("nuslerp_rows", ""), ("top_k_tensor_sum", "")]
        )
    ]
    space.write("recipe.toml", head + "".join(steps))
    space.build()

    assert [space.load(f"X{n}")["e"].shape for n in range(5)] == [(0, 5)] * 5
