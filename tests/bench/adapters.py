"""The benchmark of adapters: `python tests/bench/adapters.py`. Whole processes in turns, and what they made.

It makes two checkpoints of SD 1.5's real layout (2.13 GB each) in a temporary folder and takes their difference as a LoRA of rank 64, beside
the same computation done bare (`baseline_extract.py`). Absolute times mean little; ratios of one run mean something. Nothing is asserted of time.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from run import Program, measure, table

from sdmerge_build.architectures import architecture_named
from sdmerge_build.rehearse import SIZES, stand_in

BASELINE = Path(__file__).with_name("baseline_extract.py")
RECIPE = """recipe = 1
architecture = "sd1"
[source.A]
path = "A.safetensors"
[source.B]
path = "B.safetensors"
[step.lora]
method = "extract_lora"
a = "A"
b = "B"
rank = 64
"""


def programs(folder: Path) -> list[Program]:
    """List what is measured, in the order of one round."""

    def clear() -> None:
        for name in ("out", "cache"):
            shutil.rmtree(folder / name, ignore_errors=True)

    def check() -> None:
        subprocess.run([sys.executable, str(BASELINE), "--compare", "out/lora.safetensors", "bare.st"], cwd=folder, check=True)

    def sdbuild(name: str, recipe: str) -> Program:
        command = [sys.executable, "-m", "sdmerge_build", f"{recipe}.toml", "--quiet"]
        return Program(name, command, clear, check if recipe == "exact" else lambda: None)

    base = [sys.executable, str(BASELINE), "A.safetensors", "B.safetensors"]
    return [
        Program("bare: load both, torch.linalg.svd, save_file", [*base, "bare.st"]),
        sdbuild("sdbuild, sources never seen", "exact"),
        Program("load both, torch.svd_lowrank, save_file", [*base, "quick.st", "--lowrank"]),
        sdbuild("sdbuild, randomized, sources never seen", "random"),
    ]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work, and to keep the checkpoints; a temporary folder unless said")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny tries the benchmark itself; its times mean nothing")
    parser.add_argument("--as-found", action="store_true", help="do not level the machine's memory before each run")
    options = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = options.folder or Path(temporary)
        for name in ("A", "B"):
            if not (path := folder / f"{name}.safetensors").exists():
                stand_in(path, architecture_named("sd1"), options.size, seed=name)
        for name, more in (("exact", ""), ("random", "randomized = true\n")):
            (folder / f"{name}.toml").write_text(RECIPE + more)
        for _ in range(options.rounds):
            for program in programs(folder):
                results[program.name].append(measure(program, folder, levelled=not options.as_found))
    print(table(results))


if __name__ == "__main__":
    main()
