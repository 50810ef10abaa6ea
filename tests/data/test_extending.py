"""The data set of docs/extending.md, added in just that way."""

import numpy as np
from etils import epath

from deeplab_jax import data
from deeplab_jax.data import builders, dataset
from tests.data.miniatures import blocks, write_image, write_label
from tests.extending import code_of


def test_a_folder_and_a_name_are_a_data_set(config, tmp_path, monkeypatch):
    (tmp_path / "builders" / "toy").mkdir(parents=True)
    (tmp_path / "builders" / "toy" / "__init__.py").write_text("")
    (tmp_path / "builders" / "toy" / "toy_dataset_builder.py").write_text(code_of("A data set"))
    monkeypatch.setattr(builders, "__path__", [*builders.__path__, str(tmp_path / "builders")])
    monkeypatch.setattr(dataset, "BUILDERS", (*dataset.BUILDERS, "toy"))
    # Inside the package TFDS finds the folder by the module's name.
    monkeypatch.setattr(dataset.builder_class("toy"), "pkg_dir_path", epath.Path(tmp_path / "builders" / "toy"))
    raw = tmp_path / "raw"
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            write_image(raw / split / f"p{i}.png", seed=i)
            write_label(raw / f"{split}_masks" / f"p{i}.png", blocks(0, 1))
    config.data.update(name="toy", train_split="train", dir=str(raw), continuous_scale=False)
    opened = data.open_dataset(config.data, "val")
    assert opened.class_names == ("ground", "hill")
    assert [opened[i].name for i in range(len(opened))] == ["p0", "p1"]
    np.testing.assert_array_equal(np.unique(opened[0].label), [0, 1])
    batches = data.train_batches(data.open_dataset(config.data, "train"), config)
    assert next(batches)["image"].shape == (4, 33, 49, 3)
    batches.close()
