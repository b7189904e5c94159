"""The benchmark of baking: `python tests/bench/baking.py`. Whole processes in turns, and what they made.

It makes a checkpoint of SDXL's real layout (6.94 GB), another to mix it with, and ten LoRAs of rank 32 in a temporary folder (35 GB of disk), and
bakes them all, beside the same computation done bare (`baseline_bake.py`), and beside a `weighted_sum`, whose memory is the measure of ours.
Absolute times mean little; ratios of one run mean something. Nothing is asserted of time.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from run import Program, measure, table

from sdmerge_build.adapters import read_adapter
from sdmerge_build.architectures import architecture_named
from sdmerge_build.rehearse import SIZES, stand_in, stand_in_adapter
from sdmerge_build.tensorfile import read_header

BASELINE = Path(__file__).with_name("baseline_bake.py")
COUNT = 10
ADAPTERS = [f"lora{n}" for n in range(COUNT)]
SOURCES = 'recipe = 1\narchitecture = "sdxl"\n' + "".join(f'[source.{name}]\npath = "{name}.safetensors"\n' for name in ("A", "B", *ADAPTERS))
STEPS = {
    "bake": f'[step.baked]\nmethod = "bake"\nbase = "A"\nadapters = {json.dumps(ADAPTERS)}\nstrength = 0.1\n',
    "mix": '[step.mixed]\nformula = "0.3 * A + 0.7 * B"\n',
}


def prepare(folder: Path, size: str) -> None:
    """Make the files that are not there yet, and the recipes."""
    sdxl = architecture_named("sdxl")
    for name in ("A", "B"):
        if not (path := folder / f"{name}.safetensors").exists():
            stand_in(path, sdxl, size, seed=name)
    for name in ADAPTERS:
        if not (path := folder / f"{name}.safetensors").exists():
            stand_in_adapter(path, sdxl, size, seed=name, rank=32)
    changes = read_adapter(read_header(folder / "lora0.safetensors").tensors, sdxl).changes
    plain = {c.factors["up"].removesuffix(".lora_up.weight"): c.target for cs in changes.values() for c in cs if c.rows is None and not c.turned}
    (folder / "targets.json").write_text(json.dumps(plain))
    for name in ADAPTERS:  # a q, k or v of a fused tensor is left out for all alike
        keep(folder / f"{name}.safetensors", plain)
    for recipe, step in STEPS.items():
        (folder / f"{recipe}.toml").write_text(SOURCES + step)


def keep(path: Path, modules: dict[str, str]) -> None:
    """Leave nothing in an adapter but these modules."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in modules}
    if len(kept) < len(tensors):
        save_file(kept, path)


def programs(folder: Path) -> list[Program]:
    """List what is measured, in the order of one round."""

    def clear() -> None:
        for name in ("out", "cache"):
            shutil.rmtree(folder / name, ignore_errors=True)

    def check() -> None:
        subprocess.run([sys.executable, str(BASELINE), "--compare", "out/baked.safetensors", "bare.st"], cwd=folder, check=True)
        clear()

    def sdbuild(name: str, recipe: str) -> Program:
        command = [sys.executable, "-m", "sdmerge_build", f"{recipe}.toml", "--quiet"]
        return Program(name, command, clear, check if recipe == "bake" else clear)

    bare = [sys.executable, str(BASELINE), "A.safetensors", "bare.st", *(f"{name}.safetensors" for name in ADAPTERS)]
    return [
        Program(f"bare: load all, {COUNT} × torch, save_file", bare),
        sdbuild(f"sdbuild, {COUNT} LoRAs, sources never seen", "bake"),
        Program("equal work: bare, sha256, fsync", [*bare, "--equal-work"], after=(folder / "bare.st").unlink),
        sdbuild("sdbuild, weighted_sum, sources never seen", "mix"),
    ]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work, and to keep the files; a temporary folder unless said")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny tries the benchmark itself; its times mean nothing")
    parser.add_argument("--as-found", action="store_true", help="do not level the machine's memory before each run")
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:  # in a process of its own: this one stays small, as its children begin with its memory
        prepare(options.folder, options.size)
        return
    results: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, "--prepare", "--folder", folder, "--size", options.size], check=True)
        for _ in range(options.rounds):
            for program in programs(folder):
                results[program.name].append(measure(program, folder, levelled=not options.as_found))
                print(program.name, *results[program.name][-1], file=sys.stderr, flush=True)
    print(f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, sdxl, {options.size}\n")
    print(table(results))


if __name__ == "__main__":
    main()
