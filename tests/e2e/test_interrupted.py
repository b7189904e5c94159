"""What a build leaves behind when it is killed, interrupted, starved of disk, or not alone."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoints
import pytest
import torch
from conftest import PAIR, Space, digests, states

from sdmerge_build import writer
from sdmerge_build.errors import SpaceError

GENERIC = PAIR.replace("sd1", "generic")


@pytest.fixture(scope="module")
def two_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of 300 MB, enough to be caught in the middle."""
    maker = Space(tmp_path_factory.mktemp("large"))
    files = []
    for n, name in enumerate("AB"):
        values = torch.arange(1 << 20, dtype=torch.float32).add(n).remainder(977).div(977).to(torch.float16)
        files.append(maker.checkpoint(name, {f"layer.{i}.weight": values.clone() for i in range(150)}))
    return files


@pytest.fixture
def large_pair(space: Space, two_files: list[Path]) -> Space:
    """A recipe over them."""
    for path in two_files:
        os.link(path, space.path / path.name)
    space.write("recipe.toml", GENERIC)
    return space


def start(space: Space, *args: str) -> subprocess.Popen:
    """Start the command, and wait until it is writing an artifact."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("SDBUILD_")}
    child = subprocess.Popen(
        [sys.executable, "-m", "sdmerge_build", "recipe.toml", *args], cwd=space.path, env=env, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list((space.path / "cache").glob("partial/*/*.safetensors")):
        assert child.poll() is None, "it was over before it could be caught"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return child


def finals(space: Space) -> list:
    """Every file under a final name, in the store and published."""
    return [*(space.path / "cache").rglob("model.safetensors"), *(space.path / "out").glob("*")]


def test_kill_9_leaves_no_final_name_and_the_next_run_completes(large_pair: Space):
    """
    SIGKILL in the middle leaves nothing that looks finished; the next run removes the debris and makes the same bytes.
    """
    space = large_pair
    child = start(space)
    child.kill()
    child.communicate()

    assert finals(space) == []
    assert len(list((space.path / "cache" / "partial").iterdir())) == 1
    after = space.build()
    assert list((space.path / "cache" / "partial").iterdir()) == []
    assert digests(after) == digests(space.build(store=space.path / "clean", out=space.path / "clean-out"))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_build_leaves_no_debris(large_pair: Space, sent):
    """
    Ctrl-C and its relatives end with exit code 130, one line, and no file that was not there before.
    """
    space = large_pair
    child = start(space)
    child.send_signal(sent)
    _, stderr = child.communicate(timeout=30)

    assert child.returncode == 130
    assert stderr.splitlines()[-1] == "error: interrupted; what was finished is kept, nothing unfinished was left behind"
    assert finals(space) == []
    assert list((space.path / "cache" / "partial").iterdir()) == []


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=repr
)
def test_a_write_that_fails_loses_no_earlier_result(space: Space, monkeypatch, at, error):
    """
    Whatever fails at whatever write, the earlier artifact stays published and stored, and nothing partial remains.
    """
    space.pair(every=20)
    before = digests(space.build())
    published = (space.path / "out" / "mix.safetensors").read_bytes()
    space.edit("0.3 * A + 0.7 * B", "0.4 * A + 0.6 * B")
    honest, calls = writer.write_at, iter(range(10_000))

    def failing(handle, position, data):
        if next(calls) == at:
            raise error
        honest(handle, position, data)

    monkeypatch.setattr(writer, "write_at", failing)
    monkeypatch.setattr("sdmerge_build.passes.BATCH", 1024)
    with pytest.raises(SpaceError if getattr(error, "errno", 0) == errno.ENOSPC else type(error)):
        space.build()
    monkeypatch.undo()

    assert (space.path / "out" / "mix.safetensors").read_bytes() == published
    assert list((space.path / "cache" / "partial").iterdir()) == []
    space.edit("0.4 * A + 0.6 * B", "0.3 * A + 0.7 * B")
    again = space.build()
    assert (states(again), digests(again)) == ({"mix": "reused"}, before)


def test_a_flush_that_fails_is_not_tried_again(space: Space, monkeypatch):
    """
    After a failed flush the data may be lost, so the build fails even if a second flush would succeed.
    """
    space.pair()
    failures = iter([OSError(errno.EIO, "Input/output error")])

    def flush(_file):
        for error in failures:
            raise error

    monkeypatch.setattr(writer, "flush_to_disk", flush)
    with pytest.raises(OSError, match="Input/output error"):
        space.build()

    assert finals(space) == []


def test_a_file_larger_than_the_system_allows_is_no_space(large_pair: Space):
    """
    A limit of the system on file sizes ends with exit code 7 and says so.
    """
    space = large_pair
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000)); sys.argv[0] = 'sdbuild'; from sdmerge_build.__main__ import main; main()"
    run = subprocess.run([sys.executable, "-c", code, "recipe.toml"], cwd=space.path, capture_output=True, text=True, check=False)

    assert run.returncode == 7
    assert "a file is larger than this system allows; 315 MB are needed in all" in run.stderr
    assert list((space.path / "cache" / "partial").iterdir()) == []


def test_several_builds_at_once_make_one_artifact(space: Space):
    """
    Four commands that build the same recipe in the same store all succeed, and leave one artifact, whole.
    """
    space.pair(every=10)
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: space.sdbuild("recipe.toml", "--jobs", "1"), range(4)))

    assert [run.returncode for run in runs] == [0] * 4, runs
    assert len(list((space.path / "cache" / "artifacts").rglob("model.safetensors"))) == 1
    assert list((space.path / "cache" / "partial").iterdir()) == []
    assert set(checkpoints.miniature("sd1", "A", every=10)) == set(space.load("mix"))
