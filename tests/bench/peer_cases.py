"""What peers.py compares: methods of ours, what other tools call them, and why results differ where they do.

Files: `O` is the base of the fine-tunes `A`, `B` and `C`, which all keep its VAE, and `C` its text encoder; `X` is no relative of theirs.
All are float16. `P`, `Q`, `R` and `S` are the like of the first four in float32, in which no two differences have one magnitude.
`Y` and `Z` are the matrices of `A` and `X` that are not wider than high.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EXACT: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Case:
    """A method of ours beside a peer's: `ours` is the step's TOML, `theirs` an expression for sd-mecha or a configuration for mergekit.

    `ulps` is the largest difference that `reason` explains, in units in the last place of float16; None: no matter how large.
    """

    name: str
    ours: str
    peer: str
    theirs: Any
    reason: str = ""
    ulps: int | None = 1
    share: float = 0.01  # of elements that differ, at most
    double: bool = False  # whether to let sd-mecha compute in float64 as well
    ndim: int | None = None  # compare only tensors of so many dimensions

    def doubled(self) -> list[str]:
        """Tell the peer to compute in float64."""
        return [self.theirs[0], "float64"]


def pair(a: str = "A", b: str = "B", c: str = "", /, **params: Any) -> str:
    """Write a step of two or three models."""
    return _toml({"a": a, "b": b} | ({"c": c} if c else {}) | params)


def many(base: str, models: str, /, **params: Any) -> str:
    """Write a step of any number of models, with a base or without."""
    return _toml(({"base": base} if base else {}) | {"models": list(models)} | params)


def _toml(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())


def mecha(name: str, ours: str, theirs: str, reason: str = "", **limits: Any) -> Case:
    """Compare with sd-mecha, over files."""
    return Case(name, _method(name) + ours, "sd-mecha", [theirs, "float32"], reason, **limits)


def kit(name: str, ours: str, method: str, models: str, /, base: str = "", *, limits: Mapping[str, Any] = EXACT, **params: Any) -> Case:
    """Compare with mergekit, over files, computing in float32; lists of parameters are one for each model."""
    single = {k: v for k, v in params.items() if not isinstance(v, list)}
    several = {k: v for k, v in params.items() if isinstance(v, list)}
    entries = [{"model": f"{model}.safetensors", "parameters": {k: v[n] for k, v in several.items()}} for n, model in enumerate(models)]
    theirs = {"merge_method": method, "dtype": "float32", "models": entries, "parameters": single}
    theirs |= {"base_model": f"{base}.safetensors"} if base else {}
    return Case(name, _method(name) + ours, "mergekit", theirs, **limits)


def why(reason: str, **limits: Any) -> dict[str, Any]:
    """Say why results differ, and how much."""
    return {"reason": reason, **limits}


def _method(name: str) -> str:
    return f'method = "{name.partition("-")[0]}"\n'


THIRDS, ALL = [0.5, 0.3, 0.2], [1.0, 1.0, 1.0]
SD_MECHA = (
    mecha("weighted_sum", pair(alpha=0.3), "sd_mecha.weighted_sum(A, B, alpha=0.3)"),
    mecha("add_difference", pair("A", "B", "O", alpha=0.7), "sd_mecha.add_difference(A, B, O, alpha=0.7)"),
    mecha("average", many("", "ABC"), "sd_mecha.n_average(A, B, C)"),
    mecha("subtract", pair("A", "X"), "sd_mecha.subtract(A, X)"),
    mecha("add", pair("A", "X", alpha=0.7), "sd_mecha.add_difference(A, delta('X'), alpha=0.7)"),
    mecha("scale", 'a = "A"\nalpha = 0.7\n', "delta('A') * 0.7"),
    mecha("add_cosine_a", pair("A", "B", alpha=0.7), "sd_mecha.add_cosine_a(A, B, alpha=0.7)"),
    mecha("add_cosine_a-unlike", pair("A", "X", alpha=-0.1), "sd_mecha.add_cosine_a(A, X, alpha=-0.1)"),
    mecha("add_cosine_b", pair("A", "B", alpha=0.7), "sd_mecha.add_cosine_b(A, B, alpha=0.7)"),
    mecha("add_cosine_b-unlike", pair("A", "X", alpha=-0.1), "sd_mecha.add_cosine_b(A, X, alpha=-0.1)"),
    mecha(
        "train_difference",
        pair("A", "B", "O", alpha=0.6),
        "sd_mecha.add_difference(A, B, O, alpha=sd_mecha.train_difference_mask(A, B, O, alpha=0.6))",
    ),
    mecha("add_opposite", pair("A", "B", "O", alpha=0.6), "sd_mecha.add_difference(A, B, O, alpha=sd_mecha.add_opposite_mask(A, B, O, alpha=0.6))"),
    mecha(
        "add_strict_opposite",
        pair("A", "B", "O", alpha=0.6),
        "sd_mecha.add_difference(A, B, O, alpha=sd_mecha.add_strict_opposite_mask(A, B, O, alpha=0.6))",
    ),
    mecha("add_perpendicular", pair("A", "B", "O", alpha=0.6), "sd_mecha.add_perpendicular(A, B, O, alpha=0.6)"),
    mecha("geometric_sum", pair(alpha=0.3), "sd_mecha.geometric_sum(A, B, alpha=0.3)"),
    mecha("geometric_sum-unlike", pair("A", "X", alpha=0.3), "sd_mecha.geometric_sum(A, X, alpha=0.3)"),
    mecha("multiply_quotient", pair("A", "B", "O", alpha=0.8), "sd_mecha.multiply_quotient(A, B, O, alpha=0.8)"),
    mecha("clamp", 'a = "A"\nmodels = ["B", "O"]\n', "sd_mecha.clamp(A, B, O)"),
    mecha("clamp-stiff", 'a = "X"\nmodels = ["A", "B", "C", "O"]\nstiffness = 0.4\n', "sd_mecha.clamp(X, A, B, C, O, stiffness=0.4)"),
    mecha("tensor_sum", pair(width=0.4, offset=0.3, rounding="round"), "sd_mecha.tensor_sum(A, B, width=0.4, offset=0.3)"),
    mecha("tensor_sum-around", pair(width=0.4, offset=0.7, rounding="round"), "sd_mecha.tensor_sum(A, B, width=0.4, offset=0.7)"),
    mecha("top_k_tensor_sum", pair(width=0.4, offset=0.3), "sd_mecha.copy_region(A, B, width=0.4, offset=0.3, top_k=True)"),
    mecha("top_k_tensor_sum-unlike", pair("A", "X", width=0.4, offset=0.7), "sd_mecha.copy_region(A, X, width=0.4, offset=0.7, top_k=True)"),
    mecha("crossover", pair(alpha=0.3), "sd_mecha.crossover(A, B, alpha=0.3)"),
    mecha("crossover-tilted", pair("A", "X", alpha=0.3, tilt=0.6), "sd_mecha.crossover(A, X, alpha=0.3, tilt=0.6)"),
    mecha("slerp", pair(alpha=0.3), "sd_mecha.slerp(A, B, alpha=0.3)"),
    mecha("slerp-unlike", pair("A", "X", alpha=0.3), "sd_mecha.slerp(A, X, alpha=0.3)"),
    mecha("ties-count", many("O", "ABC", density=1.0, vote="count"), "O + sd_mecha.ties_sum(A - O, B - O, C - O, k=1.0)"),
    mecha(
        "ties-count-trimmed",
        many("P", "QRS", density=0.3, vote="count"),
        "P + sd_mecha.ties_sum(Q - P, R - P, S - P, k=0.3)",
        "keeps of each difference one element more, or two where `density * n` is no whole number",
        ulps=None,
        share=0.002,
    ),
    mecha(
        "ties-magnitude-trimmed",
        many("P", "QRS", density=0.3),
        "P + sd_mecha.ties_sum(Q - P, R - P, S - P, k=0.3, vote_sgn=True)",
        "keeps of each difference one element more, or two where `density * n` is no whole number",
        ulps=None,
        share=0.002,
    ),
    mecha(
        "model_stock_rows-consecutive",
        many("O", "ABC", pairs="consecutive"),
        "sd_mecha.n_model_stock(O, A, B, C)",
        "does not bound t: rows whose c is below 0 go away from the base, and are not finite where c is -1/2",
        ulps=None,
    ),
    mecha(
        "geometric_median",
        many("", "ABC"),
        "sd_mecha.geometric_median(A, B, C)",
        "measures distances in float32, and stops where these do not change",
        ulps=100,
        share=0.2,
        double=True,
    ),
    mecha(
        "geometric_median-unlike",
        many("", "ABX"),
        "sd_mecha.geometric_median(A, B, X)",
        "measures distances in float32, and stops where these do not change",
        ulps=500,
        share=0.2,
        double=True,
    ),
    mecha(
        "truncate_rank",
        'base = "O"\na = "A"\nrank = 3\n',
        "O + sd_mecha.truncate_rank(A - O, rank=3, use_approximate_basis=False)",
        "decomposes in float32",
        ulps=8,
        double=True,
    ),
    mecha(
        "rotate",
        pair("A", "X"),
        "method('rotate')(Y, Z)",
        "decomposes in float32; only matrices that are not wider than high mean the same",
        ulps=50,
        share=0.02,
        double=True,
    ),
    mecha(
        "rotate-mixed",
        pair("A", "X", alpha=0.3),
        "method('rotate')(Y, Z, alpha=0.3)",
        "decomposes in float32; only matrices that are not wider than high mean the same",
        ulps=50,
        share=0.02,
        double=True,
    ),
    mecha(
        "rotate-half",
        pair("A", "X", alignment=0.5),
        "method('rotate')(Y, Z, alignment=0.5)",
        "decomposes in float32; only matrices that are not wider than high mean the same",
        ulps=500,
        share=0.2,
        double=True,
    ),
)
MERGEKIT = (
    kit("weighted_sum-linear", pair(alpha=0.3), "linear", "AB", weight=[0.7, 0.3]),
    kit("linear", many("", "ABC", weights=[0.6, 0.5, 0.2]), "linear", "ABC", weight=[0.6, 0.5, 0.2], normalize=False),
    kit("average-linear", many("", "ABC"), "linear", "ABC", weight=[1.0, 1.0, 1.0]),
    kit("scale-passthrough", 'a = "A"\nalpha = 0.7\n', "passthrough", "A", scale=[0.7]),
    kit("slerp_vectors", pair(alpha=0.3), "slerp", "AB", "A", t=0.3),
    kit("slerp_vectors-unlike", pair("A", "X", alpha=0.3), "slerp", "AX", "A", t=0.3),
    kit("nuslerp", pair(alpha=0.3), "nuslerp", "AB", weight=[0.7, 0.3]),
    kit("nuslerp-unlike", pair("A", "X", alpha=0.3), "nuslerp", "AX", weight=[0.7, 0.3]),
    kit("nuslerp_rows", pair("A", "X", alpha=0.3), "nuslerp", "YZ", weight=[0.7, 0.3], nuslerp_flatten=False),
    kit("nuslerp_columns", pair("A", "X", alpha=0.3), "nuslerp", "YZ", weight=[0.7, 0.3], nuslerp_flatten=False, nuslerp_row_wise=True),
    kit("nuslerp_differences", _toml({"base": "O", "a": "A", "b": "B", "alpha": 0.3}), "nuslerp", "AB", "O", weight=[0.7, 0.3]),
    kit("multislerp", many("", "ABX", weights=THIRDS), "multislerp", "ABX", weight=THIRDS),
    kit("multislerp_differences", many("O", "AB", weights=[0.7, 0.3]), "multislerp", "AB", "O", weight=[0.7, 0.3]),
    kit("karcher", many("", "ABC"), "karcher", "ABC"),
    kit("karcher-unlike", many("", "ABX"), "karcher", "ABX"),
    kit("task_arithmetic", many("O", "ABC", weights=THIRDS), "task_arithmetic", "ABC", "O", weight=THIRDS, density=ALL),
    kit(
        "ties-mergekit",
        many("O", "ABC", density=1.0, weights=THIRDS),
        "ties",
        "ABC",
        "O",
        weight=THIRDS,
        density=ALL,
        limits=why("elects + where votes cancel out", ulps=None, share=0.001),
    ),
    kit(
        "ties-mergekit-trimmed",
        many("P", "QRS", density=0.5, weights=THIRDS, scale=0.8),
        "ties",
        "QRS",
        "P",
        weight=THIRDS,
        density=[0.5] * 3,
        **{"lambda": 0.8},
        limits=why("keeps one of two equal magnitudes at the limit, ours both", ulps=None, share=0.0001),
    ),
    kit(
        "ties-mergekit-sum",
        many("O", "ABC", density=0.5, weights=THIRDS, normalize=False),
        "ties",
        "ABC",
        "O",
        weight=THIRDS,
        density=[0.5] * 3,
        normalize=False,
        limits=why("float16 files: keeps some of many equal magnitudes, ours all; elects + where votes cancel out", ulps=None),
    ),
    kit(
        "breadcrumbs",
        many("P", "QRS", density=0.5, gamma=0.05, weights=THIRDS),
        "breadcrumbs",
        "QRS",
        "P",
        weight=THIRDS,
        density=[0.5] * 3,
        gamma=[0.05] * 3,
        limits=why(
            "drops the differences of tensors with fewer than 1 / gamma elements; keeps one of two equal magnitudes at a limit",
            ulps=None,
            share=0.0001,
        ),
    ),
    kit(
        "breadcrumbs-ties",
        many("P", "QRS", density=0.5, gamma=0.05, weights=THIRDS, consensus="ties"),
        "breadcrumbs_ties",
        "QRS",
        "P",
        weight=THIRDS,
        density=[0.5] * 3,
        gamma=[0.05] * 3,
        limits=why(
            "drops the differences of tensors with fewer than 1 / gamma elements; keeps one of two equal magnitudes at a limit",
            ulps=None,
            share=0.0001,
        ),
    ),
    kit("sce", many("P", "QRS"), "sce", "QRS", "P"),
    kit("sce-half", many("O", "ABC"), "sce", "ABC", "O", limits=why("float16 files: elects + where the sum is 0", ulps=None, share=0.002)),
    kit(
        "sce-selected",
        many("P", "QRS", density=0.5),
        "sce",
        "QRS",
        "P",
        select_topk=0.5,
        limits=why("where models do not vary, the result has another shape"),
    ),
    kit("nearswap", pair(t=0.002), "nearswap", "B", "A", t=0.002),
    kit(
        "arcee_fusion",
        _toml({"base": "O", "a": "A"}),
        "arcee_fusion",
        "A",
        "O",
        limits=why("takes quartiles without interpolation; its divergences, in float32, are good to a hundredth", ulps=None),
    ),
    kit(
        "model_stock",
        many("O", "ABC"),
        "model_stock",
        "ABC",
        "O",
        limits=why("does not bound t: a tensor whose c is below 0 goes away from the base", ulps=None, share=0.002),
    ),
    kit(
        "model_stock_rows",
        many("O", "ABC"),
        "model_stock",
        "ABC",
        "O",
        filter_wise=True,
        limits=why(
            "does not bound t: rows whose c is below 0 go away from the base; takes a product of lengths below 1e-6 for 1e-6", ulps=None, share=0.2
        ),
    ),
    kit(
        "model_stock_filters",
        many("O", "ABC"),
        "model_stock",
        "ABC",
        "O",
        filter_wise=True,
        limits=why("matrices only: elsewhere its filters are rows", ndim=2),
    ),
)

NOT_COMPARED = (
    ("`dare`, `della`", "both", "random: each tool draws its own numbers; mergekit's also depend on the order of tensors"),
    ("`rebasin`", "sd-mecha", "has permutations of SDXL only, and does not mix"),
    ("`ram`", "mergekit", "came after 0.1.4"),
    ("`rotate`, wide matrices", "sd-mecha", "what turns them there is no rotation, or has a random basis; with `alignment=0.5` it fails on NaN"),
)
