"""Labels of annotation tools, one file for each format; see `deeplab_jax.convert_labels`."""

from pathlib import Path


def found_in(folder: Path) -> str:
    """Advice for a folder of masks that holds a tool's files instead; "" for others."""
    for pattern in ("*.json", "*.xml"):
        first = next(iter(sorted(folder.glob(pattern))), None)
        if first is not None:
            return (
                f"{first.name} looks like an annotation tool's; convert it to masks first: python -m "
                f"deeplab_jax.convert_labels {folder} --out DIR"
            )
    return ""
