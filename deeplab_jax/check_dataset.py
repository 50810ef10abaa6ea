"""Checks a config's data set: what is wrong with it, how frequent its classes are, and the network's input.

python -m deeplab_jax.check_dataset --config configs/folder.py --config.data.images=DIR --config.data.masks=DIR
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli
from deeplab_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("config", None, "a config file or the name of a shipped config")
    flags.DEFINE_string("out", "", "file for the contact sheet; default runs/<config name>/contact_sheet.png")
    flags.DEFINE_integer(
        "examples", 12, "augmented training examples on the contact sheet; 0 = no sheet", lower_bound=0
    )


def main(argv: Sequence[str]) -> int:
    """Prints the findings; returns 1 if one of them would stop training."""
    if argv:
        raise flags.Error(f"unexpected argument {argv[0]}")
    config = cli.config_from_flags(FLAGS.config)
    if FLAGS.out and Path(FLAGS.out).suffix.lower() != ".png":
        raise UserError(f"--out={FLAGS.out}: the contact sheet is a PNG; name a file such as contact_sheet.png")
    from tqdm import tqdm

    from deeplab_jax.config import files_named
    from deeplab_jax.data import audit, has_holdout, open_dataset, require_labels
    from deeplab_jax.data.pipeline import check_augmentation
    from deeplab_jax.imaging import listing
    from deeplab_jax.training.setup import check_classes, check_crf

    check_augmentation(config)
    check_crf(config)
    held = ("holdout",) if has_holdout(config.data) else ()  # removed from the training split
    selecting = {config.eval.select_split} - {"", "holdout"} if config.eval.every else ()
    splits = tuple(dict.fromkeys((config.data.train_split, *held, config.eval.split, *selecting)))
    builder, sources = audit.sources_of(config.data, splits, config.seed)
    out = Path(FLAGS.out or Path("runs") / config.name / "contact_sheet.png")
    read = [file for of in sources.values() for source in of for file in (source.image, source.label)]
    listing.check_outputs([out], [file for file in read if isinstance(file, Path)] + files_named(config))
    total = sum(map(len, sources.values()))
    with tqdm(total=total, desc="reading images and labels", unit="image", mininterval=0.5) as bar:
        result = audit.audit(builder, sources, bar.update)
    print(report(result))
    if result.class_names:
        check_classes(config, result.class_names)
    if config.eval.every and config.eval.select_split and not result.errors:
        require_labels(open_dataset(config.data, config.eval.select_split, config.seed))
    if FLAGS.examples and result.errors:
        print("No contact sheet: it shows the network's input, which the errors above prevent.", file=sys.stderr)
    elif FLAGS.examples:
        from deeplab_jax.data.contact_sheet import contact_sheet
        from deeplab_jax.imaging import files

        files.write_png(out, contact_sheet(config, FLAGS.examples))
        print(f"\nImages and labels as the network receives them: {out}")
    return 1 if result.errors else 0


def report(result) -> str:
    """The audit as text, with a table of classes."""
    from deeplab_jax.data.class_weights import RULES, class_weights_from_counts

    images = ", ".join(f"{n} in {split}" for split, n in result.images.items())
    lines = [f"Images: {images}. Sizes: {_sizes(result.sizes)}. Classes: {len(result.class_names)}."]
    lines += [f"Void: {', '.join(f'{v:.1%} of {split}' for split, v in result.void.items())}.", ""]
    if not result.findings:
        lines.append("No problems found.")
    for finding in result.findings:
        lines.append(f"{'ERROR' if finding.error else 'note '}  {finding.count} x: {finding.sentence}")
        lines += [f"         {example}" for example in finding.examples]
        if finding.examples and finding.count > len(finding.examples):
            lines.append(f"         and {finding.count - len(finding.examples)} more")
    train, *_ = result.pixels
    counts = result.pixels[train]
    if result.class_names and counts.sum():
        width = max(5, *(len(name) for name in result.class_names))
        weights = {rule: class_weights_from_counts(counts.tolist(), rule) for rule in RULES}
        heads = "".join(f"  {rule:>6}" for rule in RULES)
        lines += ["", f"  id  {'class':{width}}   pixels  images   weight:{heads}   ({train})"]
        for i, name in enumerate(result.class_names):
            values = "".join(f"  {of[i]:{max(6, len(rule))}.2f}" for rule, of in weights.items())
            lines.append(
                f"{i:4d}  {name:{width}}  {counts[i] / counts.sum():7.3%}  {result.images_with[train][i]:6d}"
                f"          {values}"
            )
        rules = ", ".join(f"('{rule}',)" for rule in RULES)
        lines.append(f"Class weights go into config.loss.class_weights: {rules}, or numbers.")
    return "\n".join(lines)


def _sizes(sizes: list[tuple[int, int]]) -> str:
    if not sizes:
        return "none readable"
    if len(sizes) <= 3:
        return ", ".join(f"{w}x{h}" for h, w in sizes)
    heights, widths = zip(*sizes)
    return f"{len(sizes)} different, {min(widths)}..{max(widths)} wide and {min(heights)}..{max(heights)} high"


if __name__ == "__main__":
    define_flags()
    cli.run(main, huge_pages=False)
