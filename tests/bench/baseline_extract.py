"""The difference of two checkpoints as a LoRA, bare: load both, decompose each tensor with torch, save.

Written from the description of kohya's `extract_lora_from_models.py`. It has torch compute the thin SVD, where kohya has it compute square
matrices of all singular vectors, which takes several times as long. `--lowrank` uses `torch.svd_lowrank` instead, as kohya's `resize_lora.py` does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sdmerge_build.adapters.writing import modules_of
from sdmerge_build.architectures import architecture_named

RANK = 64


def extract(first: Path, second: Path, result: Path, *, is_quick: bool) -> None:
    """Decompose the difference of every matrix and convolution that a LoRA can hold."""
    a, b, architecture = load_file(first), load_file(second), architecture_named("sd1")
    tensors: dict[str, torch.Tensor] = {}
    for name in a:
        for module in modules_of(name, tuple(a[name].shape), architecture):
            matrix = (a[name].float() - b[name].float()).flatten(1)
            rank = min(RANK, *matrix.shape)
            if is_quick:
                left, sizes, right = torch.svd_lowrank(matrix, q=min(2 * rank, *matrix.shape), niter=2)
                right = right.T
            else:
                left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
            up, down = left[:, :rank] * sizes[:rank], right[:rank]
            for spec, tensor in zip(module.specs(rank, "F16"), (up, down, torch.tensor(rank)), strict=True):
                tensors[spec.name] = tensor.half().reshape(spec.shape).contiguous()
    save_file(tensors, result, metadata={"ss_network_dim": str(RANK)})


def compare(ours: Path, theirs: Path) -> None:
    """Demand that two LoRAs add the same, but for what float16 loses."""
    a, b = load_file(ours), load_file(theirs)
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith("lora_up.weight") and a[name].numel() < 1 << 16:
            mine, other = (
                tensors[name].double().flatten(1) @ tensors[name.replace("lora_up", "lora_down")].double().flatten(1) for tensors in (a, b)
            )
            assert (mine - other).norm() < 0.01 * other.norm(), name


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:4]]
    if sys.argv[1] == "--compare":
        compare(*paths[1:])
    else:
        extract(*paths, is_quick="--lowrank" in sys.argv)
