"""Adapters baked beside other tools: `python tests/bench/adapter_peers.py --diffusers PYTHON`. Prints a table in Markdown.

Models of SD 1's and SDXL's structure, few channels wide, come from diffusers and transformers; adapters of every kind from diffusers, peft and
LyCORIS, filled with seeded random numbers and written as these tools write them (`peer_diffusers.py`). Their own code merges each in float32, and
again in float64; sdbuild reads the same diffusers folder and the same adapter, bakes in float32 and converts back to diffusers' names. Compared is
every tensor of the models, and what they make of fixed inputs with their weights and with ours.

It fails where a weight is further from their float64 than one and a half units in the last place of float32 of its tensor's largest: half a unit for
rounding what is added, half for rounding the sum, and half for products in fixed point; unless a case explains more. It fails where one changes a
tensor that the other does not, and where weights in float32, or what the models make, differ by more than rounding.

PYTHON is the interpreter of an environment that has the tools. To make it:

    python -m venv peers && peers/bin/pip install torch==2.13.0 diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
    peers/bin/pip install safetensors==0.8.0 lycoris-lora==4.1.3
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
DIFFUSERS, PEFT, LYCORIS = "diffusers, `fuse_lora`", "peft, `merge_and_unload`", "LyCORIS, `merge_to`"

RECIPE = """recipe = 1
architecture = "{kind}"
[defaults]
dtype = "fp32"
[source.base]
path = "{kind}"
[source.adapter]
path = "{name}.safetensors"
[step.baked]
method = "bake"
base = "base"
adapters = ["adapter"]
[step.{name}]
method = "convert"
a = "baked"
naming = "diffusers"
"""


@dataclass(frozen=True)
class Case:
    """An adapter, who merged it, and what is different there; `ulps` is how far ours may be from theirs in float64."""

    name: str
    what: str
    peer: str
    reason: str = ""
    ulps: float = 1.5
    refusal: str = ""  # what sdbuild says of it, if it refuses it


NEAR, ALIKE = 1e-5, 1e-4  # how far apart weights in float32 may be, and what models make, as shares of the largest change
EPSILON = "lengths of DoRA: we add 2⁻²³, LyCORIS the ε of its dtype, peft nothing"
TWICE = "their `merge_to` takes alpha / rank twice, their forward pass once, as we do: compared at alpha = rank"
INPUTS = "they turn what goes into a layer, files of kohya and LyCORIS what comes out"

CASES = (
    Case("lora", "LoRA of attention, SD 1; diffusers' older names", DIFFUSERS, "a UNet with more than attention is read in part there"),
    Case("lora_settings", "LoRA; alphas and ranks in the header", DIFFUSERS),
    Case("lora_rslora", "rsLoRA, said in the header", DIFFUSERS),
    Case("lora_bias", "LoRA with biases", DIFFUSERS),
    Case("lora_model", "LoRA of a UNet by itself", DIFFUSERS),
    Case("lora_peft", "LoRA; peft's names", PEFT),
    Case("lora_kohya", "LoRA; kohya's names, SD 1", DIFFUSERS),
    Case("lora_sdxl", "LoRA of SDXL, two text encoders", DIFFUSERS),
    Case("lora_kohya_sdxl", "LoRA; kohya's names, SDXL", DIFFUSERS, "`add_embedding` is not read there"),
    Case("lora_dora", "DoRA of linear layers", DIFFUSERS, f"lengths of text encoders are not read there; {EPSILON}", 16),
    Case("lora_dora_conv", "DoRA of convolutions", DIFFUSERS, refusal="has `lora_magnitude_vector` of a convolution, which is not read"),
    Case("loha", "LoHa; renamed", PEFT),
    Case("loha_core", "LoHa with cores; renamed", PEFT),
    Case("lokr", "LoKr; renamed", PEFT),
    Case("lokr_both", "LoKr, both sides factored, cores; renamed", PEFT),
    Case("ia3", "IA³; renamed, less one", PEFT, "they scale biases of what comes out too: left out"),
    Case("oft", "OFT of the transposed layers; renamed", PEFT, INPUTS),
    Case("boft", "BOFT of the transposed layers; renamed, reordered", PEFT, f"{INPUTS}; with three factors, other rows are mixed"),
    Case("lycoris_locon", "LoCon with cores", LYCORIS),
    Case("lycoris_norm", "LoCon, norms and their biases", LYCORIS),
    Case("lycoris_dora_output", "DoRA on the output", LYCORIS, EPSILON, 16),
    Case("lycoris_dora_input", "DoRA on the input", LYCORIS, EPSILON, 16),
    Case("lycoris_loha", "LoHa with cores", LYCORIS, TWICE),
    Case("lycoris_loha_dora", "LoHa, DoRA on the input", LYCORIS, f"{TWICE}; {EPSILON}", 16),
    Case("lycoris_lokr", "LoKr with cores", LYCORIS, TWICE),
    Case("lycoris_lokr_dora", "LoKr, both sides factored, DoRA on the output", LYCORIS, f"{TWICE}; {EPSILON}", 16),
    Case("lycoris_lokr_full", "LoKr, both sides whole", LYCORIS),
    Case("lycoris_glora", "GLoRA", LYCORIS),
    Case("lycoris_oft", "OFT with scales", LYCORIS),
    Case("lycoris_oft_limited", "OFT with a limit", LYCORIS),
    Case("lycoris_boft", "BOFT with scales", LYCORIS),
    Case("lycoris_ia3", "IA³", LYCORIS),
    Case("lycoris_full", "differences", LYCORIS),
)

Tensors = Mapping[str, torch.Tensor]


def bake(folder: Path, case: Case) -> str:
    """Bake with sdbuild; say what it complains of."""
    kind = "sdxl" if "sdxl" in case.name else "sd1"
    (folder / f"{case.name}.toml").write_text(RECIPE.format(kind=kind, name=case.name))
    done = subprocess.run(
        [sys.executable, "-m", "sdmerge_build", f"{case.name}.toml", "--quiet"], cwd=folder, check=False, capture_output=True, text=True
    )
    if not done.returncode:
        (folder / "out" / f"{case.name}.safetensors").replace(folder / f"{case.name}.ours")
    return done.stderr[:3000] if done.returncode else ""


def originals(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Read the models that adapters are baked into."""
    files = sorted((folder / kind).glob("*/*.safetensors"))
    return named({f"{file.parent.name}.{name}": tensor for file in files for name, tensor in load_file(file).items()})


def named(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Name text encoders' tensors alike, whichever release of transformers they are from."""
    return {name.replace(".text_model.", "."): tensor for name, tensor in tensors.items()}


@dataclass
class Distance:
    """How far the tensors of two models are apart."""

    tensors: int = 0
    largest: float = 0.0
    share: float = 0.0  # of the largest change of the tensor
    ulps: float = 0.0  # of float32, of the largest of what went in and what came out
    worst: str = ""

    def add(self, name: str, base: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Count one tensor; both are of float64 or less."""
        assert np.isfinite(ours).all(), name
        base, ours, theirs = (np.asarray(x, np.float64) for x in (base, ours, theirs))
        apart = np.abs(ours - theirs)
        unit = float(np.spacing(np.float32(max(np.abs(base).max(), np.abs(theirs).max()))))
        self.tensors += 1
        self.largest = max(self.largest, apart.max())
        self.share = max(self.share, apart.max() / np.abs(theirs - base).max())
        if apart.max() / unit > self.ulps:
            self.ulps, self.worst = apart.max() / unit, name


def compare(base: Tensors, ours: Tensors, theirs: Tensors, case: Case) -> Distance:
    """Compare what their code changed; all else must be as it was."""
    found = Distance()
    for name, before in base.items():
        if name in theirs:
            found.add(name, before.numpy(), ours[name].numpy(), theirs[name].numpy())
        else:
            assert torch.equal(before, ours[name]), f"{case.name}: {name} is changed by us alone"
    assert found.tensors, case.name
    return found


def row(folder: Path, case: Case, complaint: str) -> str:
    """Write a line of the table; fail where the difference is larger than is explained."""
    head = f"| {case.what} | {case.peer} |"
    assert bool(complaint) == bool(case.refusal), f"{case.name}: {complaint}"
    assert case.refusal in complaint, complaint
    if complaint:
        return f"{head} – | – | – | – | – | refused: {case.refusal} |"
    base = originals(folder, "sdxl" if "sdxl" in case.name else "sd1")
    ours = named(load_file(folder / f"{case.name}.ours"))
    single = compare(base, ours, named(load_file(folder / f"{case.name}.32")), case)
    exact = folder / f"{case.name}.64"
    double = compare(base, ours, named(load_file(exact)), case) if exact.exists() else None
    theirs, mine = load_file(folder / f"{case.name}.out"), load_file(folder / f"{case.name}.ours.out")
    apart = ((mine["after"] - theirs["after"]).abs().max() / (theirs["after"] - theirs["before"]).abs().max()).item()
    assert single.share <= NEAR, f"{case.name}: {single.worst} is {single.share:.1e} of its change away"
    assert double is None or double.ulps <= case.ulps, f"{case.name}: {double.worst} is {double.ulps:.2f} ulps away"
    assert apart <= ALIKE, f"{case.name}: the model makes something else, by {apart:.1e} of the change"
    ulps = f"{double.ulps:.2f}" if double else "–"
    return f"{head} {single.tensors} | {single.largest:.1e} | {single.share:.1e} | {ulps} | {apart:.1e} | {case.reason} |"


def lines(folder: Path, complaints: Mapping[Case, str]) -> Iterator[str]:
    """Write the table."""
    yield "| Adapter | Merged there by | Tensors | Weights, largest difference | share of ΔW | from float64, ulps | What the model makes | There |"
    yield "|---|---|--:|--:|--:|--:|--:|---|"
    yield from (row(folder, case, complaint) for case, complaint in complaints.items())


def their_turn(python: Path, folder: Path, *more: str) -> None:
    """Let the others work."""
    with (folder / "peers.log").open("wb") as log:
        done = subprocess.run([python.absolute(), HERE / "peer_diffusers.py", folder, *more], check=False, stdout=log, stderr=log)
    assert not done.returncode, (folder / "peers.log").read_text()[-3000:]


def main() -> None:
    """Merge with everyone, compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, metavar="PYTHON", required=True)
    parser.add_argument("--folder", type=Path, help="where to work, and to keep the files; a temporary folder unless said")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        their_turn(options.diffusers, folder)
        complaints = {case: bake(folder, case) for case in CASES}
        their_turn(options.diffusers, folder, "--ours")
        print("\n".join(lines(folder, complaints)))


if __name__ == "__main__":
    main()
