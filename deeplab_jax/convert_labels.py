"""Converts the labels of annotation tools to masks of class ids and a classes file.

  python -m deeplab_jax.convert_labels SRC --out DIR

SRC is a file or a folder: labelme (a JSON for each image), COCO (JSON, polygons and run lengths), CVAT (XML for
images), Label Studio (JSON), masks in colors with a list of labels (PASCAL VOC's kind, as exported by CVAT), or a
folder with one subfolder of masks for each class. Writes DIR/masks/<image>.png, DIR/classes.txt, and DIR/overlay.png, a
sheet to look at. Then train with
  --config folder --config.data.images=IMAGES --config.data.masks=DIR/masks --config.data.classes=DIR/classes.txt
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli
from deeplab_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("out", None, "folder for the masks and the classes file")
    flags.DEFINE_string("images", None, "folder of the photographs, for the sheet; default: beside the labels")
    flags.DEFINE_string("classes", None, "names in the order of the ids, the first is 0; or the colors of masks")
    flags.DEFINE_integer("examples", 12, "pictures on the sheet; 0 = no sheet", lower_bound=0)


def main(argv: Sequence[str]) -> int:
    """Converts the given labels; returns 1 if some masks could not be converted."""
    if len(argv) != 1:
        raise UserError("name one file or folder of labels, as in python -m deeplab_jax.convert_labels SRC --out DIR")
    if not FLAGS.out:
        raise UserError("--out is missing; name the folder for the masks and the classes file")
    source, out = Path(argv[0]), Path(FLAGS.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: is a file; name a folder")
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if not (source.is_file() or source.is_dir()):
        raise UserError(f"{source}: is a pipe, a device or a socket; name a file or folder of labels")
    if out.resolve() == source.resolve() or (out / "masks").resolve() == source.resolve():
        raise UserError(f"--out={out}: is where the labels are; choose another folder")
    from deeplab_jax.data.annotations import conversion

    images = Path(FLAGS.images) if FLAGS.images else None
    result = conversion.convert(source, out, images, Path(FLAGS.classes) if FLAGS.classes else None, FLAGS.examples)
    print(result.words())
    return int(result.failed > 0)


if __name__ == "__main__":
    define_flags()
    cli.run(main, huge_pages=False)
