"""LoRAs baked into a checkpoint, bare: load everything, multiply with torch, save. `--equal-work` also hashes and syncs the result.

Written from the description of kohya's `sdxl_merge_lora.py`: factors are multiplied in float32 and added one LoRA after the other, to weights
that are float32 until they are saved. `--compare OURS THEIRS` demands the same weights of two results.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

STRENGTH = 0.1


def bake(base: Path, adapters: list[Path], targets: dict[str, str], result: Path) -> None:
    """Add every LoRA to the checkpoint; `targets` names the tensor of each module."""
    model = load_file(base)
    wide: dict[str, torch.Tensor] = {}
    for path in adapters:
        adapter = load_file(path)
        for module, target in targets.items():
            up, down = (adapter[f"{module}.lora_{side}.weight"].float() for side in ("up", "down"))
            scale = STRENGTH * adapter[f"{module}.alpha"].item() / len(down)
            wide.setdefault(target, model[target].float()).add_(up @ down, alpha=scale)
    model |= {name: tensor.half() for name, tensor in wide.items()}
    save_file(model, result)


def finish(path: Path) -> None:
    """Hash a file and wait until it is on disk."""
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())


def compare(ours: Path, theirs: Path) -> None:
    """Demand the same weights, but for a unit in the last place of float16."""
    with safe_open(ours, "pt") as a, safe_open(theirs, "pt") as b:
        assert sorted(a.keys()) == sorted(b.keys())
        for name in a.keys():  # noqa: SIM118  it is no mapping
            mine, other = a.get_tensor(name), b.get_tensor(name)
            if mine.is_floating_point():
                unit = torch.maximum(mine.abs(), other.abs()).float() * 2**-10 + 2**-24
                assert ((mine.float() - other.float()).abs() <= unit).all(), name
            else:
                assert torch.equal(mine, other), name


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        compare(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        base, result, *adapters = (Path(argument) for argument in sys.argv[1:] if not argument.startswith("--"))
        bake(base, adapters, json.loads(Path("targets.json").read_text()), result)
        if "--equal-work" in sys.argv:
            finish(result)
