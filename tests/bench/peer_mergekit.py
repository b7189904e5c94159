"""Merges with mergekit, in an environment of its own: `python peer_mergekit.py FOLDER JOBS`. Started by peers.py and methods.py.

JOBS is JSON: names of results and configurations. Each is what the command `mergekit-pytorch` does, one after the other in one process.
Where it fails, RESULT.error says how.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from mergekit.scripts.merge_raw_pytorch import main

os.chdir(sys.argv[1])
for result, config in json.loads(sys.argv[2]).items():
    written = Path(f"{result}.yaml")
    written.write_text(json.dumps(config))
    try:
        main([str(written), f"{result}.folder"], standalone_mode=False)
    except Exception as error:  # noqa: BLE001 – whatever a peer throws is a result
        Path(f"{result}.error").write_text(f"{type(error).__name__}: {error}")
        continue
    (made,) = Path(f"{result}.folder").glob("*.safetensors")
    made.replace(result)
