"""Methods of one's own, for recipes that name this file."""

from sdmerge_build.methods import Ratio, method


@method(version=1)
def soft_mix(a, b, /, *, alpha: Ratio = 0.5):
    """Mix two models, less where they differ more: `a + alpha * d / (1 + |d|)`, `d = b - a`."""
    d = b - a
    return a + d * alpha / (1 + d.abs())
