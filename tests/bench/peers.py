"""Results beside other tools': `python tests/bench/peers.py --sd-mecha PYTHON --mergekit PYTHON`. Prints a table in Markdown.

It makes miniature checkpoints of SD 1's layout in a temporary folder, merges them with sdbuild, with sd-mecha's recipes over files, with
mergekit's `mergekit-pytorch`, and with AUTOMATIC1111's algorithm; every method that two of them share, as far as their meaning is the same.
Results of the others are rounded to float16 once. It fails where a difference is larger than the table's reason explains.

PYTHON is the interpreter of an environment that has the tool; without one its rows are left out. To make them:

    python -m venv sd-mecha && sd-mecha/bin/pip install sd-mecha==1.1.8
    python -m venv mergekit && mergekit/bin/pip install mergekit==0.1.4 "transformers<5"
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from peer_cases import MERGEKIT, NOT_COMPARED, SD_MECHA, Case
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdmerge_build.architectures import architecture_named

HERE = Path(__file__).parent
EVERY = 3  # tensors are thinned out, for speed
SHRINK = 16


def shapes() -> dict[str, tuple[int, ...]]:
    """Choose the miniatures' tensors: some of the real ones, all dimensions but the small ones shrunken."""
    known = architecture_named("sd1")
    return {
        name: shape if name in known.shapes else tuple(d if d <= 8 else max(8, math.ceil(d / SHRINK)) for d in shape)
        for n, (name, shape) in enumerate(known.layout().items())
        if (n % EVERY == 0 or name in {*known.present, *known.shapes}) and not name.endswith("position_ids")
    }


def normal(seed: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw numbers that depend on the seed and the name alone."""
    generator = torch.Generator().manual_seed(int.from_bytes(blake3(f"{seed}/{name}".encode()).digest(7), "little"))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make_files(folder: Path) -> None:
    """Write a base, its fine-tunes, and a model that is no relative: see peer_cases.py."""
    for names, dtype in (("OABCX", torch.float16), ("PQRS", torch.float32)):
        for n, file in enumerate(names):
            tensors = {name: tensor(n, name, shape).to(dtype) for name, shape in shapes().items()}
            save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
            if file in "AX":
                tall = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2 and tensor.shape[0] >= tensor.shape[1]}
                save_file(tall, folder / f"{'YZ'['AX'.index(file)]}.safetensors", metadata={"format": "pt"})


def tensor(n: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Make a tensor of the n-th model: normalisations are around 1, a fifth of the weights is not tuned, nor is the VAE."""
    is_scale = "norm" in name and name.endswith("weight")
    weights = normal("X" if n == 4 else "O", name, shape) * 0.03 + (1.0 if is_scale else 0.0)
    is_tuned = n in (1, 2, 3) and not name.startswith("first_stage_model.") and not (n == 3 and name.startswith("cond_stage_model."))
    if is_tuned:
        learned = normal("common", name, shape) * 0.003 + normal(f"{n}", name, shape) * 0.002
        weights += learned * (normal(f"{n}?", name, shape).abs() > 0.25)
    return weights


def build_ours(folder: Path, steps: Mapping[str, str]) -> None:
    """Merge with sdbuild, all in one run."""
    lines = ['recipe = 1\narchitecture = "sd1"\n']
    lines += [f'[source.{path.stem}]\npath = "{path.name}"\n' for path in sorted(folder.glob("[!YZ].safetensors"))]
    lines += [f'[step.{name}]\nartifact = true\ndtype = "fp16"\n{text}' for name, text in steps.items()]
    (folder / "peers.toml").write_text("".join(lines))
    subprocess.run([sys.executable, "-m", "sdmerge_build", "peers.toml", "--quiet"], cwd=folder, check=True)


def build_theirs(python: Path, script: str, folder: Path, cases: tuple[Case, ...]) -> None:
    """Merge with a peer, all in one process."""
    jobs = {f"theirs-{case.name}": case.theirs for case in cases} | {f"theirs-{case.name}-64": case.doubled() for case in cases if case.double}
    with (folder / f"{script}.log").open("wb") as log:
        done = subprocess.run([python.absolute(), HERE / script, folder, json.dumps(jobs)], check=False, stdout=log, stderr=log)
    assert not done.returncode, (folder / f"{script}.log").read_text()[-3000:]


def automatic1111(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Merge as AUTOMATIC1111's Checkpoint Merger does, from the description of its algorithm: in the files' own dtype."""
    base, a, b = (load_file(folder / f"{name}.safetensors") for name in "OAB")
    difference = {k: b[k] - base[k] if k in base else torch.zeros_like(b[k]) for k in b}
    return {
        "weighted_sum-native": {k: (1 - 0.3) * a[k] + 0.3 * b[k] for k in a},
        "add_difference-native": {k: a[k] + 0.7 * difference[k] for k in a},
        "copy-native": a,
    }


NATIVE = {
    "weighted_sum-native": 'method = "weighted_sum"\na = "A"\nb = "B"\nalpha = 0.3\ncompute = "native"\n',
    "add_difference-native": 'method = "add_difference"\na = "A"\nb = "B"\nc = "O"\nalpha = 0.7\ncompute = "native"\n',
    "copy-native": 'method = "copy"\na = "A"\n',
}


@dataclass
class Difference:
    """How far two files are apart."""

    ulps: int = 0  # of float16, the largest
    elements: int = 0
    differing: int = 0
    odd: list[str] = field(default_factory=list)  # tensors that are not finite or of another shape there
    worst: str = ""  # tensor

    def add(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Count one tensor."""
        assert ours.dtype == theirs.dtype == np.float16, name
        assert np.isfinite(ours).all(), f"ours is not finite: {name}"
        if ours.shape != theirs.shape or not np.isfinite(theirs).all():
            self.odd.append(name)
            return
        apart = np.abs(ordered(ours) - ordered(theirs))
        self.elements += apart.size
        self.differing += np.count_nonzero(apart)
        if apart.max() > self.ulps:
            self.ulps, self.worst = int(apart.max()), name


def ordered(values: np.ndarray) -> np.ndarray:
    """Number float16 values in their order, so that neighbours are one apart; both zeros are 0."""
    bits = values.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def compare(ours: Path, theirs: Mapping[str, torch.Tensor], ndim: int | None = None) -> Difference:
    """Compare two results, theirs rounded to float16."""
    found = Difference()
    with safe_open(ours, "np") as file:
        for name in theirs:
            if ndim in (None, theirs[name].ndim):
                found.add(name, file.get_tensor(name), theirs[name].to(torch.float16).numpy())
    return found


def row(case: Case, found: Difference, *, double: bool = False) -> str:
    """Write a line of the table; fail where the difference is larger than is explained."""
    ulps = 1 if double and case.ulps is not None else case.ulps
    assert found.elements, case.name
    assert ulps is None or found.ulps <= ulps, f"{case.name}: {found.ulps} ulps in {found.worst}"
    assert found.differing <= case.share * found.elements, f"{case.name}: {found.differing} elements differ"
    method, _, variant = case.name.partition("-")
    reasons = [case.reason] if found.ulps > 1 or found.odd or case.ndim else []
    reasons += [f"{len(found.odd)} tensors are of another shape or not finite there"] if found.odd else []
    share = f"{found.differing / found.elements:.1e}" if found.differing else "none"
    return f"| `{method}`{f', {variant}' if variant else ''} | {case.peer}{' in float64' * double} | {found.ulps} | {share} | {'; '.join(reasons)} |"


def lines(folder: Path, cases: tuple[Case, ...]) -> Iterator[str]:
    """Write the table."""
    yield "| Method | Beside | Largest difference, float16 ulps | Elements that differ | What is different there |"
    yield "|---|---|--:|--:|---|"
    for name, tensors in automatic1111(folder).items():
        yield row(Case(name, "", "AUTOMATIC1111's algorithm", None, ulps=0), compare(folder / "out" / f"{name}.safetensors", tensors))
    for case in cases:
        for theirs in (folder / f"theirs-{case.name}", folder / f"theirs-{case.name}-64")[: 1 + case.double]:
            assert theirs.exists(), theirs.with_name(f"{theirs.name}.error").read_text()
            found = compare(folder / "out" / f"{case.name}.safetensors", load_file(theirs), case.ndim)
            yield row(case, found, double=theirs.name.endswith("-64"))
    for method, peer, reason in NOT_COMPARED if cases else ():
        yield f"| {method} | {peer} | – | – | {reason} |"


def main() -> None:
    """Merge with everyone, compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd-mecha", type=Path, metavar="PYTHON")
    parser.add_argument("--mergekit", type=Path, metavar="PYTHON")
    parser.add_argument("--folder", type=Path, help="where to work, and to keep the files; a temporary folder unless said")
    options = parser.parse_args()
    groups = [(options.sd_mecha, "peer_sd_mecha.py", SD_MECHA), (options.mergekit, "peer_mergekit.py", MERGEKIT)]
    cases = tuple(case for python, _, group in groups if python for case in group)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_files(folder)
        build_ours(folder, NATIVE | {case.name: case.ours for case in cases})
        for python, script, group in groups:
            if python:
                build_theirs(python, script, folder, group)
        print("\n".join(lines(folder, cases)))


if __name__ == "__main__":
    main()
