"""A picture of training examples exactly as the network receives them."""

import numpy as np
from PIL import Image, ImageDraw

from deeplab_jax.data.dataset import open_dataset
from deeplab_jax.data.pipeline import stages, train_batches

_CAPTION = 16


def contact_sheet(config, count: int = 12, columns: int = 4) -> np.ndarray:
    """The first examples of each stage of the run that `config` describes, `count` in all, after augmentation.

    Args:
      config: a whole config; its seed determines the random choices, as in training.
      count: the number of examples.
      columns: pairs of image and label side by side.

    Returns:
      uint8 `[H, W, 3]`: image beside label in the data set's colors, void white, padding crossed out; above, the names
      of the classes in the crop.
    """
    dataset = open_dataset(config.data, config.data.train_split, config.seed)
    batches = train_batches(dataset, config)
    palette = dataset.palette.copy()
    palette[255] = 255
    begins = [0, *(stage.end for stage in stages(config) if stage.end < config.num_steps)]
    shares = [len(share) for share in np.array_split(np.arange(count), len(begins))]
    indices = [begin * config.batch_size + k for begin, share in zip(begins, shares, strict=True) for k in range(share)]
    examples = [batches.example(*divmod(n, config.batch_size)) for n in indices]
    height, width = np.max([label.shape for _, label, _ in examples], axis=0).tolist()  # stages have crops of their own
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (2 * width + 6), rows * (height + _CAPTION + 4)), (40, 40, 40))
    pen = ImageDraw.Draw(sheet)
    for n, (index, (image, label, valid)) in enumerate(zip(indices, examples, strict=True)):
        x, y = n % columns * (2 * width + 6), n // columns * (height + _CAPTION + 4)
        present = [dataset.class_names[i] for i in np.unique(label) if i < dataset.num_classes]
        caption = f"{batches.source(index).name}: {', '.join(present)}"
        pen.text((x + 2, y + 2), caption[: (2 * width) // 6], (255, 255, 255))
        for part, picture in enumerate((image, palette[label])):
            picture = np.where(valid[..., None], picture, _crosses(*label.shape))
            sheet.paste(Image.fromarray(np.ascontiguousarray(picture, np.uint8)), (x + part * width, y + _CAPTION))
    return np.array(sheet)


def _crosses(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    lines = ((y + x) % 16 < 2) | ((y - x) % 16 < 2)
    return np.where(lines[..., None], 110, 60).astype(np.uint8)
