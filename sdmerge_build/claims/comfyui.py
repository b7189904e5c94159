"""Owns the two forms in which ComfyUI writes its graphs: which files went into what was saved, and by which merges.

Has never heard of other dialects; files have names there, and no hashes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sdmerge_build.claims.register import WEIGHTS
from sdmerge_build.claims.text import MOST_MEMBERS, cut, line

__all__ = ["files_of", "listed", "merges_of", "saved"]

_ELSEWHERE = re.compile("control|upscale|clip_?vision|style|embedding|ipadapter|detector", re.IGNORECASE)  # loads what goes into no checkpoint


def files_of(nodes: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the names of the files that nodes load."""
    for node in nodes:
        if _ELSEWHERE.search(line(node.get("class_type"))):
            continue
        for value in itertools.chain.from_iterable(_switched_on(value) for _, value in sorted(node["inputs"].items())):
            if isinstance(value, str) and WEIGHTS.search(value[-20:]):
                yield value


def merges_of(nodes: list[dict[str, Any]]) -> str:
    """Say in a line which nodes merge: their types and their numbers."""
    merges = [node for node in nodes if "Merge" in line(node.get("class_type"))]
    return cut("; ".join(map(_merge, merges[:MOST_MEMBERS])))


def _merge(node: Mapping[str, Any]) -> str:
    numbers = [f"{name} {value}" for name, value in sorted(node["inputs"].items()) if type(value) in {int, float}]
    return ", ".join([line(node.get("class_type")), *map(line, numbers[:MOST_MEMBERS])])


def saved(graph: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the nodes of a graph of ComfyUI that a saved model depends on; all of them when none saves one."""
    nodes = {n: node for n, node in graph.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)}
    parts = {"model", "clip", "vae", "model_diff", "text_encoder_diff"}
    stack = [n for n, node in nodes.items() if "Save" in line(node.get("class_type")) and parts & node["inputs"].keys()] or list(nodes)
    wanted: set[str] = set()
    while stack:
        if (n := stack.pop()) in nodes and n not in wanted:
            wanted.add(n)
            stack += [value[0] for value in nodes[n]["inputs"].values() if isinstance(value, list) and value and isinstance(value[0], str)]
    return [nodes[n] for n in sorted(wanted, key=lambda n: (len(n), n))]


def listed(workflow: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the loaders of a workflow as ComfyUI's editor has it, in the form of its graph; those that are muted or bypassed left out."""
    nodes = workflow.get("nodes")
    loaders = []
    for node in nodes if isinstance(nodes, list) else []:
        if isinstance(node, dict) and "load" in line(node.get("type")).lower() and node.get("mode") not in (2, 4):
            values = node.get("widgets_values")
            inputs = values if isinstance(values, dict) else {f"{n:6}": value for n, value in enumerate(values if isinstance(values, list) else [])}
            loaders.append({"class_type": node.get("type"), "inputs": inputs})
    return loaders


def _switched_on(value: Any) -> list[Any]:
    """List what an input says, unless it is a switch that is off."""
    if not isinstance(value, dict):
        return [value]
    return [] if value.get("on") is False else [inner for _, inner in sorted(value.items())]
