"""The scratch project in which tests cook recipes and run the real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import warm
from hubs import Hubs, hubs  # noqa: F401  a fixture
from hypothesis import settings
from safetensors.torch import load_file

from sdmerge_build.build import build
from sdmerge_build.events import Silent
from sdmerge_build.prepare import Options
from sdmerge_build.report import Report
from sdmerge_build.supply import Reach

settings.register_profile("sdbuild", deadline=None)  # machines are busy; nothing here is about time
settings.load_profile("sdbuild")

PAIR = """
recipe = 1
architecture = "sd1"

[source.A]
path = "A.safetensors"

[source.B]
path = "B.safetensors"

[step.mix]
formula = "0.3 * A + 0.7 * B"
"""


NOWHERE = {"SDBUILD_CIVITAI_URL": "http://127.0.0.1:9", "HF_ENDPOINT": "http://127.0.0.1:9", "NETRC": os.devnull}
"""Hubs that nobody answers for: no test asks the real ones."""


class Space:
    """A folder with checkpoints and recipes; the current folder of every command it runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, text: str) -> Path:
        """Write a recipe."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def edit(self, old: str, new: str, name: str = "recipe.toml") -> None:
        """Change a recipe; the text to be changed must be there."""
        text = (self.path / name).read_text(encoding="utf-8")
        assert old in text
        self.write(name, text.replace(old, new))

    def checkpoint(self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
        """Write a checkpoint."""
        return checkpoints.write(self.path / f"{name}.safetensors", tensors, metadata)

    def pair(self, recipe: str = PAIR, *, every: int = 40) -> None:
        """Write two small SD 1 checkpoints, A and B, and a recipe over them."""
        for name in ("A", "B"):
            self.checkpoint(name, checkpoints.miniature("sd1", name, every=every))
        self.write("recipe.toml", recipe)

    def sdbuild(self, *args: str | Path, env: Mapping[str, str] | None = None, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run the real command; with options for Python, or an environment that Python may read, it starts cold."""
        surroundings = (
            {key: value for key, value in os.environ.items() if not key.startswith(("SDBUILD_", "HF_", "CIVITAI_"))} | NOWHERE | dict(env or {})
        )
        if not python and warm.suits(surroundings):
            return warm.run([*map(str, args)], self.path, surroundings, 300)
        command = [sys.executable, *python, "-m", "sdmerge_build", *map(str, args)]
        return subprocess.run(command, cwd=self.path, env=surroundings, capture_output=True, text=True, encoding="utf-8", check=False, timeout=300)

    def build(self, recipe: str = "recipe.toml", **options: Any) -> Report:
        """Build in this process."""
        reach = Reach(folders=options.pop("models", ()), jobs=options.pop("jobs", 2), offline=options.pop("offline", True))
        said = {"store": self.path / "cache", "out": self.path / "out", "reach": reach} | options
        return build(self.path / recipe, Options(**said), Silent())

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """Read a published artifact with the safetensors library."""
        return load_file(self.path / "out" / f"{name}.safetensors")

    def reports(self, *args: str, **options: Any) -> list[dict[str, Any]]:
        """Run the command with `--json`, and return its artifacts."""
        run = self.sdbuild(*args, "--json", **options)
        assert run.returncode == 0, run.stderr + run.stdout
        return json.loads(run.stdout)["reports"][0]["artifacts"]


PATIENCE = 120  # seconds, far beyond any test: what takes longer hangs


@pytest.fixture(autouse=True)
def never_hangs():
    """End a test that hangs, where the system can."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def give_up(_signal, _frame):
        pytest.fail(f"it hangs: nothing after {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def space(tmp_path: Path) -> Space:
    """Provide an empty scratch project."""
    return Space(tmp_path)


def states(report: Report) -> dict[str, str]:
    """Say what became of each artifact."""
    return {wish.step.name: wish.state.value for wish in report.wishes}


def digests(report: Report) -> dict[str, str]:
    """Say what each artifact's file is."""
    return {wish.step.name: wish.stored.sha256 for wish in report.wishes if wish.stored}
