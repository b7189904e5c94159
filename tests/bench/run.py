"""The full-size benchmark: `python tests/bench/run.py`. Measures whole processes in turns, and checks what they made.

It makes two checkpoints of SD 1.5's real layout (2.13 GB each) in a temporary folder, runs each program `--rounds` times in turns,
and prints medians, ratios and peak memory. Absolute times mean little; ratios of one run mean something. Nothing is asserted of time.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sdmerge_build.architectures import architecture_named
from sdmerge_build.rehearse import SIZES, stand_in

BASELINE = Path(__file__).with_name("baseline.py")
RATIOS = (0.7, 0.65, 0.6)
RECIPE = """recipe = 1
architecture = "{architecture}"
[source.A]
path = "A.safetensors"
{pin_a}
[source.B]
path = "B.safetensors"
{pin_b}
"""
STEP = '[step.mix{n}]\nmethod = "weighted_sum"\na = "A"\nb = "B"\nalpha = {alpha}\n'


@dataclass(frozen=True)
class Program:
    """Something to be measured: what to run, and what to do before and after."""

    name: str
    command: list[str]
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None


class Bench:
    """A folder with two checkpoints and recipes over them."""

    def __init__(self, folder: Path, architecture: str, size: str) -> None:
        self.folder = folder
        self.architecture = architecture
        self.files = [folder / "A.safetensors", folder / "B.safetensors"]
        for path in self.files:
            if not path.exists():
                stand_in(path, architecture_named(architecture), size, seed=path.stem)
        self.recipe("one", RATIOS[:1])
        self.recipe("other", RATIOS[1:2])
        self.recipe("three", RATIOS)
        pins = [f'sha256 = "{hashlib.file_digest(path.open("rb"), "sha256").hexdigest()}"' for path in self.files]
        self.recipe("pinned", RATIOS[:1], (pins[0], pins[1]))

    def recipe(self, name: str, ratios: tuple[float, ...], pins: tuple[str, str] = ("", "")) -> None:
        """Write a recipe with one artifact per ratio."""
        text = RECIPE.format(architecture=self.architecture, pin_a=pins[0], pin_b=pins[1])
        text += "".join(STEP.format(n=round(alpha * 100), alpha=alpha) for alpha in ratios)
        (self.folder / f"{name}.toml").write_text(text)

    def clear(self, *, keep_memory: bool = False) -> None:
        """Forget all artifacts, and unless told otherwise what is known of the sources."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        shutil.rmtree(self.folder / "cache" / ("artifacts" if keep_memory else ""), ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove a program's result."""
        (self.folder / name).unlink(missing_ok=True)

    def sdbuild(self, name: str, recipe: str, before: Callable[[], None], after: Callable[[], None] = lambda: None) -> Program:
        """Describe a run of sdbuild."""
        return Program(name, [sys.executable, "-m", "sdmerge_build", f"{recipe}.toml", "--quiet"], before, after)

    def programs(self) -> list[Program]:
        """List what is measured, in the order of one round."""
        a, b = map(str, self.files)
        base = [sys.executable, str(BASELINE), a, b]
        return [
            Program("cp of one file", ["cp", a, "copy.st"], after=lambda: self.remove("copy.st")),
            Program("bare: load both, mix, save_file", [*base, "bare.st"], after=lambda: self.remove("bare.st")),
            Program("equal work: bare, sha256, fsync", [*base, "equal.st", "--equal-work"], after=lambda: self.remove("equal.st")),
            self.sdbuild("sdbuild, one ratio, sources never seen", "one", self.clear, self.check),
            self.sdbuild("sdbuild, one ratio, never seen, pinned by sha256", "pinned", self.clear, self.check),
            self.sdbuild("sdbuild, another ratio, sources known", "other", lambda: self.clear(keep_memory=True)),
            self.sdbuild("sdbuild, three ratios, sources never seen", "three", self.clear),
            self.sdbuild("sdbuild, nothing to do", "three", lambda: None),
            Program("python, the imports of nothing to do", [sys.executable, "-c", "import click, networkx, pydantic, blake3"]),
        ]

    def check(self) -> None:
        """Compare the artifact with arithmetic done by numpy, in a process of its own: this one stays small, as its children begin with its memory."""
        paths = [*self.files, self.folder / "out" / "mix70.safetensors"]
        subprocess.run([sys.executable, __file__.replace("run.py", "check.py"), *map(str, paths)], check=True)


def level() -> None:
    """Give every program the same machine: nothing left to be written, and free memory that was in use a moment ago.

    On a virtual machine memory that nobody used for a while has to be fetched from the host, at a cost that would fall on whoever comes first.
    """
    os.sync()
    amount = min(8 << 30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 3)
    subprocess.run([sys.executable, "-c", f"b'x' * {amount}"], check=True)


def measure(program: Program, folder: Path, *, levelled: bool) -> tuple[float, float]:
    """Run a program once; return its wall time in seconds and its peak memory in bytes."""
    program.before()
    if levelled:
        level()
    else:
        os.sync()
    began = time.perf_counter()
    child = subprocess.Popen(program.command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, f"{program.name} failed"
    program.after()
    return seconds, usage.ru_maxrss * 1024


def rotated(programs: list[Program], n: int) -> list[Program]:
    """Begin each round with another program; those of sdbuild stay in order, as each begins where the one before it ended."""
    others = [program for program in programs if not program.name.startswith("sdbuild")]
    sdbuild = [program for program in programs if program.name.startswith("sdbuild")]
    turn = n % (len(others) or 1)
    return [*others[turn:], *sdbuild, *others[:turn]]


def table(results: dict[str, list[tuple[float, float]]]) -> str:
    """Write the medians, and each time as a multiple of the two baselines'."""
    seconds = {name: statistics.median(s for s, _ in runs) for name, runs in results.items()}
    bare = next((s for name, s in seconds.items() if name.startswith("bare")), None)
    equal = next((s for name, s in seconds.items() if name.startswith("equal")), None)
    lines = ["| Program | Wall, median | min–max | × bare | × equal work | Peak memory |", "|---|--:|--:|--:|--:|--:|"]
    for name, runs in results.items():
        times = [s for s, _ in runs]
        memory = max(m for _, m in runs) / 1e9
        by_bare = f"{seconds[name] / bare:.2f}" if bare else "–"
        by_equal = f"{seconds[name] / equal:.2f}" if equal else "–"
        lines.append(f"| {name} | {seconds[name]:.2f} s | {min(times):.2f}–{max(times):.2f} | {by_bare} | {by_equal} | {memory:.2f} GB |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work, and to keep the checkpoints; a temporary folder unless said")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny tries the benchmark itself; its times mean nothing")
    parser.add_argument("--as-found", action="store_true", help="do not level the machine's memory before each run")
    parser.add_argument("--sdxl", action="store_true", help="SDXL's layout instead: two files of 6.94 GB, sdbuild alone")
    options = parser.parse_args()
    architecture = "sdxl" if options.sdxl else "sd1"
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, architecture, options.size)
        programs = [p for p in bench.programs() if not options.sdxl or p.name.startswith("sdbuild")]
        results: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for path in bench.files:
            with path.open("rb") as file:
                while file.read(1 << 24):  # into the page cache, for all alike
                    pass
        for n in range(options.size == "tiny", options.rounds + 1):
            for program in rotated(programs, n):
                result = measure(program, folder, levelled=not options.as_found)
                if n:  # round 0 warms the machine up and is not counted
                    results[program.name].append(result)
        results = {program.name: results[program.name] for program in programs}
        bench.clear()
    print(
        f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, {architecture}, {options.size}{', memory as found' if options.as_found else ''}\n"
    )
    print(table(results))


if __name__ == "__main__":
    main()
