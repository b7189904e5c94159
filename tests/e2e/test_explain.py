"""Block weights as the real command shows them: what a recipe's ratios are in every block, and what blocks there are."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest
from conftest import PAIR, Space

WEIGHTED = PAIR.replace(
    'formula = "0.3 * A + 0.7 * B"',
    'artifact = false\nmethod = "weighted_sum"\na = "A"\nb = "B"\n'
    'alpha = { preset = "GRAD_V", blocks = { VAE = 1.0 }, elemental = "IN04-IN05:attn:0.25", rules = [{ match = "*.bias", value = 0.5 }] }\n\n'
    '[step.final]\nformula = "0.9 * mix + 0.1 * A"',
)


def test_explain_draws_the_weights_of_every_step(space: Space):
    """
    Steps between are drawn too; the last line is still the summary, and a run without --explain draws nothing.
    """
    space.pair(WEIGHTED)
    shown = space.sdbuild("recipe.toml", "--explain").stdout.splitlines()
    silent = space.sdbuild("recipe.toml", "--dry-run").stdout

    at = shown.index("alpha of `mix`:")
    assert shown[at + 1 : at + 4] == ["    BASE           0", "      VAE          1  " + "#" * 40, "    IN00           1  " + "#" * 40]
    assert "    elemental  IN04-IN05:attn:0.25" in shown
    assert "    rule  *.bias = 0.5" in shown
    assert shown[0].startswith("final  built")
    assert shown[-1].startswith("1 built in ")
    assert "alpha of" not in silent


def test_explain_as_json_has_every_value(space: Space):
    """
    A program gets the value of every block; without --explain it gets no ratios.
    """
    space.pair(WEIGHTED)
    [report] = json.loads(space.sdbuild("recipe.toml", "--dry-run", "--explain", "--json").stdout)["reports"]
    [plain] = json.loads(space.sdbuild("recipe.toml", "--dry-run", "--json").stdout)["reports"]

    [ratio] = report["ratios"]
    assert (ratio["step"], ratio["parameter"], ratio["parts"]) == ("mix", "alpha", {"VAE": 1.0})
    assert list(ratio["blocks"].values()) == [0.0, *(float(abs(n - 12)) / 12 for n in range(25))]
    assert "ratios" not in plain


def test_a_terminal_gets_bars_of_its_width(space: Space):
    """
    On a terminal bars are blocks, and lines are no longer than it is wide.
    """
    space.pair(WEIGHTED)
    leader, follower = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "40", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "sdmerge_build", "build", "recipe.toml", "--dry-run", "--explain"]
    child = subprocess.Popen(command, cwd=space.path, stdout=follower, stderr=subprocess.DEVNULL, env=env)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    child.wait(timeout=60)
    os.close(leader)

    lines = [line.rstrip() for line in shown.decode().splitlines()]
    longest = next(line for line in lines if line.startswith("    IN00"))
    assert child.returncode == 0
    assert "█" in longest
    assert "#" not in longest
    assert 30 < len(longest) <= 40


def test_a_word_that_no_tensor_has_is_refused(space: Space):
    """
    An element that no tensor's name holds is a slip of the pen, as a rule that matches nothing is.
    """
    space.pair(WEIGHTED.replace("IN04-IN05:attn:", "IN04-IN05:atn:"))
    run = space.sdbuild("recipe.toml", "--dry-run")

    assert run.returncode == 2
    assert "has in `alpha` an elemental entry for `atn`, which matches no tensor" in run.stderr


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("sd1", ["Stable Diffusion 1.x", "IN00      model.diffusion_model.input_blocks.0.*", "  TIME    model.diffusion_model.time_embed.*"]),
        ("sd1", ["mbw of 26 values (mbw):", "  sd-mecha@1      TIME follows BASE", "curve over 25 layers, IN00 to OUT11"]),
        ("sdxl", ["mbw of 110 values (deep):", "  written there as", "  chattiori@1     TIME is not merged, LABEL is not merged"]),
        ("sd3/3.5-large", ["Stable Diffusion 3.5 Large", "J37       model.diffusion_model.joint_blocks.37.*", "curve over 38 layers, J00 to J37"]),
        ("generic", ["any safetensors file", "no blocks: ratios are numbers, or tables with `base`, `elemental` and `rules`"]),
    ],
)
def test_methods_lists_the_blocks_of_an_architecture(space: Space, name: str, lines: list[str]):
    """
    Blocks in order with their tensors and parts, lists by length, maps, and presets.
    """
    run = space.sdbuild("methods", "--blocks", name)

    assert run.returncode == 0
    assert set(lines) <= set(run.stdout.splitlines())
    assert ("GRAD_V" in run.stdout) == (name != "generic")


def test_an_architecture_that_is_not_there_has_no_blocks(space: Space):
    """
    A misspelt architecture is an error that says what was meant.
    """
    run = space.sdbuild("methods", "--blocks", "sdlx")

    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: there is no architecture `sdlx`\n\nhint: did you mean `sdxl`?\n"
