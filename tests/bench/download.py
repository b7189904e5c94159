"""The download benchmark: `python tests/bench/download.py`. One full-size checkpoint from a loopback hub, verified, against curl and blake3.

It makes a checkpoint of SD 1.5's real layout (2.13 GB) in a temporary folder, serves it from this process, and runs each program `--rounds`
times in turns; prints medians, ratios and peak memory, and how long a folder of a hundred models of other sizes takes to be searched.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from blake3 import blake3
from run import Program, measure, table

sys.path.insert(0, str(Path(__file__).parents[1]))
from hubs import HubFile, Hubs

from sdmerge_build.architectures import architecture_named
from sdmerge_build.events import Silent
from sdmerge_build.recipe import SourceTable
from sdmerge_build.rehearse import SIZES, stand_in
from sdmerge_build.sources import Memo, Search, Stock, Wanted, find_sources

RECIPE = """recipe = 1
architecture = "sd1"
[source.A]
uri = "civitai:7813@25845"
{pin}
[step.copied]
method = "copy"
a = "A"
"""
SHA256 = "import sys, hashlib; assert hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256').hexdigest() == sys.argv[2]"
VERIFY = "import sys; from blake3 import blake3; h = blake3(max_threads=blake3.AUTO); h.update_mmap(sys.argv[1]); assert h.hexdigest() == sys.argv[2]"
FETCH = "import shutil, sys, urllib.request; shutil.copyfileobj(urllib.request.urlopen(sys.argv[1]), open(sys.argv[2], 'wb'), 1 << 20)"


def programs(folder: Path, url: str, digests: dict[str, str]) -> list[Program]:
    """List what is measured: both ways to have the file, verified by blake3 and by sha256."""
    fetch = f"curl -s -L -o file.st '{url}'" if shutil.which("curl") else f"{sys.executable} -c \"{FETCH}\" '{url}' file.st"
    verify = f"{sys.executable} -c '{VERIFY}' file.st {digests['blake3']}"
    verify_sha256 = f'{sys.executable} -c "{SHA256}" file.st {digests["sha256"]}'

    def clear() -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        (folder / "file.st").unlink(missing_ok=True)

    def check() -> None:
        [stored] = (folder / "cache" / "sources").glob("*/*.safetensors")
        assert stored.stem == digests["blake3"]

    sdbuild = [sys.executable, "-m", "sdmerge_build", "fetch", "--allow-private", "--quiet"]
    return [
        Program("equal work: curl -o, blake3", ["sh", "-c", f"{fetch} && {verify}"], clear),
        Program("curl -o, sha256", ["sh", "-c", f"{fetch} && {verify_sha256}"], clear),
        Program("sdbuild fetch, pinned by blake3", [*sdbuild, "blake3.toml"], clear, check),
        Program("sdbuild fetch, pinned by sha256", [*sdbuild, "sha256.toml"], clear, check),
    ]


def digests_of(file: Path) -> dict[str, str]:
    """Hash the file piece by piece: children begin with this process's memory, so it stays small."""
    hashers = {"blake3": blake3(), "sha256": hashlib.sha256()}
    with file.open("rb") as content:
        while data := content.read(1 << 20):
            for hasher in hashers.values():
                hasher.update(data)
    return {name: hasher.hexdigest() for name, hasher in hashers.items()}


def search_seconds(folder: Path) -> float:
    """Measure the search for a pinned file among a hundred sparse ones of another size."""
    models = folder / "models"
    models.mkdir()
    for n in range(100):
        with (models / f"model-{n}.safetensors").open("wb") as file:
            file.truncate(2_000_000_000 + n)
    table = SourceTable(filename="x.safetensors", size=2_132_625_462, sha256="ab" * 32)
    search = Search(folders=[models], stock=Stock(folder / "none"), memo=Memo(folder / "none.json"), jobs=2, watcher=Silent(), on_read=lambda: None)
    began = time.perf_counter()
    found, _ = find_sources([Wanted(name="A", table=table, folder=folder, where="")], search)
    seconds = time.perf_counter() - began
    assert not found
    shutil.rmtree(models)
    return seconds


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder unless said")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny tries the benchmark itself; its times mean nothing")
    parser.add_argument("--as-found", action="store_true", help="do not level the machine's memory before each run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary, Hubs() as hubs:
        folder = Path(temporary)
        file = folder / "A.safetensors"
        stand_in(file, architecture_named("sd1"), options.size, seed="A")
        digests = digests_of(file)
        for name, digest in digests.items():
            (folder / f"{name}.toml").write_text(RECIPE.format(pin=f'{name} = "{digest}"'))
        hashes = {name.upper(): digest.upper() for name, digest in digests.items()}
        hubs.civitai(7813, 25845, HubFile(id=1, name="A.safetensors", data=file, hashes=hashes))
        os.environ |= hubs.env
        runs = programs(folder, f"{hubs.url}/api/download/models/25845", digests)
        results: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for n in range(options.size == "tiny", options.rounds + 1):
            for program in runs[n % len(runs) :] + runs[: n % len(runs)]:
                result = measure(program, folder, levelled=not options.as_found)
                if n:  # round 0 warms the machine up and is not counted
                    results[program.name].append(result)
        print(table({program.name: results[program.name] for program in runs}))
        print(f"\nsearching a folder of 100 models of other sizes: {1000 * statistics.median(search_seconds(folder) for _ in range(5)):.1f} ms")


if __name__ == "__main__":
    main()
