"""Owns type inference for checkpoints: from a plan and its sources' headers to every tensor of every step, or every mismatch at once.

Has never heard of tensor data; a wrong architecture in the fifth source is reported before the first gigabyte is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sdmerge_build.check.merging import check_step
from sdmerge_build.check.moving import check_completeness, check_moves
from sdmerge_build.check.results import Checked, Draft, Operation, Strength
from sdmerge_build.check.sources import check_source
from sdmerge_build.plan import Plan
from sdmerge_build.tensorfile import Header

__all__ = ["Checked", "Draft", "Operation", "Strength", "check"]


def check(plan: Plan, headers: Mapping[str, Header], made: Mapping[str, Header] = MappingProxyType({})) -> Checked:
    """Infer what every step yields. Issues are collected, not raised, so that a build may go on with what is sound.

    `made` are the headers of steps' adapters that are there already: what ranks they have need not be foreseen.
    """
    checked = Checked(factors={name: header.tensors for name, header in made.items()})
    for name in plan.sources:
        if name in headers:
            check_source(plan, name, headers[name], checked)
    for step in plan.steps.values():
        if all(checked.knows(i) for i in step.inputs):
            (check_moves if step.method.moves else check_step)(plan, step, checked)
    check_completeness(plan, checked)
    return checked
