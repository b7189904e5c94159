"""Methods of one's own: a Python file that a recipe names, or an installed package."""

from __future__ import annotations

import hashlib
import os

import pytest
from conftest import Space

from sdmerge_build.errors import RecipeError

FILE = '''
from sdmerge_build.methods import Ratio, method

@method(version=1)
def soft_mix(a, b, /, *, alpha: Ratio = 0.5):
    """Mix two models, less where they differ more: `a + alpha * d / (1 + |d|)`, `d = b - a`."""
    d = b - a
    return a + d * alpha / (1 + d.abs())
'''

RECIPE = """
recipe = 1
architecture = "sd1"
methods = [{methods}]
[source.A]
path = "A.safetensors"
[source.B]
path = "B.safetensors"
[step.mix]
method = "soft_mix"
a = "A"
b = "B"
alpha = {{ base = 0.5, blocks = {{ "OUT*" = 0.25 }} }}
"""
PIN = '{{ path = "mine.py", sha256 = "{}" }}'


@pytest.fixture
def own(space: Space) -> Space:
    """Provide a recipe with a method of its own."""
    space.pair(RECIPE.format(methods='"mine.py"'), every=40)
    space.write("mine.py", FILE)
    return space


def key(space: Space) -> str:
    return space.build().wishes[0].tensor_key


def test_a_method_of_a_file_is_a_method_like_any_other(own: Space):
    """
    It takes ratios per block, is skipped when nothing changed, and its result is its formula's.
    """
    own.build()
    from safetensors.torch import load_file

    a, b = (load_file(own.path / f"{name}.safetensors") for name in "AB")
    mix = own.load("mix")
    for name, tensor in mix.items():
        if tensor.is_floating_point():
            d = b[name].float() - a[name].float()
            alpha = 0.25 if "output_blocks" in name or ".out." in name else 0.5
            assert tensor.equal((a[name].float() + d * alpha / (1 + d.abs())).half()), name

    assert [wish.state.value for wish in own.build().wishes] == ["reused"]


def test_the_content_of_the_file_is_in_the_key_and_its_name_is_not(own: Space):
    """
    Another line is another key; another file name, or a pin, is not.
    """
    first = key(own)
    own.write("mine.py", FILE + "# a comment\n")
    second = key(own)
    own.write("elsewhere/other.py", FILE)
    own.write("recipe.toml", RECIPE.format(methods='"elsewhere/other.py"'))
    third = key(own)
    own.write("mine.py", FILE)
    own.write("recipe.toml", RECIPE.format(methods=PIN.format(hashlib.sha256(FILE.encode()).hexdigest().upper())))

    assert first != second
    assert first == third == key(own)


def test_locked_runs_only_files_that_are_pinned(own: Space):
    """
    `--locked` refuses a file without a digest before it is run; a pinned one that was changed is not what it claims to be.
    """
    own.write("mine.py", FILE + "\nopen('ran', 'w')\n")
    assert own.sdbuild("lock", "recipe.toml").returncode == 0
    (own.path / "ran").unlink()
    run = own.sdbuild("recipe.toml", "--locked")
    assert run.returncode == 2, run.stderr
    assert "the methods of `mine.py` are not pinned, and --locked asks for it" in run.stderr
    assert hashlib.sha256((own.path / "mine.py").read_bytes()).hexdigest() in run.stderr
    assert "which does not exist" not in run.stderr
    own.write("recipe.toml", RECIPE.format(methods=PIN.format("0" * 64)))
    run = own.sdbuild("recipe.toml")
    assert run.returncode == 4, run.stderr
    assert "`mine.py` has sha256" in run.stderr
    assert not (own.path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit(0)\n", "`mine.py` cannot be run: SystemExit"),
        ("def f(:\n", "`mine.py` cannot be run: SyntaxError:1:"),
        ("\n\n1 / 0\n", "`mine.py` cannot be run: ZeroDivisionError:3: division by zero"),
        ("x = 1\n", "`mine.py` defines no method"),
        (FILE.replace("soft_mix", "weighted_sum"), "`mine.py` defines `weighted_sum`, which is built in"),
        (FILE.replace("Ratio = 0.5", "Number = 0.5"), "`mine.py` cannot be run: TypeError"),
        (FILE.replace("version=1", "version=1, cut='sideways'"), "`mine.py` cannot be run: ValueError"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(own: Space, text: str, message: str):
    """
    No traceback for a user's mistake: the file, the line in it, and what Python says.
    """
    own.write("mine.py", text)
    with pytest.raises(RecipeError) as caught:
        own.build()

    assert message in str(caught.value)
    assert "recipe.toml:4" in str(caught.value)


def test_a_file_that_is_not_there_is_an_error(own: Space):
    """
    A missing file is named, with where it was looked for.
    """
    (own.path / "mine.py").unlink()
    with pytest.raises(RecipeError, match=r"`mine\.py` cannot be read: No such file"):
        own.build()


@pytest.mark.parametrize("body", ["return a[:3]", "return 5", "return a.nonsense()", "return a.mean()"])
def test_a_method_that_does_not_do_what_it_should_is_named(own: Space, body: str):
    """
    A result of another shape, no tensor, or an exception: the method, the tensor, and what happened.
    """
    own.write("mine.py", FILE.replace("return a + d * alpha / (1 + d.abs())", body))
    run = own.sdbuild("recipe.toml")

    assert run.returncode == 1, run.stderr
    assert "method `soft_mix` fails on tensor `" in run.stderr
    assert "elements" in run.stderr or "in line 8" in run.stderr or "no attribute 'reshape'" in run.stderr
    assert "Traceback" not in run.stderr


def test_packages_offer_methods_by_an_entry_point(own: Space):
    """
    An installed package's method needs no file in the recipe; `sdbuild methods` lists it; its version is in the key.
    """
    own.write("site/extras.py", FILE)
    own.write("site/extras-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: extras\nVersion: 1.0\n")
    own.write("site/extras-1.0.dist-info/entry_points.txt", "[sdbuild.methods]\nextras = extras\n")
    own.write("recipe.toml", RECIPE.format(methods=""))
    env = {"PYTHONPATH": os.pathsep.join([str(own.path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])}

    assert "soft_mix(a, b, alpha)" in own.sdbuild("methods", "soft_mix", env=env).stdout
    [made] = own.reports("recipe.toml", env=env)
    assert made["state"] == "built"
    assert "method `soft_mix`, which does not exist" in own.sdbuild("recipe.toml").stderr
