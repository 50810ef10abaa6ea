"""The platform for which a program is traced; the only source for code whose form depends on it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

# Part of the key of JAX's caches, so that programs traced for one platform are not used for another.
_targets: Any = jax.make_user_context(default_value=None)

# The platform of programs traced for several kinds of platforms.
ANY = "any"


def platform() -> str:
    """The platform of the program being traced: "cpu", "gpu", "tpu", or `ANY` in a program for several.

    It is set by the innermost `tracing_for`; else it is that of `jax.default_device`, if set; else JAX's default
    backend.

    >>> with tracing_for("cuda"):
    ...     platform()
    'gpu'
    """
    if _targets.value is not None:
        return _targets.value
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # JAX adds its settings at run time
    if device is not None:
        return _kind(device if isinstance(device, str) else device.platform)
    return jax.default_backend()


@contextmanager
def tracing_for(platforms: str | Sequence[str]) -> Iterator[None]:
    """Programs traced inside are for these platforms, regardless of the platform of this process.

    Args:
      platforms: "cpu", "gpu" (also "cuda" or "rocm") or "tpu", or several of them.
    """
    names = {_kind(name) for name in ([platforms] if isinstance(platforms, str) else platforms)}
    with _targets(names.pop() if len(names) == 1 else ANY):
        yield


def _kind(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform
