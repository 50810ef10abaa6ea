"""Labels of annotation tools, one file for each format; see `deeplab_jax.convert_labels`."""

from pathlib import Path


def found_in(folder: Path) -> str:
    """What to do where a folder of masks holds a tool's files instead; "" where it does not."""
    for pattern in ("*.json", "*.xml"):
        first = next(iter(sorted(folder.glob(pattern))), None)
        if first is not None:
            return (
                f"{first.name} looks like an annotation tool's; make masks of it first: python -m "
                f"deeplab_jax.convert_labels {folder} --out DIR"
            )
    return ""
