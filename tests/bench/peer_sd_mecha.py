"""Merges with sd-mecha, in an environment of its own: `python peer_sd_mecha.py FOLDER JOBS`. Started by peers.py and methods.py.

JOBS is JSON: names of results, and for each a recipe and the dtype to compute in. Recipes are expressions over `sd_mecha`, the models of the folder by their files' names,
`delta(NAME)` for a file that holds a difference, and `method(NAME)` for what sd-mecha has under a name that it does not export.
Everything else is as sd-mecha does it unless told otherwise. Where it fails, RESULT.error says how.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import sd_mecha
import torch
from sd_mecha.extensions.merge_methods import resolve

folder = Path(sys.argv[1]).resolve()
names = {path.stem: sd_mecha.model(path, "sd1-ldm") for path in folder.glob("?.safetensors")}
names |= {"sd_mecha": sd_mecha, "method": resolve, "delta": lambda name: sd_mecha.model(folder / f"{name}.safetensors", "sd1-ldm", "delta")}
for result, (recipe, dtype) in json.loads(sys.argv[2]).items():
    space = "delta" if recipe.startswith(("sd_mecha.subtract", "delta")) else "weight"
    try:
        sd_mecha.merge(eval(recipe, names), output=folder / result, strict_merge_space=space, merge_dtype=getattr(torch, dtype))  # noqa: S307 – our own texts
    except Exception as error:  # noqa: BLE001 – whatever a peer throws is a result
        (folder / f"{result}.error").write_text(f"{type(error).__name__}: {error}")
