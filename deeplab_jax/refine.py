"""The fully connected CRF alone, no network: a photograph and rough labels in, labels that follow its outlines out.

  python -m deeplab_jax.refine --image IMG --probs P.npy --out OUT.png       probabilities, [H, W, C]
  python -m deeplab_jax.refine --image IMG --labels L.png --out OUT.png      label map, full or a few scribbles

With folders for --image, --probs or --labels, and --out, each photograph is paired with the file of its name, by the
rules of data sets (docs/own_data.md; a_probs.npy and a.npy belong to a.jpg, a_mask.png and a.png too); existing
results are skipped on a rerun. Writes OUT.png (palette PNG of class ids), OUT_overlay.png, and with --iterations_strip
OUT_iterations.png. Probabilities below 1e-8 are raised to it. With --distributed (automatic under SLURM and Open MPI)
several processes share the photographs (docs/scaling.md).

A label map holds ids, in any format but JPEG, lossy WebP, and gray JPEG 2000 and AVIF, which invent ids; --unknown is
the one for no label.
With --classes it may hold the classes' colors; then void (255; black, white and (224, 224, 192) unless a class has
them) is unknown, without --unknown. Scribbles spread best with wide kernels, for example
  --unknown 0 --bilateral_weight 10 --bilateral_xy_std 80 --bilateral_rgb_std 13 --gaussian_xy_std 3 --iterations 5
Where a label with few scribbles vanishes, raise --confidence.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli, crf_flags, model_flags, process_flags, size_flags
from deeplab_jax.errors import UserError

_PRESET = "v2_resnet101"

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; not on import, as several commands have flags of one name."""
    flags.DEFINE_string("image", None, "the photograph, or a folder of photographs")
    flags.DEFINE_string("probs", None, "probabilities: .npy [H, W, C], float16 to float64; or a folder of them")
    flags.DEFINE_string("classes", None, "classes file with R G B, for --labels in the classes' colors")
    flags.DEFINE_string("labels", None, "label map of ids, or with --classes of colors, full or sparse; or a folder")
    model_flags.define("use the CRF's parameters of a model that the package ships, such as camvid")
    flags.DEFINE_string("out", None, "the palette PNG to write; with folders, a folder")
    unknown = "id of unlabelled pixels in --labels; with --classes void is unknown in any case"
    flags.DEFINE_integer("unknown", 255, unknown, lower_bound=0, upper_bound=255)
    flags.DEFINE_float("confidence", 0.7, "probability that a pixel of --labels is correct")
    flags.DEFINE_bool("iterations_strip", False, "also write the picture of the marginals after each iteration")
    size_flags.define(least=1, older="crf_max_pixels")
    flags.DEFINE_bool("overwrite", False, "with folders, recompute existing results, and replace others of their names")
    process_flags.define_for_shares()
    flags.DEFINE_integer("iterations", None, "mean-field iterations; default: the preset's", lower_bound=0)
    crf_flags.define(preset=_PRESET)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns 1 if some of several files failed, else 0."""
    if model_flags.listed(FLAGS):
        return 0
    if argv:
        raise UserError(f"{argv[0]}: give the photograph with --image, as in --image {argv[0]}")
    for name in ("image", "out"):
        if not FLAGS[name].value:
            raise UserError(f"--{name} is missing; see --help")
    if bool(FLAGS.probs) == bool(FLAGS.labels):
        raise UserError("give either --probs P.npy or --labels L.png to start from")
    if not 0 < FLAGS.confidence < 1:
        raise UserError(f"--confidence={FLAGS.confidence:g}: must lie between 0 and 1, both excluded")
    import jax

    from deeplab_jax.crf.setting import preset_named
    from deeplab_jax.refinement.files import RefineOptions, check_folders, refine_file, refine_folder
    from deeplab_jax.weights import box

    default = str(box.require(FLAGS.model) / box.PRESET) if FLAGS.model else _PRESET
    colors = None
    if FLAGS.classes:
        from deeplab_jax.data.class_files import read_classes

        if FLAGS.probs:
            raise UserError("--classes: is for --labels in the classes' colors; leave it out with --probs")
        colors = read_classes(Path(FLAGS.classes))[1]
        if colors is None:
            raise UserError(f"--classes={FLAGS.classes}: has no colors; give R G B on each line")
    options = RefineOptions(
        crf_flags.setting(FLAGS, FLAGS.iterations, preset_named(default)),
        "probs" if FLAGS.probs else "labels",
        FLAGS.unknown,
        FLAGS.confidence,
        FLAGS.iterations_strip,
        FLAGS.cut_above,
        size_flags.refuse_above(FLAGS),
        colors,
        FLAGS.overwrite,
    )
    image, given, out = Path(FLAGS.image), Path(FLAGS.probs or FLAGS.labels), Path(FLAGS.out)
    job = process_flags.job(FLAGS)
    if image.is_dir():
        check_folders(given, out)
        with job.meeting(out / ".processes"):
            return int(refine_folder(image, given, out, options, job, jax.local_devices()) > 0)
    if job.count > 1:
        raise UserError(f"--image={image}: is one photograph, which {job.count} processes cannot share; give a folder")
    if out.is_dir() or out.suffix != ".png":
        example = out.with_suffix(".png") if out.suffix and not out.is_dir() else out / "OUT.png"
        if out.name == ".png":
            example = out.with_name("OUT.png")
        raise UserError(f"--out={out}: name the PNG file to write, such as {example}")
    refine_file(image, given, out.with_suffix(""), options)
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
