"""The safetensors format: files that lie are refused by name, what we write is what the library reads."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import tracemalloc
from pathlib import Path

import checkpoints
import pytest
import safetensors
import torch
from hostile.files import LIES, UNUSUAL, entry
from hostile.files import safetensors as file_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sdmerge_build.dtypes import ITEMSIZE
from sdmerge_build.errors import IntegrityError
from sdmerge_build.tensorfile import Layout, Spec, file_order, lay_out, read_header

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
IN_PLACE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # tmp_path is overwritten


def refusal(path: Path) -> IntegrityError:
    """Read a header that must be refused."""
    with pytest.raises(IntegrityError) as caught:
        read_header(path)
    return caught.value


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_file_that_lies_is_refused_by_name_in_bounded_memory(tmp_path: Path, lie):
    """A file whose header lies is refused with exit code 4 in less than 300 MB; the refusal names the file and the tensor at fault."""
    path = tmp_path / "stranger.safetensors"
    path.write_bytes(lie.make())

    error = refusal(path)
    tracemalloc.start()
    try:
        refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert error.exit_code == 4
    assert all(issue.where == str(path) for issue in error.issues)
    for text in lie.says:
        assert text in str(error)
    assert str(error).replace("\n", "").isprintable()
    assert len(str(error)) < 4000
    assert peak < 300e6


@pytest.mark.parametrize("content", UNUSUAL.values(), ids=UNUSUAL)
def test_a_file_that_is_only_unusual_is_read_as_the_library_reads_it(tmp_path: Path, content):
    """What the format allows is read, however odd; a tensor's name is never used as a path."""
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)

    theirs = {name: (info["dtype"], tuple(info["shape"])) for name, info in safetensors.deserialize(content)}
    assert theirs == {name: (spec.dtype, spec.shape) for name, spec in read_header(path).tensors.items()}


def test_every_known_dtype_is_one_the_library_knows_at_that_width(tmp_path: Path):
    """A file with one tensor of each dtype we know is read alike by us and by the library."""
    offsets = list(itertools.accumulate(ITEMSIZE.values(), initial=0))
    content = file_of({d: entry(b, e, d, (1,)) for d, b, e in zip(ITEMSIZE, offsets, offsets[1:], strict=False)}, offsets[-1])
    (tmp_path / "all.safetensors").write_bytes(content)

    assert set(ITEMSIZE) == {info["dtype"] for _, info in safetensors.deserialize(content)}
    assert set(ITEMSIZE) == set(read_header(tmp_path / "all.safetensors").tensors)


def test_complaints_are_gathered_and_the_first_few_told(tmp_path: Path):
    """A header with many bad tensors is refused once, with the first five of them named in file order."""
    path = tmp_path / "many.safetensors"
    path.write_bytes(file_of({f"layer.{n}.weight": entry(dtype="F31") for n in range(40)}))

    assert [f"tensor `layer.{n}.weight` has dtype `F31`, which is not known" for n in range(5)] == [issue.what for issue in refusal(path).issues]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_fifo_is_refused_at_once(tmp_path: Path):
    """A pipe in place of a checkpoint is refused without waiting for somebody to write into it."""
    os.mkfifo(tmp_path / "pipe.safetensors")

    assert f"{tmp_path / 'pipe.safetensors'}: is not a regular file" == str(refusal(tmp_path / "pipe.safetensors"))


def test_a_folder_is_refused(tmp_path: Path):
    """A folder in place of a checkpoint is refused in the same words on every system."""
    assert f"{tmp_path}: is not a regular file" == str(refusal(tmp_path))


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path):
    """Whether a missing file is a mistake is for the caller to say."""
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "gone.safetensors")


def test_every_cut_of_a_good_file_is_refused(tmp_path: Path):
    """A download that stopped at any byte is never taken for a checkpoint."""
    path = tmp_path / "cut.safetensors"
    whole = file_of({"w": entry(), "b": entry(16, 24, "F16", (4,))}, 24)
    path.write_bytes(whole)
    assert {"w", "b"} == set(read_header(path).tensors)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert str(path) in str(refusal(path))


names = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
specs = st.lists(st.builds(Spec, names, st.sampled_from(sorted(ITEMSIZE)), shapes), max_size=12, unique_by=lambda spec: spec.name)
metadata = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), st.text(st.characters(codec="utf-8"), max_size=20), max_size=4)


@IN_PLACE
@given(specs=specs, said=metadata)
def test_what_is_laid_out_is_read_back(tmp_path: Path, specs: list[Spec], said: dict[str, str]):
    """For any set of tensors, a file laid out by us is read back by us, and by the library, as the same names, dtypes, shapes and metadata."""
    layout = lay_out(specs, said)
    path = tmp_path / "any.safetensors"
    content = layout.header + bytes(layout.size - len(layout.header))
    path.write_bytes(content)

    header = read_header(path)
    assert {spec.name: spec for spec in layout.specs} == header.tensors
    assert {(s.name, s.dtype, s.shape) for s in specs} == {(s.name, s.dtype, s.shape) for s in header.tensors.values()}
    assert said == header.metadata
    assert len(content) == header.file_size == layout.size
    assert {s.name: (s.dtype, s.shape) for s in specs} == {n: (i["dtype"], tuple(i["shape"])) for n, i in safetensors.deserialize(content)}


@settings(deadline=None)
@given(specs=specs)
def test_every_tensor_lies_on_a_multiple_of_its_own_width(specs: list[Spec]):
    """A reader may map any tensor of our files in place."""
    layout = lay_out(specs, {"title": "x"})
    assert len(layout.header) % 8 == 0
    assert [spec for spec in layout.specs if spec.offset % ITEMSIZE[spec.dtype]] == []


@settings(deadline=None)
@given(specs=specs, dtype=st.sampled_from(["F16", "F32", "BF16", "F64"]))
def test_the_order_hardly_depends_on_dtypes(specs: list[Spec], dtype: str):
    """Tensors of a multiple of eight elements come in one order whatever their dtype, so that one pass can write artifacts of several."""
    even = [spec for spec in specs if spec.numel % 8 == 0]
    other = [Spec(spec.name, dtype, spec.shape) for spec in even]

    assert [spec.name for spec in lay_out(even, {}).specs] == [spec.name for spec in lay_out(other, {}).specs]
    assert sorted(spec.name for spec in even) == [spec.name for spec in sorted(even, key=file_order)]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_tensors_are_given_does_not_matter(seed: int):
    """The same tensors and metadata, shuffled, are laid out as the same bytes."""
    given_specs = [Spec(name, "F16", tuple(t.shape)) for name, t in checkpoints.miniature("sd1", "A", every=9).items()]
    said = {"modelspec.title": "mix", "format": "pt", "modelspec.author": "Estrilda", "sd_merge_recipe": "{}"}
    expected = lay_out(given_specs, said)

    shuffle = random.Random(seed).shuffle
    shuffled, entries = list(given_specs), list(said.items())
    shuffle(shuffled)
    shuffle(entries)
    assert shuffled != given_specs
    assert expected == lay_out(shuffled, dict(entries))


def write_layout(path: Path, layout: Layout, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors of a layout behind its header, as the writer of artifacts does."""
    body = b"".join(tensors[spec.name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for spec in layout.specs)
    path.write_bytes(layout.header + body)


def test_the_library_reads_back_what_we_write(tmp_path: Path):
    """Mixed dtypes, scalars, empty and odd tensors, laid out by us, come back from the safetensors library bit for bit."""
    tensors = checkpoints.miniature("sd1", "A", every=25)
    tensors |= {f"odd.{d}": checkpoints.numbers("A", d, (3, 7), torch.float64).to(t) for d, t in TORCH_DTYPES.items()}
    tensors |= {"scalar": torch.tensor(0.18215), "empty": torch.zeros(0, 4), "model_ema.num_updates": torch.tensor(7)}
    ours = {t: d for d, t in TORCH_DTYPES.items()}
    layout = lay_out([Spec(name, ours[t.dtype], tuple(t.shape)) for name, t in tensors.items()], {"format": "pt"})
    write_layout(tmp_path / "ours.safetensors", layout, tensors)

    loaded = load_file(tmp_path / "ours.safetensors")
    assert tensors.keys() == loaded.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == loaded[name].dtype
        assert torch.equal(tensor, loaded[name]), name


def test_we_read_what_the_library_writes(tmp_path: Path):
    """A checkpoint saved by other tools has the tensors and metadata they gave it."""
    tensors = checkpoints.miniature("sdxl", "B", every=60)
    header = read_header(checkpoints.write(tmp_path / "B.safetensors", tensors, {"format": "pt", "ss_base": "sdxl"}))

    assert {name: tuple(t.shape) for name, t in tensors.items()} == {name: spec.shape for name, spec in header.tensors.items()}
    assert header.metadata == {"format": "pt", "ss_base": "sdxl"}


pieces = st.one_of(
    st.integers(-1, 40),
    st.sampled_from([0, 16, 16.0, True, None, "16", 2**62, 2**63, -1, [], "F32", "F16", "I8", "F4"]),
)
entries = st.one_of(
    st.builds(entry, st.just(0), st.just(16)),
    st.builds(entry, pieces, pieces, st.sampled_from(["F32", "F16", "U8", "F4", "F31", 3]), st.lists(pieces, max_size=3).map(tuple)),
    st.builds(lambda b, n, d: entry(b, b + n * ITEMSIZE[d], d, (n,)), st.integers(0, 16), st.integers(0, 4), st.sampled_from(["F32", "F16", "U8"])),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), pieces),
)
tables = st.dictionaries(st.sampled_from(["", "a", "b", "c.weight", "__metadata__"]), entries | st.just({"format": "pt"}), max_size=3)


@IN_PLACE
@given(table=tables, data=st.integers(0, 40), flip=st.none() | st.tuples(st.integers(0, 60), st.integers(0, 255)))
def test_whatever_we_accept_the_library_accepts(tmp_path: Path, table: dict, data: int, flip: tuple[int, int] | None):
    """No header, however mangled, is read by us and refused by the reference reader, or read as something else; none crashes us."""
    raw = bytearray(json.dumps(table).encode())
    if flip:
        raw[flip[0] % len(raw)] = flip[1]
    content = file_of(bytes(raw), data)
    path = tmp_path / "fuzzed.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except IntegrityError:
        return
    theirs = {name: (info["dtype"], tuple(info["shape"]), len(info["data"])) for name, info in safetensors.deserialize(content)}
    assert theirs == {name: (s.dtype, s.shape, s.nbytes) for name, s in header.tensors.items()}


@IN_PLACE
@given(content=st.binary(max_size=80), length=st.integers(0, 90) | st.none())
def test_random_bytes_are_refused_and_never_crash(tmp_path: Path, content: bytes, length: int | None):
    """Bytes that are no safetensors file end in `IntegrityError` and in nothing else."""
    path = tmp_path / "noise.safetensors"
    path.write_bytes(content if length is None else length.to_bytes(8, "little") + content)
    if read_as_empty(path):
        return
    assert str(path) in str(refusal(path))


def read_as_empty(path: Path) -> bool:
    """Tell whether the library sees a file without tensors, which is what `{}` is."""
    try:
        return not safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError:
        return False


def test_sizes_are_counted_in_elements_and_bytes():
    """A spec knows its size; that of a scalar is one element."""
    spec = Spec("w", "BF16", (320, 4, 3, 3))
    assert (spec.numel, spec.nbytes) == (11520, 23040)
    assert math.prod(()) == Spec("s", "F32", ()).numel
