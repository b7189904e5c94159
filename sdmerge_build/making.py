"""Owns the making of adapters: what a step drafted is computed in one piece, tensor by tensor in threads, and written as a file.

Has never heard of the store, keys or what is wanted. An adapter is small, so that its numbers are known before its header is written.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdmerge_build.adapters.changes import TAKEN
from sdmerge_build.adapters.writing import Module, derived_metadata
from sdmerge_build.check import Checked, Draft, Strength
from sdmerge_build.errors import Issue, SdbuildError
from sdmerge_build.methods import Findings
from sdmerge_build.methods.changes import Loaded, prepare
from sdmerge_build.methods.decomposition import Factors, Limits, decomposed, decomposed_product
from sdmerge_build.plan import Plan, Step
from sdmerge_build.programs import Leaf, Load
from sdmerge_build.rounding import narrowed
from sdmerge_build.slices import read_factor
from sdmerge_build.surveys import Models
from sdmerge_build.tensorfile import Spec, lay_out
from sdmerge_build.writer import Writer, Written

__all__ = ["Making", "make"]

_CHUNK = 4 << 20
_LEGACY = 0x100000, 0x10000  # what additional-networks once knew files by: from where, and how many bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """What it takes to make the adapter of a step."""

    plan: Plan
    checked: Checked
    keys: Mapping[str, str]
    leaves: Mapping[str, Leaf]
    step: Step
    findings: Mapping[str, Findings]
    jobs: int
    note: Callable[[str], None]
    advanced: Callable[[int], None]

    @property
    def drafts(self) -> Sequence[Draft]:
        """List its modules."""
        return self.checked.drafts[self.step.name]

    @property
    def bytes_read(self) -> int:
        """Count the bytes that are read for it: of models, if it is a difference, or of other adapters."""
        known, names = self.checked, {draft.tensor for draft in self.drafts if not draft.parts}
        models = sum(known.tensors[i][name].nbytes for i in self.step.inputs if i in known.tensors for name in names if name in known.tensors[i])
        parts = {(part.adapter, factor) for draft in self.drafts for part in draft.parts for factor in part.change.factors.values()}
        return models + sum(self.leaves[adapter].header.tensors[factor].nbytes for adapter, factor in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """A module, decomposed or joined, in the dtype that it is written in."""

    draft: Draft
    up: Tensor
    down: Tensor
    kept: float = 0.0  # of the energy, which is a sum of squares
    energy: float = 0.0
    largest: float = math.inf  # difference


def make(making: Making, target: Path, metadata: Mapping[str, str]) -> Written:
    """Make the adapter of a step, and write it to `target`, which must not exist, behind a header that says `metadata` and what follows from it."""
    torch.set_num_threads(1)
    is_difference = not any(draft.parts for draft in making.drafts)
    made = list(_extracted(making) if is_difference else _summed(making))
    if not made:
        raise SdbuildError(Issue(what=f"step `{making.step.name}`: nothing differs by more than `min_difference`"))
    _refuse_nonfinite(making, made)
    tensors = {spec.name: (spec, tensor) for one in made for spec, tensor in _tensors(one)}
    ranks = [(one.draft.module, one.up.shape[1]) for one in made]
    return _write(target, tensors, dict(metadata) | derived_metadata(making.plan.architecture, ranks, metadata))


def _tensors(made: _Made) -> Iterator[tuple[Spec, Tensor]]:
    rank = made.up.shape[1]
    alpha = torch.tensor(float(rank))
    for spec, tensor in zip(made.draft.module.specs(rank, made.draft.dtype), (made.up, made.down, alpha), strict=True):
        yield spec, tensor.reshape(spec.shape).contiguous()


def _extracted(making: Making) -> Iterable[_Made]:
    """Decompose the difference of two models, the largest tensors first, and say how much of it there is in the result."""
    drafts: dict[str, list[Draft]] = {}
    for draft in making.drafts:
        drafts.setdefault(draft.tensor, []).append(draft)
    operations = making.checked.operations[making.step.name]
    with Models(making.plan, making.checked, making.keys, making.leaves, making.step, making.findings, making.jobs) as models:
        left = [name for name in models.names if name not in drafts and making.plan.architecture.component_of(name) != "ema"]

        def worked(name: str) -> tuple[list[_Made], float]:
            difference = models.tensor(0, name) - models.tensor(1, name)
            found = [_decomposed(making, draft, difference) for draft in drafts.get(name, ())]
            making.advanced(_stored_bytes(making, name) if name in drafts else 0)
            return found, 0.0 if found else float(difference.to(torch.float64).square().sum())

        names = sorted((*drafts, *left), key=lambda name: (-math.prod(operations[name].shape), name))
        results = dict(zip(names, models.map(worked, names), strict=True))
    found = [one for name in drafts for one in results[name][0]]
    kept = _different(making, found)
    _note_energy(making, kept, math.fsum([results[name][1] for name in left] + [one.energy for one in found if one not in kept]))
    return kept


def _stored_bytes(making: Making, name: str) -> int:
    return sum(making.checked.tensors[i][name].nbytes for i in making.step.inputs)


def _decomposed(making: Making, draft: Draft, difference: Tensor) -> _Made:
    start, count = draft.module.rows or (0, difference.shape[0])
    part = difference[start : start + count].flatten(1)
    factors = decomposed(part.t() if draft.module.turned else part, _limits(draft))
    return _rounded(making, draft, factors, float(part.abs().max()))


def _different(making: Making, found: Sequence[_Made]) -> list[_Made]:
    """Leave out the text encoders that hardly differ."""
    component_of = making.plan.architecture.component_of
    differ = {"unet", "dit"} | {component_of(one.draft.tensor) for one in found if one.largest > one.draft.params["min_difference"]}
    differ |= {component_of(one.draft.tensor) for one in found if one.draft.params["min_difference"] == 0}
    alike = sorted({component_of(one.draft.tensor) for one in found} - differ)
    if alike:
        making.note(f"{making.step.name}: leaves out {', '.join(alike)}, no number of which differs by more than `min_difference`")
    return [one for one in found if component_of(one.draft.tensor) in differ]


def _note_energy(making: Making, found: Sequence[_Made], left: float) -> None:
    """Say how much of a difference is in an adapter; of squares, so that all of it is 100 %."""
    held = math.fsum(one.energy for one in found)
    kept = math.fsum(one.kept * one.energy for one in found)
    if not held + left:
        making.note(f"{making.step.name}: the models do not differ")
        return
    whole = held + left
    elsewhere = f", and {left / whole:.2%} are where a LoRA holds nothing" if left else ""
    text = f"holds {kept / whole:.2%} of the difference (of its squares); ranks leave out {max(0.0, held - kept) / whole:.2%}{elsewhere}"
    making.note(f"{making.step.name}: {text}")


def _summed(making: Making) -> Iterable[_Made]:
    """Join changes of adapters, or decompose their sum."""

    def worked(draft: Draft) -> _Made:
        with torch.inference_mode():
            loaded = [_loaded(part, making.leaves[part.adapter]) for part in draft.parts]
            making.advanced(sum(factor.nbytes for one in loaded for factor in one.factors.values()))
            return _joined(making, draft, loaded)

    with ThreadPoolExecutor(making.jobs) as pool:
        return list(pool.map(worked, making.drafts))


def _loaded(part: Strength, leaf: Leaf) -> Loaded:
    """Read the factors of a change, those rows that are meant."""
    factors = {}
    with leaf.path.open("rb", buffering=0) as file:
        for role, name in part.change.factors.items():
            spec = leaf.header.tensors[name]
            load = Load(0, leaf.header.data_start + spec.offset, spec.dtype, spec.numel)
            factor = read_factor([file], load, spec.shape)
            start, count = part.change.taken or (0, spec.shape[0] if spec.shape else 0)
            factors[role] = factor[start : start + count] if role in TAKEN else factor
    change = part.change
    return Loaded(kind=change.kind, factors=factors, rows=change.rows, turned=change.turned, strength=part.strength, scale=change.scale)


def _joined(making: Making, draft: Draft, loaded: Sequence[Loaded]) -> _Made:
    """Put changes side by side, and make them smaller where that is asked for."""
    module = draft.module
    if all(one.kind == "lora" and "mid" not in one.factors for one in loaded):
        pairs = [_placed(one, module) for one in loaded]
        up, down = torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs], 0)
        if not making.step.method.makes_adapter:
            return _rounded(making, draft, Factors(up=up, down=down, kept=1.0, energy=0.0))
        return _rounded(making, draft, decomposed_product(up, down, _limits(draft)))
    start, count = module.rows or (0, module.shape[0])
    shape = (3 * count if module.rows else count, *module.shape[1:])
    whole = prepare(loaded, shape, torch.float64).apply(torch.zeros(math.prod(shape), dtype=torch.float64), 0).view(shape)
    part = whole[start : start + count].flatten(1)
    return _rounded(making, draft, decomposed(part.t() if module.turned else part, _limits(draft)))


def _placed(one: Loaded, module: Module) -> tuple[Tensor, Tensor]:
    """Return a change's factors as matrices that add to the module's rows, strength and alpha in the first."""
    rank = one.factors["down"].shape[0]
    scale = one.strength * (float(one.factors["alpha"]) / rank if "alpha" in one.factors else 1.0)
    up, down = one.factors["up"].to(torch.float64).reshape(-1, rank) * scale, one.factors["down"].to(torch.float64).reshape(rank, -1)
    if one.turned:
        up, down = down.t(), up.t()
    start, count = module.rows or (0, module.shape[0])
    first, rows = one.rows or (0, len(up))
    placed = torch.zeros(count, rank, dtype=torch.float64)
    low, high = max(start, first), min(start + count, first + rows)
    placed[low - start : high - start] = up[low - first : high - first]
    return (down.t(), placed.t()) if module.turned else (placed, down)


def _limits(draft: Draft) -> Limits:
    params = draft.params
    return Limits(
        rank=draft.most,
        energy=params["energy"],
        threshold=params["threshold"],
        clamp=params["clamp"],
        randomized=params["randomized"],
        seed=params["seed"],
        name=draft.module.name,
    )


def _rounded(making: Making, draft: Draft, factors: Factors, largest: float = math.inf) -> _Made:
    saturates = making.step.nonfinite == "saturate"
    up, down = (narrowed(factor, draft.dtype, saturates=saturates) for factor in (factors.up, factors.down))
    return _Made(draft=draft, up=up, down=down, kept=factors.kept, energy=factors.energy, largest=largest)


def _refuse_nonfinite(making: Making, made: Sequence[_Made]) -> None:
    """Refuse factors that are not finite, by name."""
    if making.step.nonfinite == "allow":
        return
    for one in made:
        if not all(torch.isfinite(factor.to(torch.float32)).all() for factor in (one.up, one.down)):
            what = f"step `{making.step.name}`: the factors of `{one.draft.tensor}` are infinite or not numbers"
            raise SdbuildError(Issue(what=what, hint="a source is damaged, or the difference is larger than the `dtype` holds"))


def _write(target: Path, tensors: Mapping[str, tuple[Spec, Tensor]], metadata: dict[str, str]) -> Written:
    """Write a file. `sshs_model_hash` is the sha256 of its data, as whoever has the file can find; kohya's writer and ours agree on that.

    `sshs_legacy_hash` is of 64 KiB of the file that there would be if its header said nothing but `ss_*`.
    """
    specs = [spec for spec, _ in tensors.values()]
    plain = lay_out(specs, {name: text for name, text in metadata.items() if name.startswith("ss_")})
    views = [_bytes_of(tensors[spec.name][1]) for spec in plain.specs]
    digest = hashlib.sha256()
    for view in views:
        digest.update(view)
    legacy = hashlib.sha256(b"".join(_window([memoryview(plain.header), *views], *_LEGACY)))
    metadata |= {"sshs_model_hash": digest.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}
    layout = lay_out(specs, metadata)
    with Writer([(target, layout)], [_CHUNK], spare=2) as writer, target.open("r+b", buffering=0) as out:
        length = layout.size - len(layout.header)
        for index, start in enumerate(range(0, length, _CHUNK)):
            buffers = writer.buffers()
            if buffers is None:
                break
            buffers.index, buffers.regions = index, [(start, min(_CHUNK, length - start))]
            position = 0
            for part in _window(views, start, _CHUNK):
                buffers.views[0][position : position + len(part)] = part
                position += len(part)
            writer.write([out], buffers)
            writer.done(buffers)
        return writer.finish()[0]


def _bytes_of(tensor: Tensor) -> memoryview:
    """See a tensor as bytes, for as long as it lives."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _window(views: Sequence[memoryview], start: int, count: int) -> Iterator[memoryview]:
    """Yield the bytes of several memories, one after the other, from `start` on."""
    for view in views:
        part = view[max(0, start) : max(0, start + count)]
        start -= len(view)
        if part:
            yield part
