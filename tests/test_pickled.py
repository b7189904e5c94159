"""Pickled checkpoints: what they hold arrives bit by bit, and what they want to run is not run."""

from __future__ import annotations

import collections
import functools
import importlib
import io
import os
import pickle
import runpy
import struct
import subprocess
import sys
import time
import timeit
import warnings
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import checkpoints
import pytest
import torch
import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sdmerge_build.errors import IntegrityError, SpaceError
from sdmerge_build.formats import pickled
from sdmerge_build.formats.pickled import convert_pickle, looks_pickled
from sdmerge_build.formats.unpickle import Inert, Refusal, members

posix = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")


def weights() -> dict[str, torch.Tensor]:
    """Make a tensor of every kind that a checkpoint may hold."""
    whole = checkpoints.numbers("weights", "whole", (24, 16))
    return {
        "b.half": whole,
        "a.tied": whole,
        "c.turned": whole.t(),
        "d.part": whole[3:5],
        "e.bf16": checkpoints.numbers("weights", "e", (3, 5), torch.bfloat16),
        "f.float": checkpoints.numbers("weights", "f", (8, 4), torch.float32),
        "g.ids": torch.arange(77)[None],
        "h.flags": torch.tensor([True, False, True]),
        "i.small": torch.arange(16, dtype=torch.float32).to(torch.float8_e4m3fn),
        "j.scalar": torch.tensor(0.18215),
        "k.empty": torch.zeros(0, 4),
        "l.learnt": torch.nn.Parameter(torch.ones(2, 2)),
    }


def saved(path: Path, loaded: Any, *, zipped: bool = True) -> Path:
    torch.save(loaded, path, _use_new_zipfile_serialization=zipped)
    return path


def converted(path: Path) -> tuple[dict[str, torch.Tensor], list[str], bytes]:
    """Convert a file; return its tensors as the safetensors library reads them, what was left out, and the bytes."""
    target = path.with_suffix(".safetensors")
    left_out = convert_pickle(path, target)
    return load_file(target), left_out, target.read_bytes()


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def renamed(data: bytes, names: Mapping[bytes, bytes]) -> bytes:
    for old, new in names.items():
        assert data.count(old) == 1
        data = data.replace(old, new)
    return data


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_arrive_bit_by_bit_and_their_order_does_not_count(tmp_path: Path, zipped):
    """Whatever their dtypes, strides and shared storages: each tensor is written whole, and two orders give the same bytes."""
    there = weights()
    if not zipped:
        del there["i.small"]  # torch itself cannot read float8 in its old format
    plain = saved(tmp_path / "plain.pt", there, zipped=zipped)
    turned = saved(tmp_path / "turned.ckpt", {"epoch": 6, "state_dict": dict(reversed(there.items())), "x": {"y": torch.ones(3)}}, zipped=zipped)

    tensors, left_out, data = converted(plain)
    _, left_out_too, data_too = converted(turned)

    assert {name: bits(tensor) for name, tensor in tensors.items()} == {name: bits(tensor) for name, tensor in there.items()}
    assert left_out == []
    assert sorted(left_out_too) == ["epoch", "x"]
    assert data == data_too


def test_a_checkpoint_as_sd_1_4_has_it_is_converted(tmp_path: Path):
    """Lightning's callbacks and numpy's scalars, in the names of either numpy, stand beside the state dict and are left out."""
    numpy = pytest.importorskip("numpy")
    there = checkpoints.miniature("sd1", "old", every=8)
    best = numpy.float64(0.25)
    loaded = {"callbacks": {Callback: {"best_model_score": best, "seen": numpy.arange(3)}}, "global_step": 470000, "state_dict": there}
    path = rewritten(saved(tmp_path / "sd-v1-4.ckpt", loaded), {b"c__main__\nCallback\n": b"c" + LIGHTNING + b"\n"})
    old = rewritten(path, {b"cnumpy._core.multiarray\nscalar\n": b"cnumpy.core.multiarray\nscalar\n"}, tmp_path / "old.ckpt")

    tensors, left_out, data = converted(path)

    assert {name: bits(tensor) for name, tensor in tensors.items()} == {name: bits(tensor) for name, tensor in there.items()}
    assert sorted(left_out) == ["callbacks", "global_step"]
    assert converted(old)[2] == data


LIGHTNING = b"pytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint"


class Callback:
    """Stands for a class of a library that is not installed."""


Callback.__module__ = "__main__"
sys.modules["__main__"].Callback = Callback  # type: ignore[attr-defined]  pickle looks it up


def archive(path: Path, files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as written:
        for name, data in files.items():
            written.writestr(name, data)
    return path


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as read:
        return {name: read.read(name) for name in read.namelist()}


def rewritten(path: Path, names: Mapping[bytes, bytes], target: Path | None = None) -> Path:
    """Change words of a checkpoint's pickle."""
    files = contents(path)
    return archive(target or path, {name: renamed(data, names) if name.endswith("data.pkl") else data for name, data in files.items()})


class Call:
    """Pickles as a call of anything with anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __call__(self) -> None:
        """Let pickle believe that what a call returns can be called."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Pickle as the call."""
        return self.call


def dumped(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps({"state_dict": {"w": value}}, protocol)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def nested_setstate(command: str) -> bytes:
    """BUILD gives an OrderedDict a `__setstate__` that is `system`, and a second BUILD calls it."""
    return b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__setstate__") + b"cposix\nsystem\nsb" + text(command) + b"b."


def with_state(value: Any) -> Any:
    made = collections.OrderedDict(w=1)
    made.extra = value  # type: ignore[attr-defined]
    return made


def attacks(canary: Path) -> dict[str, bytes]:
    """Pickles that make a file, each in another way."""
    shell, line = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    script, inner = canary.with_suffix(".py"), canary.with_suffix(".pt")  # see `written`
    trusted = Call(torch.serialization.add_safe_globals, [os.system])
    chained = Call(Call(getattr, Call(importlib.import_module, "os"), "system"), shell)
    return {
        "os.system": dumped(Call(os.system, shell)),
        "os.system of protocol 0": dumped(Call(os.system, shell), 0),
        "os.system by STACK_GLOBAL": dumped(Call(os.system, shell), 4),
        "os.system before all else": pickle.dumps(Call(os.system, shell), 2),
        "os.system as posix's": b"\x80\x02cposix\nsystem\n(" + text(shell) + b"tR.",
        "os.system by INST": b"(S'" + shell.encode() + b"'\niposix\nsystem\n.",
        "os.system by OBJ": b"(cposix\nsystem\nS'" + shell.encode() + b"'\no.",
        "subprocess.Popen": dumped(Call(subprocess.check_call, ["touch", str(canary)])),
        "eval": dumped(Call(eval, line)),
        "exec of Python 2": b"\x80\x02c__builtin__\nexec\n(" + text(line) + b"tR.",
        "open": dumped(Call(open, str(canary), "w")),
        "io.FileIO": dumped(Call(io.FileIO, str(canary), "w")),
        "os.mkdir": dumped(Call(os.mkdir, str(canary))),
        "runpy": dumped(Call(runpy.run_path, str(script))),
        "timeit": dumped(Call(timeit.timeit, line, "pass", timeit.default_timer, 1)),
        "pickle.loads": dumped(Call(pickle.loads, pickle.dumps(Call(os.system, shell), 2))),
        "torch.load": dumped(Call(functools.partial(torch.load, weights_only=False), str(inner))),
        "torch.utils.collect_env.run": b"\x80\x02ctorch.utils.collect_env\nrun\n(" + text(shell) + b"tR.",
        "pip.main": b"\x80\x02cpip\nmain\n((" + text("install") + text(str(canary.parent)) + b"ltR.",
        "getattr": dumped(chained),
        "names made safe first": dumped([trusted, Call(os.system, shell)]),
        "in the state": pickle.dumps(with_state(Call(os.system, shell)), 2),
        "as __setstate__": nested_setstate(shell),
        "in a numpy scalar": b"\x80\x02cnumpy.core.multiarray\nscalar\n(cposix\nsystem\n(" + text(shell) + b"tRtR.",
    }


ATTACKS = attacks(Path("canary"))


def legacy(data: bytes) -> bytes:
    """Wrap a pickle as torch did before 1.6."""
    start = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}})
    return b"".join(pickle.dumps(value, 2) for value in start) + data + pickle.dumps([], 2)


def zipped(path: Path, data: bytes, files: Mapping[str, bytes] | None = None) -> Path:
    """Wrap a pickle as torch does."""
    return archive(path, {"archive/data.pkl": data, "archive/version": b"3\n", "archive/data/0": bytes(64)} | dict(files or {}))


def written(folder: Path) -> dict[str, Path]:
    """Write every attack as a file, every other in the old format; each has its own canary."""
    files = {}
    for n, name in enumerate(ATTACKS):
        canary = folder / f"canary{n}"
        canary.with_suffix(".py").write_text(f"open({str(canary)!r}, 'w').close()")
        canary.with_suffix(".pt").write_bytes(legacy(pickle.dumps(Call(os.system, f"touch {canary}"), 2)))
        data, path = attacks(canary)[name], folder / f"attack{n}.ckpt"
        if n % 2:
            path.write_bytes(legacy(data))
        else:
            zipped(path, data)
        files[name] = path
    return files


def outcome(path: Path) -> BaseException | list[str]:
    """Convert a file within a minute, thirty times what starting torch takes, and return whatever comes of it."""
    try:
        return convert_pickle(path, path.with_suffix(".made"), seconds=60)
    except Exception as error:  # noqa: BLE001  the tests look at it
        return error


class Reader(warm.Process):
    """The process that reads a pickle, started warm: it gives up its rights and reads as ever."""

    def __init__(self, command: list[str], *, env: Mapping[str, str], stdout: IO[bytes], **_silent: int) -> None:
        module, *arguments = command[command.index("-m") + 1 :]
        with Path(os.devnull).open("wb") as nothing:
            super().__init__(module, arguments, env, (stdout.fileno(), nothing.fileno()))


def outcomes(files: Mapping[str, Path]) -> dict[str, BaseException | list[str]]:
    """Convert files, fifty of which would take two minutes of starting torch."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        if warm.POSSIBLE:
            names = {"Popen": Reader, "DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
            patch.setattr(pickled, "subprocess", SimpleNamespace(**names))
        return dict(zip(files, pool.map(outcome, files.values()), strict=True))


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, BaseException | list[str]]]:
    """Try to convert every attack."""
    folder = tmp_path_factory.mktemp("attacks")
    return folder, outcomes(written(folder))


@posix
@pytest.mark.parametrize("n", range(len(ATTACKS)), ids=ATTACKS)
def test_a_malicious_pickle_is_refused_and_runs_nothing(attacked, n):
    """Each attack is refused as such, with exit code 4; what it would have made is not there, nor a target."""
    folder, results = attacked
    error = results[list(ATTACKS)[n]]

    assert isinstance(error, IntegrityError), error
    assert "nothing was run" in str(error) or "torch cannot read it" in str(error)
    assert error.issues[0].where == str(folder / f"attack{n}.ckpt")
    assert not (folder / f"canary{n}").exists()
    assert not (folder / f"attack{n}.made").exists()


@posix
def test_the_attacks_are_real(tmp_path: Path):
    """Python's own unpickler runs every attack; only `pip.main` is not tried, and what needs an old numpy."""
    written(tmp_path)
    for n, data in enumerate(attacks(tmp_path / f"canary{n}")[name] for n, name in enumerate(ATTACKS)):
        (tmp_path / f"{n}.pkl").write_bytes(data)
    tried = [str(n) for n, name in enumerate(ATTACKS) if name != "pip.main"]
    loop = "import pickle, sys\nfor n in sys.argv[1:]:\n  try: pickle.load(open(n + '.pkl', 'rb'))\n  except Exception as e: pass"

    subprocess.run([sys.executable, "-W", "ignore", "-c", loop, *tried], cwd=tmp_path, check=True, capture_output=True)

    assert [n for n in tried if not (tmp_path / f"canary{n}").exists()] == []


def storage(kind: str, key: str, numel: int, view: bytes = b"") -> bytes:
    """Ask for a storage of the file; the old format also says of what it is a view."""
    return b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + b"J" + struct.pack("<i", numel) + view + b"tQ"


def rebuilt(made: bytes, size: int, stride: int) -> bytes:
    """Rebuild a tensor of one dimension from a storage."""
    numbers = b"J" + struct.pack("<i", size) + b"\x85J" + struct.pack("<i", stride) + b"\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + made + b"K\x00" + numbers + b"\x89ccollections\nOrderedDict\n)RtR"


def one(tensor: bytes, name: str = "w") -> bytes:
    """Make a state dict of one tensor."""
    return b"\x80\x02}" + text(name) + tensor + b"s."


def quantized(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop the kind
        saved(path, {"w": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)})


HALVES = storage("HalfStorage", "0", 32)  # the 64 bytes that `zipped` adds
NO_VIEW = b"N"
ODD: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "sparse": ("`w` is not dense", lambda path: saved(path, {"w": torch.eye(3).to_sparse()})),
    "complex": ("`w` is torch.complex64", lambda path: saved(path, {"w": torch.ones(2, dtype=torch.complex64)})),
    "quantized": ("`w` is torch.qint8", quantized),
    "meta": ("`w` is not dense", lambda path: saved(path, {"w": torch.ones(2, device="meta")})),
    "strange name": ("`a\\nb` has a name", lambda path: saved(path, {"a\nb": torch.ones(2)})),
    "metadata": ("`__metadata__` has a name", lambda path: saved(path, {"__metadata__": torch.ones(2)})),
    "number as name": ("`(int)` has a name", lambda path: saved(path, {7: torch.ones(2)})),
    "no tensors": ("holds no tensors", lambda path: saved(path, {"state_dict": {"a": 1}, "w": torch.ones(2)})),
    "a list": ("a list, not a state dict", lambda path: saved(path, [torch.ones(2)])),
    "expanded": ("has 4000000000 bytes, but only 4 are stored", lambda path: saved(path, {"w": torch.ones(1).expand(10**9)})),
    "laughs": ("more than twice as large", lambda path: saved(path, dict.fromkeys(map(str, range(300)), torch.ones(10**6)))),
    "never written": ("the file does not hold", lambda path: zipped(path, one(b"ctorch\nFloatTensor\nK\x20\x85R"))),
    "never written, legacy": (
        "the file does not hold",
        lambda path: path.write_bytes(legacy(one(rebuilt(storage("HalfStorage", "0", 32, NO_VIEW), 32, 1)))),
    ),
    "storage too large": ("the file does not hold", lambda path: zipped(path, one(rebuilt(storage("HalfStorage", "0", 48), 48, 1)))),
    "beyond the storage": ("torch cannot read it", lambda path: zipped(path, one(rebuilt(HALVES, 33, 1)))),
    "negative": ("torch cannot read it", lambda path: zipped(path, one(rebuilt(storage("HalfStorage", "0", -4), 4, 1)))),
    "truncated": ("not a whole zip file", lambda path: path.write_bytes(saved(path, weights()).read_bytes()[:-700])),
    "truncated, legacy": ("torch cannot read it", lambda path: path.write_bytes(saved(path, weights(), zipped=False).read_bytes()[:-70])),
    "compressed": ("compressed", lambda path: archive(path, {"a/data.pkl": one(HALVES), "a/data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED)),
    "empty pickle": ("torch cannot read it", lambda path: zipped(path, b"")),
    "TorchScript": ("torch cannot read it", lambda path: zipped(path, b"", {"archive/constants.pkl": b""})),
    "noise": ("torch cannot read it", lambda path: path.write_bytes(b"\x80\x02" + torch.arange(9999).numpy().tobytes())),
    "a terabyte": ("more memory", lambda path: zipped(path, one(b"cbuiltins\nbytearray\n\x8a\x06\0\x10\xa5\xd4\xe8\0\x85R"))),
    "a terabyte, legacy": ("more memory", lambda path: path.write_bytes(legacy(one(storage("DoubleStorage", "0", 2**31 - 1, NO_VIEW))))),
    "a long text": ("more memory", lambda path: path.write_bytes(legacy(b"\x80\x02X\xff\xff\xff\xff"))),
    "a codec's import": ("`import` of `encodings.", lambda path: zipped(path, one(b"c_codecs\nencode\n" + text("a") + text("rot13") + b"\x86R"))),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, BaseException | list[str]]]:
    """Try to convert every odd file."""
    folder = tmp_path_factory.mktemp("odd")
    files = {}
    for n, (name, (_, make)) in enumerate(ODD.items()):
        files[name] = folder / f"{n}.ckpt"
        make(files[name])
    return folder, outcomes(files)


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_plain_state_dict_is_refused_by_name(refused, name):
    """The refusal says what is wrong, in one printable line for the reason; no file is left behind."""
    folder, results = refused
    error = results[name]

    assert isinstance(error, IntegrityError), error
    assert ODD[name][0] in str(error)
    assert error.issues[0].what.isprintable()
    assert list(folder.glob("*.made")) == []


def stretch(file: zipfile.ZipFile) -> None:
    """Let a member's directory entry claim more bytes than it has."""
    first = file.infolist()[0]
    first.file_size = first.compress_size = 160


def test_an_endless_pickle_ends(tmp_path: Path):
    """A key that would take 2⁶⁰ steps to hash, each tuple being twice the one before, is given up when its time is over."""
    twice = b"h\x00h\x00\x86q\x00" * 60
    path = zipped(tmp_path / "endless.ckpt", b"\x80\x02)q\x00" + twice + b"}h\x00K\x01s.")

    with pytest.raises(IntegrityError, match="more than 5 s"):
        convert_pickle(path, tmp_path / "made", seconds=5)

    assert not (tmp_path / "made").exists()


ZIPS: dict[str, tuple[str, Callable[[zipfile.ZipFile], Any]]] = {
    "an absolute name": ("points outside", lambda file: file.writestr("/etc/x", b"1")),
    "a name with ..": ("points outside", lambda file: file.writestr("archive/../../x", b"1")),
    "a drive": ("points outside", lambda file: file.writestr("C:x", b"1")),
    "a name twice": ("two files of one name", lambda file: [file.writestr("a", b"1"), file.writestr("a", b"2")]),
    "overlaps": ("overlap", lambda file: [file.writestr("a", b"1" * 99), file.writestr("b", b"1"), stretch(file)]),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("says", "fill"), ZIPS.values(), ids=ZIPS)
def test_a_zip_file_that_torch_never_writes_is_refused(tmp_path: Path, says, fill):
    """Names that point elsewhere, names used twice and members that overlap are refused before torch sees the file."""
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        fill(file)

    with pytest.raises(Refusal, match=says):
        members(str(path))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_to_a_zip_file_is_a_refusal_or_nothing(tmp_path_factory, data):
    """Whatever bytes of a small zip file change: its members are known, within it, or it is refused."""
    path = zipped(tmp_path_factory.getbasetemp() / "damaged.ckpt", b"\x80\x02}.")
    damaged = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)

    try:
        found = members(str(path))
    except Refusal:
        return
    assert all(0 <= start and start + size <= len(damaged) for start, size in found.items())


FORBIDDEN = {
    "socket": "import socket; socket.socket()",
    "subprocess": "import subprocess; subprocess.run(['touch', 'canary'])",
    "os.system": "os.system('touch canary')",
    "os.fork": "os.fork()",
    "os.execv": "os.execv('/usr/bin/touch', ['touch', 'canary'])",
    "posix_spawn": "os.posix_spawn('/usr/bin/touch', ['touch', 'canary'], {})",
    "write": "open('canary', 'w')",
    "append": "os.open('source', os.O_APPEND | os.O_WRONLY)",
    "read": "open('/etc/passwd')",
    "remove": "os.remove('source')",
    "rename": "os.rename('source', 'canary')",
    "chmod": "os.chmod('source', 0)",
    "mkdir": "os.mkdir('canary')",
    "listdir": "os.listdir('.')",
    "kill": "os.kill(os.getppid(), 0)",
    "ctypes": "ctypes.CDLL(None)",
    "import": "import wave",
    "eval": "eval('1')",
    "pickle": "import pickle; pickle.loads(b'cbuiltins\\nlist\\n.')",
    "caught": "\ntry: os.remove('source')\nexcept BaseException: print('went on')",
}


@posix
@pytest.mark.parametrize("statement", FORBIDDEN.values(), ids=FORBIDDEN)
def test_the_audit_hook_ends_what_gets_past_the_unpickler(tmp_path: Path, statement):
    """Code that runs in the sealed process can read its file, and nothing else: any other deed ends the process before it is done."""
    (tmp_path / "source").write_text("here")
    start = "import ctypes, os, pickle, socket, subprocess\nfrom sdmerge_build.formats.unpickle import seal\nseal('source')\nopen('source').close()\n"

    run = subprocess.run([sys.executable, "-c", f"{start}{statement}\nprint('went on')"], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert "no conversion does" in run.stdout, run.stderr
    assert "went on" not in run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
def test_limits_hold():
    """The process that reads has a ceiling for memory, time, files and core dumps that it cannot lift, and no network where Linux allows that."""
    code = (
        "import resource\nfrom sdmerge_build.formats.unpickle import confine\nconfine(100, 1 << 20, 1 << 30)\n"
        "print(*[resource.getrlimit(getattr(resource, f'RLIMIT_{n}'))[1] for n in ('CPU', 'FSIZE', 'NOFILE', 'CORE', 'NPROC', 'AS')])"
    )

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    *limits, memory = map(int, run.stdout.split())
    assert limits == [100, 1 << 20, 64, 0, 0]
    assert 1 << 30 < memory < 64 << 30


@pytest.fixture
def impostor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Have a shell script in place of the process that reads; return a good checkpoint."""

    def install(script: str) -> Path:
        fake = tmp_path / "python"
        fake.write_text(f"#!/bin/sh\nshift 7\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(pickled.sys, "executable", str(fake))
        return saved(tmp_path / "x.ckpt", {"w": torch.ones(2)})

    return install


@posix
def test_the_reading_process_knows_no_secrets(impostor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the environment only a few names get there, none of them a token's, and standard input is closed."""
    for name in ("HF_TOKEN", "CIVITAI_API_TOKEN", "AWS_SECRET_ACCESS_KEY", "SDBUILD_STORE", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "PYTHONPATH"):
        monkeypatch.setenv(name, "canary")
    path = impostor(f"env > {tmp_path}/env; wc -c > {tmp_path}/input")

    with pytest.raises(IntegrityError):
        convert_pickle(path, tmp_path / "made")

    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert names <= {*pickled.KEPT, "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PWD", "SHLVL", "OLDPWD", "_"}
    assert "canary" not in (tmp_path / "env").read_text()
    assert (tmp_path / "input").read_text().split() == ["0"]


ANSWERS = {
    "a lie": ("echo '{\"ok\": true}'", IntegrityError, "too few"),
    "no answer": ("", IntegrityError, "exit code 0"),
    "noise": ("head -c 100000 /dev/zero", IntegrityError, "exit code 0"),
    "a list": ("echo []", IntegrityError, "exit code 0"),
    "a crash": ("kill -SEGV $$", IntegrityError, "SIGSEGV"),
    "its time is up": ("kill -XCPU $$", IntegrityError, "too long"),
    "a full disk": ('echo \'{"error": "full", "errno": 28}\'', SpaceError, "no space left"),
    "a bad disk": ('echo \'{"error": "bad", "errno": 5}\'', OSError, "bad"),
    "a changed source": ('echo >> "$1"; echo \'{"ok": true}\'', IntegrityError, "changed"),
    "sleep": ("exec sleep 60", IntegrityError, "more than 1 s"),
}


@posix
@pytest.mark.parametrize(("script", "kind", "says"), ANSWERS.values(), ids=ANSWERS)
def test_nothing_that_the_reading_process_does_is_believed_unseen(impostor, tmp_path: Path, script, kind, says):
    """Lies, crashes, silence and slowness are errors that say so; the target is gone, and so is everything else."""
    path = impostor(script)

    with pytest.raises(kind, match=says):
        convert_pickle(path, tmp_path / "made", seconds=1)

    assert sorted(file.name for file in tmp_path.iterdir()) == ["python", "x.ckpt"]


@posix
def test_an_interrupt_ends_the_reading_process_too(impostor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After Ctrl-C neither the process nor the target is there."""
    path = impostor(f"echo $$ > {tmp_path}/pid; exec sleep 60")

    class Interrupted(subprocess.Popen):
        """Ctrl-C comes while somebody waits for this process, which has begun."""

        def wait(self, timeout: float | None = None) -> int:
            """Be interrupted, unless it is for the end that is sure to come."""
            if timeout is None:
                return super().wait()
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
                time.sleep(0.01)
            raise KeyboardInterrupt

    monkeypatch.setattr(pickled.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_pickle(path, tmp_path / "made")

    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not (tmp_path / "made").exists()


def test_a_target_that_is_there_is_left_alone(tmp_path: Path):
    """A file at the target's place is neither written over nor removed."""
    target = tmp_path / "made"
    target.write_text("mine")

    with pytest.raises(FileExistsError):
        convert_pickle(saved(tmp_path / "x.ckpt", weights()), target)

    assert target.read_text() == "mine"


@pytest.mark.parametrize("zipped", [True, False])
def test_what_looks_pickled_is_what_torch_saves_and_no_safetensors_file(tmp_path: Path, zipped):
    """Both formats are recognised by their start; a safetensors file is not, even when its header's length begins as a pickle does."""
    assert looks_pickled(saved(tmp_path / "x.bin", weights(), zipped=zipped).read_bytes()[:16])
    for length in (0x0280, 0x0380, 0x10280, 0x2020480):
        assert not looks_pickled(length.to_bytes(8, "little") + b'{"a":1}')
    assert not looks_pickled(b"version https://")
    assert not looks_pickled(b"")


@pytest.mark.parametrize(
    ("name", "data", "says"), [("x.ckpt", b"<!doctype html>", "not a pickled"), ("x.safetensors", b"\x80\x02}.", "is named .safetensors")]
)
def test_what_is_no_pickle_by_its_start_or_name_is_refused_at_once(tmp_path: Path, name, data, says):
    """No process is started for a web page, nor for a name that torch would believe."""
    (tmp_path / name).write_bytes(data)

    with pytest.raises(IntegrityError, match=says):
        convert_pickle(tmp_path / name, tmp_path / "made")


def test_an_inert_stand_in_takes_anything_and_keeps_nothing():
    """It is made with any arguments, takes any state, and holds none of them."""
    made = Inert(1, "f8", [2])
    made.__setstate__({"a": 1})

    assert vars(made) == {}
