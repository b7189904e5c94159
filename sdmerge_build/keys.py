"""Owns identity: one function describes a step, one reader of it hashes, the other explains.

Has never heard of files or headers. What is in the bytes is in the key; what is not, is not: names of steps, comments, paths,
addresses and thread counts never get here.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from sdmerge_build.digest import Digest, Sink, Transcript
from sdmerge_build.formula import relabelled
from sdmerge_build.plan import Plan, Step
from sdmerge_build.weights.ratio import Ratio

__all__ = ["Description", "Facts", "artifact_key", "describe", "describe_all", "differences", "survey_key"]

ENGINE = 1
"""Raised when `merge` would make other tensors from the same description."""

WRITER = 1
"""Raised when `tensorfile` would write the same tensors and metadata as other bytes."""

Facts = list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What decides a source's or step's tensors: its facts, and the key that hashes them."""

    name: str
    key: str
    facts: Facts
    inputs: Mapping[str, str]  # role → name


def describe(step: Step, plan: Plan, keys: Mapping[str, str], sink: Sink) -> None:
    """Tell `sink` every fact that can change this step's tensors, and nothing else."""
    sink.fact("engine", str(ENGINE))
    sink.fact("architecture", plan.architecture.fingerprint)
    sink.fact("method", step.method.identity)
    if step.method.pinned:
        sink.fact("machine", _machine())
    sink.fact("dtype", str(step.dtype))
    sink.fact("compute", step.compute)
    for policy in ("missing", "extra", "mismatch", "nonfinite"):
        sink.fact(policy, getattr(step, policy))
    for name, value in sorted(step.params.items()):
        for suffix, text in _param_facts(value):
            sink.fact(f"param.{name}{suffix}", text)
    for role, name in zip(step.roles, step.inputs, strict=True):
        sink.fact(f"input.{role}", keys[name])


def survey_key(step: Step, keys: Mapping[str, str], fingerprint: str) -> str:
    """Return the key of what a step's survey finds: of its models, the rules by which tensors are merged, and what it asks for."""
    survey = step.method.survey
    assert survey, "BUG: only a method with a survey has findings"
    digest = Digest()
    digest.fact("engine", str(ENGINE))
    digest.fact("architecture", fingerprint)
    digest.fact("survey", f"{survey.name}@{survey.version}")
    digest.fact("origin", step.method.origin)
    if step.method.pinned:
        digest.fact("machine", _machine())
    digest.fact("compute", step.compute)
    for policy in ("missing", "extra", "mismatch"):
        digest.fact(policy, getattr(step, policy))
    for name in survey.parameters:
        for suffix, text in _param_facts(step.params[name]):
            digest.fact(f"param.{name}{suffix}", text)
    for role, name in zip(step.roles, step.inputs, strict=True):
        digest.fact(f"input.{role}", keys[name])
    return digest.hexdigest()


def describe_all(plan: Plan, source_digests: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, Description]:
    """Describe every source and step whose sources are known, parents first; `settings` are those that an adapter's header holds beside tensors."""
    described: dict[str, Description] = {}
    for name in plan.sources:
        if digest := source_digests.get(name):
            described[name] = _described_source(name, digest, settings.get(name, ""))
    for step in plan.steps.values():
        if all(i in described for i in step.inputs):
            keys = {i: described[i].key for i in step.inputs}
            digest_sink, transcript = Digest(), Transcript()
            for sink in (digest_sink, transcript):
                describe(step, plan, keys, sink)
            inputs = dict(zip(step.roles, step.inputs, strict=True))
            described[step.name] = Description(name=step.name, key=digest_sink.hexdigest(), facts=transcript.facts, inputs=inputs)
    return described


def _described_source(name: str, tensors: str, settings: str) -> Description:
    """Describe a source: its tensors alone, unless a setting decides what they mean."""
    if not settings:
        return Description(name=name, key=tensors, facts=[("tensors", tensors)], inputs={})
    digest, transcript = Digest(), Transcript()
    for sink in (digest, transcript):
        sink.fact("tensors", tensors)
        sink.fact("settings", settings)
    return Description(name=name, key=digest.hexdigest(), facts=transcript.facts, inputs={})


def artifact_key(tensor_key: str, metadata: Mapping[str, str]) -> str:
    """Return the key of a file: its tensors behind a header with this metadata."""
    digest = Digest()
    digest.fact("writer", str(WRITER))
    digest.fact("tensors", tensor_key)
    for name, value in sorted(metadata.items()):
        digest.fact(f"metadata.{name}", value)
    return digest.hexdigest()


def differences(old: Mapping[str, Description], new: Mapping[str, Description], name: str, old_name: str) -> Iterator[str]:
    """Say which facts of a step changed, down to the parents that changed, each once: `param.alpha = 0.75 → 0.7`."""
    done: set[tuple[str, str]] = set()
    stack = [(old_name, name)]
    while stack:
        before, after = stack.pop()
        was, now = old.get(before), new[after]
        if was is None or was.key == now.key or (before, after) in done:
            continue
        done.add((before, after))
        yield from (f"{after}: {text}" if after != name else text for text in _changed_facts(was, now))
        stack += [(was.inputs[role], parent) for role, parent in reversed(list(now.inputs.items())) if role in was.inputs]


@functools.cache
def _machine() -> str:
    """Name what a pinned method's bytes are promised for: the version of torch, and the kind of processor."""
    return f"torch {version('torch')} on {platform.machine().lower().replace('amd64', 'x86_64')}"


def _changed_facts(was: Description, now: Description) -> Iterator[str]:
    before, after = dict(was.facts), dict(now.facts)
    for fact in dict.fromkeys((*before, *after)):
        old, new = _shown(fact, before.get(fact), was), _shown(fact, after.get(fact), now)
        if before.get(fact) == after.get(fact) or (old == new and fact.startswith("input.")):
            continue  # an input of the same name with another key is explained by its own facts
        yield f"{fact} = {old} → {new}"


def _shown(fact: str, value: str | None, description: Description) -> str:
    """Write a fact's value for people: names for keys, and for the places in a formula."""
    if value is None:
        return "(none)"
    if fact.startswith("input."):
        return description.inputs.get(fact.removeprefix("input."), value)
    if fact == "param.formula":
        return relabelled(value, description.inputs)
    return value[:12] if fact == "tensors" else value


def _param_facts(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Ratio):
        yield from value.facts()
    elif isinstance(value, tuple) and any(isinstance(item, Ratio) for item in value):
        for n, item in enumerate(value, 1):
            for suffix, text in item.facts():
                yield f".{n}{suffix}", text
    else:
        yield "", value if isinstance(value, str) else repr(value)
