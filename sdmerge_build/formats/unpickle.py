"""Owns the reading of a pickle, in a process of its own: `python -m sdmerge_build.formats.unpickle SOURCE TARGET SECONDS`.

Has never heard of recipes, stores or the process that started it; it says how it went in one line of JSON, and exits with 0.

A pickle is a program, so four walls stand around it, each built as if the others were not there:

    torch's unpickler   `weights_only`: knows the names a state dict needs, and calls nothing else
    audit hook          what Python does from then on is read one file; anything else ends the process
    limits              memory, processor time, size of files, number of files and processes; no core dump
    name spaces         no network, where Linux lets a process give it up

A tensor is believed only if its storage is, to the byte, one that the file holds: neither memory that was never written nor a neighbour's bytes.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import io
import json
import os
import re
import signal
import sys
import zipfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, Self

from sdmerge_build.dtypes import ITEMSIZE
from sdmerge_build.errors import printable
from sdmerge_build.files import allocate
from sdmerge_build.tensorfile import MAX_NAME, MAX_TENSORS, Spec, lay_out

if TYPE_CHECKING:
    import torch

__all__ = ["Refusal", "confine", "convert", "main", "members", "seal"]

OLDEST_TORCH = (2, 10)  # before, a `weights_only` load could corrupt memory: CVE-2026-24747, and CVE-2025-32434 before 2.6
SPARE_MEMORY = 1 << 30  # bytes for the pickle's own objects
SPARE_SIZE = 64 << 20  # bytes that a result may be larger than twice its source
MAX_FILES = 64
CHUNK = 4 << 20
ZIP = b"PK\x03\x04"

INERT_NAMES = (  # beside the tensors of real checkpoints; with torch's own list, what AUTOMATIC1111's `modules/safe.py` lets pass
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pytorch_lightning.callbacks.model_checkpoint",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)
DTYPE_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
HARMLESS = frozenset({"builtins.id", "object.__getattr__", "object.__setattr__", "sys._getframe"})  # all that a load needs
_CLONE_NEWUSER, _CLONE_NEWNET, _PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 0x10000000, 0x40000000, 1, 38  # Linux
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Refusal(Exception):  # noqa: N818  it says what became of the file
    """The file is not converted; says why, and what to do about it."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


class Inert:
    """Stands for an object of a library that is not wanted: takes anything, keeps nothing, does nothing."""

    def __new__(cls, *_args: Any) -> Self:
        """Make one, whatever it is given."""
        return super().__new__(cls)

    def __setstate__(self, _state: Any) -> None:
        """Forget the state."""


def main() -> NoReturn:
    """Convert as the command line says, and print one line of JSON: `ok` and `left_out`, or `error`, `hint` and `errno`."""
    source, target, seconds = sys.argv[1:]
    try:
        answer = {"ok": True, "left_out": convert(source, target, int(seconds))}
    except Refusal as error:
        answer = {"error": str(error), "hint": error.hint}
    except MemoryError:
        answer = _out_of_memory()
    except OSError as error:
        answer = {"error": str(error), "errno": error.errno or 0}
    _leave(answer)


def _leave(answer: Mapping[str, Any]) -> NoReturn:
    os.write(1, json.dumps(answer).encode() + b"\n")
    os._exit(0)  # nothing of what was loaded gets a last word


def _out_of_memory() -> dict[str, Any]:
    return {"error": "it needs more memory than a file of its size may", "hint": "it is damaged, or meant to do harm"}


def convert(source: str, target: str, seconds: int) -> list[str]:
    """Write the tensors of a pickle to `target`, an empty file, and return the names of what was left out.

    Gives up most of this process's rights for good. Raises `Refusal`, `MemoryError`, and `OSError` when a file cannot be read or written.
    """
    with Path(target).open("r+b") as out:
        size = Path(source).stat().st_size
        most = 2 * size + SPARE_SIZE
        torch = confine(seconds, most, 3 * size + SPARE_MEMORY)
        seal(source)
        loaded, held = _load(torch, source)
        tensors, left_out = _state_dict(torch, loaded)
        specs = [_spec(torch, name, tensor, held) for name, tensor in tensors.items()]
        if sum(spec.nbytes for spec in specs) > most:  # tied weights are written once for each name: a file may double, not more
            raise Refusal("its tensors are more than twice as large as itself: the same bytes are used again and again")
        _write(torch, out, specs, tensors)
    return left_out


def confine(seconds: int, file_size: int, memory: int) -> Any:
    """Limit this process for good, as far as the system can, and return torch, imported and ready to load.

    Memory counts from what torch itself maps: 0.6 GB without CUDA, several with it. Raises `Refusal` when torch is too old.
    """
    for name, value in (("CPU", seconds), ("FSIZE", file_size), ("NOFILE", MAX_FILES), ("CORE", 0)):
        _limit(name, value)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc; a kernel that does not let go of the network
            libc = ctypes.CDLL(None)
            libc.unshare(_CLONE_NEWNET | (_CLONE_NEWUSER if os.geteuid() else 0))  # root needs no new user, and would lose its files
            libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # nobody would read the answer
    import torch  # noqa: PLC0415  within limits; and threads, which it starts, would keep the network

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise Refusal(f"torch {torch.__version__} is too old to read pickles safely", hint="update torch")
    torch.set_num_threads(1)
    torch.serialization.add_safe_globals([(Inert, name) for name in INERT_NAMES])
    for encoding in ("latin1", "cp437", "unicode_escape"):  # of numpy's scalars, of names in zip files, of strange names as they are shown
        codecs.lookup(encoding)
    for zipped in (True, False):  # what torch imports only when it loads is imported now
        memory_file = io.BytesIO()
        torch.save({"": torch.zeros(1)}, memory_file, _use_new_zipfile_serialization=zipped)
        memory_file.seek(0)
        torch.load(memory_file, weights_only=True)
    _limit("NPROC", 0)
    _limit("AS", _memory_in_use() + memory)
    return torch


def _limit(name: str, value: int) -> None:
    """Lower a limit, soft and hard, where the system has it."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource  # noqa: PLC0415  Windows has none

        kind = getattr(resource, f"RLIMIT_{name}")
        _, most = resource.getrlimit(kind)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def _memory_in_use() -> int:
    """Return the bytes of address space this process has; a guess that suits torch with CUDA where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 16 << 30


def seal(source: str) -> None:
    """From now on, end this process when Python does anything but read the file `source`: opens, imports, starts, connects, removes.

    Not an exception: whoever got so far could catch it. An event that is not known is refused, so a new Python may refuse more, never less.
    """

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in HARMLESS or (event == "open" and args[0] == source and not args[2] & _WRITING):
            return
        detail = f" of `{args[0]!s:.80}`" if args and isinstance(args[0], str) else ""
        _leave({"error": f"it tried to do what no conversion does: `{event}`{detail}", "hint": "do not load this file anywhere"})

    sys.addaudithook(watch)


def _load(torch: Any, source: str) -> tuple[Any, dict[int, int]]:
    """Unpickle a file; return its object, and the size of every storage the file holds by its address in memory."""
    held: dict[int, int] = {}
    from_file, set_from_file = torch.UntypedStorage.from_file, torch.UntypedStorage._set_from_file  # noqa: SLF001  how old files are read
    with Path(source).open("rb") as file:
        zipped = file.read(len(ZIP)) == ZIP
    sizes = members(source) if zipped else {}

    def map_file(*args: Any) -> Any:
        storage = from_file(*args)
        held.update((storage.data_ptr() + start, size) for start, size in sizes.items())
        return storage

    def read_storage(storage: Any, *args: Any) -> Any:
        result = set_from_file(storage, *args)
        held[storage.data_ptr()] = storage.nbytes()
        return result

    torch.UntypedStorage.from_file, torch.UntypedStorage._set_from_file = map_file, read_storage  # noqa: SLF001
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=zipped), held
    except MemoryError:
        raise
    except Exception as error:
        if re.search("not enough memory|allocate memory|unable to mmap", str(error)):
            raise MemoryError from error
        raise Refusal(*_reason(error)) from error


def _reason(error: Exception) -> tuple[str, str]:
    """Say what torch says against a file, without its advice to load it all the same; and a hint."""
    text = str(error)
    if named := re.search(r"GLOBAL (\S{1,200})", text):
        return f"it names `{named[1]}`, which no state dict needs; nothing was run", "load it nowhere; look for a safetensors file of the same model"
    text = text.rpartition("WeightsUnpickler error: ")[2].partition("\n\nCheck the documentation")[0]
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    return f"torch cannot read it: {type(error).__name__}: {lines[-1].strip():.200}", "is it a checkpoint, and is the download complete?"


def members(source: str) -> dict[int, int]:
    """Return the size of every member of a zip file by the position of its first byte.

    Raises `Refusal` for what `torch.save` never writes: compressed or encrypted members, names used twice or pointing elsewhere, overlaps.
    """
    try:
        with zipfile.ZipFile(source) as archive, Path(source).open("rb") as file:
            infos = archive.infolist()
            places = sorted(((_data_start(file, info), info) for info in infos), key=lambda place: place[0])
            end = file.seek(0, os.SEEK_END)
    except Exception as error:  # `zipfile` raises a dozen kinds for damaged files
        raise Refusal(f"it is not a whole zip file: {error!s:.200}", hint="is the download complete?") from error
    if len(infos) > 2 * MAX_TENSORS:
        raise Refusal(f"it holds {len(infos)} files; no checkpoint does")
    if len({info.filename for info in infos}) != len(infos):
        raise Refusal("it holds two files of one name")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise Refusal(f"`{_shown(info.filename)}` in it is compressed or encrypted; torch never does that")
        if re.match(r"[/\\]|.:", info.filename) or ".." in re.split(r"[/\\]", info.filename):
            raise Refusal(f"it holds a file named `{_shown(info.filename)}`, which points outside")
    ends = [(start, start + info.file_size) for start, info in places] + [(end, end)]
    if any(stop > start for (_, stop), (start, _) in pairwise(ends)):
        raise Refusal("files in it overlap, or reach beyond its end", hint="is the download complete?")
    return {start: info.file_size for start, info in places if info.file_size}


def _data_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Return where a member's bytes begin, after its own header with its own idea of names."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(ZIP):
        raise ValueError(f"`{_shown(info.filename)}` is not where the directory says")
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _shown(name: object) -> str:
    """Make a hostile name safe to print, and short; what is not text is not asked for any."""
    return printable(name[:80]) if isinstance(name, str) else f"({type(name).__name__})"


def _state_dict(torch: Any, loaded: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Pick the tensors of a state dict, bare or beside other things; return the names of the other things too."""
    if not isinstance(loaded, dict):
        raise Refusal(f"it holds a {type(loaded).__name__}, not a state dict")
    left_out: list[str] = []
    if isinstance(loaded.get("state_dict"), dict):
        left_out += [_shown(name) for name in loaded if name != "state_dict"]
        loaded = loaded["state_dict"]
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    left_out += [_shown(name) for name in loaded if name not in tensors]
    if not tensors:
        raise Refusal("it holds no tensors where a state dict has them", hint="is it the checkpoint of a model, not of an optimizer or embedding?")
    if len(tensors) > MAX_TENSORS:
        raise Refusal(f"it holds {len(tensors)} tensors; no more than {MAX_TENSORS} are read")
    return tensors, left_out[:100]


def _spec(torch: Any, name: Any, tensor: Any, held: Mapping[int, int]) -> Spec:
    """Describe a tensor for a header, or refuse what safetensors cannot hold and what the file itself does not."""

    def refuse(what: str) -> NoReturn:
        raise Refusal(f"tensor `{_shown(name)}` {what}")

    if not isinstance(name, str) or not name or len(name) > MAX_NAME or not name.isprintable() or name == "__metadata__":
        refuse(f"has a name that is not text, empty, longer than {MAX_NAME}, or not printable")
    if type(tensor) not in {torch.Tensor, torch.nn.Parameter} or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        refuse("is not dense, or a kind of its own")
    plain = torch.Tensor.detach(tensor)  # a pickle can hang attributes on a parameter, `numel` too; those stay behind
    dtype = DTYPE_NAMES.get(str(plain.dtype).removeprefix("torch."), "")
    if dtype not in ITEMSIZE or plain.is_nested or plain.is_neg():
        refuse(f"is {plain.dtype}, which a converted file does not hold")
    spec = Spec(name, dtype, tuple(plain.shape))
    storage = plain.untyped_storage()
    if spec.nbytes > storage.nbytes():
        refuse(f"has {spec.nbytes} bytes, but only {storage.nbytes()} are stored")
    if storage.nbytes() and held.get(storage.data_ptr()) != storage.nbytes():
        refuse(f"wants {storage.nbytes()} bytes that the file does not hold in one piece")
    return spec


def _write(torch: Any, out: BinaryIO, specs: Iterable[Spec], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the canonical file: the same tensors give the same bytes, whatever their order, strides and storages were."""
    layout = lay_out(specs, {"format": "pt"})
    allocate(out, layout.size)
    out.write(layout.header)
    buffer = bytearray(CHUNK)
    window = torch.frombuffer(buffer, dtype=torch.uint8)
    for spec in layout.specs:
        data = torch.Tensor.detach(tensors[spec.name]).contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, spec.nbytes, CHUNK):
            piece = data[start : start + CHUNK]
            window[: len(piece)].copy_(piece)
            out.write(memoryview(buffer)[: len(piece)])
    out.flush()
    os.fsync(out.fileno())


if __name__ == "__main__":
    main()
