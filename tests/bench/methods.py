"""The benchmark of methods: `python tests/bench/methods.py --sd-mecha PYTHON --mergekit PYTHON`. Whole processes in turns, and what they made.

It makes three checkpoints of SD 1.5's real layout in float16 (2.13 GB each, a base and two models) in a temporary folder. Methods that other
tools have are measured beside them: each tool `--rounds` times in turns. All other methods are measured once, and `weighted_sum` among them.
sdbuild begins every time with an empty store, so it also reads and hashes sources that it has never seen, and hashes and syncs the result.
sd-mecha has its default settings; mergekit is the command `mergekit-pytorch`, computing in float16, as it writes what it computes in.
Results of peers are compared with ours. Absolute times mean little; ratios of one run mean something. Nothing is asserted of time.

PYTHON is the interpreter of an environment that has the tool: peers.py says how to make one. Without one the tool is left out.
Methods that decompose or sort whole tensors take minutes each; `--methods NAME,NAME` chooses some.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from run import Program, measure

from sdmerge_build.architectures import architecture_named
from sdmerge_build.rehearse import SIZES, stand_in

HERE = Path(__file__).parent
FILES = ("O", "A", "B")
RECIPE = 'recipe = 1\narchitecture = "sd1"\n' + "".join(f'[source.{name}]\npath = "{name}.safetensors"\n' for name in FILES)
CHOSEN = {  # where defaults would do nothing, or less than usual, or not what the peers do
    "weighted_sum": {"alpha": 0.3},
    "add_difference": {"alpha": 0.3},
    "slerp": {"alpha": 0.3},
    "slerp_vectors": {"alpha": 0.3},
    "add_cosine_a": {"alpha": 0.5},
    "add_cosine_b": {"alpha": 0.5},
    "adjust": {"detail_in": 1.0, "detail_out": 1.0, "contrast": 1.0},
    "add_noise": {"amount": 0.001},
    "convert": {"naming": "diffusers"},
    "model_stock_rows": {"pairs": "consecutive"},
    "parts": {"vae": "A"},
    "ram": {"r": 0.1},
    "ties": {"density": 0.5},  # below a third, mergekit gives up at the VAE's last bias, of three elements
    "truncate_rank": {"rank": 16},
}


def tuned(method: str, weights: tuple[float, ...], *, base: str = "O", **params: object) -> dict[str, object]:
    """Write a configuration of mergekit for A and B."""
    models = [{"model": f"{name}.safetensors", "parameters": {"weight": weight} | params} for name, weight in zip("AB", weights, strict=True)]
    return {"merge_method": method, "dtype": "float16", "models": models} | ({"base_model": f"{base}.safetensors"} if base else {})


SD_MECHA = {
    "weighted_sum": "sd_mecha.weighted_sum(A, B, alpha=0.3)",
    "add_difference": "sd_mecha.add_difference(A, B, O, alpha=0.3)",
    "slerp": "sd_mecha.slerp(A, B, alpha=0.3)",
    "ties": "O + sd_mecha.ties_sum(A - O, B - O, k=0.5, vote_sgn=True)",
    "dare": "sd_mecha.add_ties_with_dare(O, A, B, probability=0.7, k=1.0, seed=0)",
    "model_stock_rows": "sd_mecha.n_model_stock(O, A, B)",
}
MERGEKIT = {
    "weighted_sum": tuned("linear", (0.7, 0.3), base=""),
    "add_difference": tuned("task_arithmetic", (1.0, 0.3), density=1.0),
    "slerp_vectors": tuned("slerp", (0.7, 0.3), base="A") | {"parameters": {"t": 0.3}},
    "ties": tuned("ties", (1.0, 1.0), density=0.5),
    "dare": tuned("dare_linear", (1.0, 1.0), density=0.3),
    "model_stock": tuned("model_stock", (1.0, 1.0)),
}
NOT_CHECKED = ("dare", "model_stock_rows")  # random; extrapolates many a row of three elements: see peers.py


def steps() -> dict[str, dict[str, object]]:
    """Make a step of every method that is not about adapters, which baking.py and adapters.py measure."""
    from sdmerge_build.methods import REQUIRED, methods

    found = {}
    for method in methods().values():
        if method.rest == "adapters" or method.makes_adapter or (method.needs and importlib.util.find_spec(method.needs) is None):
            continue
        models = iter("ABO")
        step: dict[str, object] = {"method": method.name}
        step |= {role: "O" if role == "base" else next(models) for role in method.models}
        step |= {"models": ["A", "B"] if "base" in method.models else ["O", "B"] if method.models else ["A", "B", "O"]} if method.is_open else {}
        step |= {name: 0.3 for name, parameter in method.parameters.items() if parameter.default is REQUIRED}
        found[method.name] = step | CHOSEN.get(method.name, {})
    return found


class Bench:
    """A folder with three checkpoints, and what is made of them."""

    def __init__(self, folder: Path, size: str, *, levelled: bool) -> None:
        self.folder = folder
        self.size = size
        self.failures: list[str] = []
        self.levelled = levelled
        self.results: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        for name in FILES:
            path = folder / f"{name}.safetensors"
            if not path.exists():
                stand_in(path, architecture_named("sd1"), size, seed=name)
            with path.open("rb") as file:
                while file.read(1 << 24):  # into the page cache, for all alike
                    pass

    def clear(self) -> None:
        """Forget all artifacts and all that is known of the sources."""
        for name in ("out", "cache", "theirs.folder"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("theirs", "theirs.yaml", "theirs.error"):
            (self.folder / name).unlink(missing_ok=True)

    def sdbuild(self, step: Mapping[str, object], *, keep: bool) -> Program:
        """Describe a run of sdbuild; its result is kept for comparisons."""
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in step.items()]
        (self.folder / "bench.toml").write_text(f"{RECIPE}[step.ours]\n{''.join(lines)}")
        command = [sys.executable, "-m", "sdmerge_build", "bench.toml", "--quiet"]
        return Program("sdbuild", command, self.clear, partial(self.keep, keep=keep))

    def keep(self, *, keep: bool) -> None:
        """Keep what sdbuild made, or remove it."""
        made = self.folder / "out" / "ours.safetensors"
        assert made.exists()
        if keep:
            made.replace(self.folder / "ours")
        self.clear()

    def peer(self, method: str, tool: str, python: Path, script: str, job: object) -> Program:
        """Describe a run of a peer; its result is compared with ours."""
        quietly = ["sh", "-c", 'exec "$@" 2>errors.log', "sh"]  # progress bars
        command = [*quietly, str(python.absolute()), str(HERE / script), str(self.folder), json.dumps({"theirs": job})]
        return Program(tool, command, self.clear, partial(self.check, method, tool, checked=method not in NOT_CHECKED))

    def check(self, method: str, tool: str, *, checked: bool) -> None:
        """Compare a peer's result with ours, in a process of its own: this one stays small, as its children begin with its memory."""
        error = self.folder / "theirs.error"
        if error.exists():
            print(f"{tool}: {error.read_text()}", file=sys.stderr)  # mergekit fails on tensors of one element, as tiny files have
            if self.size != "tiny":
                self.failures.append(f"{method} by {tool}, which failed")
        elif checked:
            files = [self.folder / name for name in ("ours", "theirs")]
            checking = [sys.executable, HERE / "peer_check.py", tool, *files, *self.folder.glob("?.safetensors")]
            if subprocess.run(checking, check=False).returncode:
                self.failures.append(f"{method} by {tool}")
        self.clear()

    def run(self, method: str, programs: list[Program], rounds: int) -> None:
        """Run programs in turns; ours first, as the others are compared with it."""
        for n in range(rounds):
            for program in [*programs[:1], *programs[1 + n % 2 :], *programs[1 : 1 + n % 2]]:
                print(f"{method}: {program.name}", file=sys.stderr, flush=True)
                self.results[method, program.name].append(measure(program, self.folder, levelled=self.levelled))
                seconds, memory = self.results[method, program.name][-1]
                print(f"  {seconds:.1f} s, {memory / 1e9:.2f} GB", file=sys.stderr, flush=True)  # a run that is cut short leaves what it measured
        (self.folder / "ours").unlink(missing_ok=True)


def table(results: Mapping[tuple[str, str], list[tuple[float, float]]]) -> Iterator[str]:
    """Write medians, and each as a multiple of sdbuild's and of sdbuild's `weighted_sum`."""
    wall = {key: statistics.median(seconds for seconds, _ in runs) for key, runs in results.items()}
    peak = {key: max(memory for _, memory in runs) for key, runs in results.items()}
    sum_, ours = ("weighted_sum", "sdbuild"), "sdbuild"
    yield "| Method | Program | Wall, median | min–max | × sdbuild | × weighted_sum | Peak memory | × sdbuild | × weighted_sum |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|"
    for (method, tool), runs in results.items():
        times = [seconds for seconds, _ in runs]
        cells = [f"{wall[method, tool]:.2f} s", f"{min(times):.2f}–{max(times):.2f}"]
        for values, before in ((wall, []), (peak, [f"{peak[method, tool] / 1e9:.2f} GB"])):
            own, all_ = values[method, tool] / values[method, ours], values[method, tool] / values[sum_]
            cells += [*before, "–" if tool == ours else f"{own:.2f}", f"{all_:.2f}" if tool == ours else "–"]
        yield f"| `{method}` | {tool} | {' | '.join(cells)} |"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="for methods that are measured beside a peer")
    parser.add_argument("--methods", default="", metavar="NAME,NAME", help="only these, and weighted_sum")
    parser.add_argument("--sd-mecha", type=Path, metavar="PYTHON")
    parser.add_argument("--mergekit", type=Path, metavar="PYTHON")
    parser.add_argument("--folder", type=Path, help="where to work, and to keep the checkpoints; a temporary folder unless said")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny tries the benchmark itself; its times mean nothing")
    parser.add_argument("--as-found", action="store_true", help="do not level the machine's memory before each run")
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps:  # in a process of its own, as it imports torch
        print(json.dumps(steps()))
        return
    known = json.loads(subprocess.run([sys.executable, __file__, "--steps"], check=True, capture_output=True).stdout)
    chosen = {"weighted_sum", *options.methods.split(",")} - {""} if options.methods else set(known)
    assert chosen <= set(known), f"no such methods: {', '.join(sorted(chosen - set(known)))}"
    tools = [("sd-mecha", options.sd_mecha, "peer_sd_mecha.py", SD_MECHA), ("mergekit", options.mergekit, "peer_mergekit.py", MERGEKIT)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder.resolve(), options.size, levelled=not options.as_found)
        bench.run("", [bench.sdbuild(known["weighted_sum"], keep=False)], 1)  # warms the machine up and is not counted
        bench.results.clear()
        is_shared = {name: name == "weighted_sum" or any(name in jobs for _, python, _, jobs in tools if python) for name in known}
        for name in sorted(known, key=lambda name: not is_shared[name]):
            if name in chosen:
                peers = [(tool, python, script, jobs[name]) for tool, python, script, jobs in tools if python and name in jobs]
                programs = [bench.sdbuild(known[name], keep=bool(peers))]
                for tool, python, script, job in peers:
                    wanted = [job, "float32"] if tool == "sd-mecha" else job
                    programs.append(bench.peer(name, tool, python, script, wanted))
                bench.run(name, programs, options.rounds if is_shared[name] else 1)
        bench.clear()
    print(f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, sd1, {options.size}\n")
    print("\n".join(table(bench.results)))
    assert not bench.failures, f"these results are not ours: {', '.join(bench.failures)}"


if __name__ == "__main__":
    main()
