"""DeepLab v1 and v2 with a differentiable, fully connected CRF, in JAX."""

from deeplab_jax import interrupts

if interrupts.starts_a_command():
    interrupts.end_at_once()

from deeplab_jax.version import __version__

__all__ = ["__version__", "load"]


def __getattr__(name: str):
    # `load` imports Pillow and orbax; the CRF alone must not need them.
    if name == "load":
        from deeplab_jax.inference.load import load

        return load
    raise AttributeError(f"module 'deeplab_jax' has no attribute '{name}'")
