"""sdbuild: merged Stable Diffusion checkpoints from recipes, with their lineage."""

__all__ = ["__version__"]

__version__ = "0.1.0"
