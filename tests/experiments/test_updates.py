"""Mean field against Frank-Wolfe on a network's scores: the measurement, with a network that is a table of scores."""

from types import SimpleNamespace

import numpy as np
import pytest

from deeplab_jax.crf import CRFParams, Setting
from experiments import updates


class Scenes(list):
    """A data set; None is a photograph that cannot be decoded."""

    num_classes = 3


@pytest.fixture
def scenes() -> Scenes:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(3, dtype=np.uint8), 12)[None].repeat(24, 0)
    image = (80 * truth[..., None] + rng.integers(0, 5, (24, 36, 3))).astype(np.uint8)
    return Scenes([SimpleNamespace(image=image, label=truth), None, SimpleNamespace(image=image, label=truth)])


@pytest.mark.long
def test_updates_are_measured_beside_the_network(scenes):
    noise = np.random.default_rng(1).normal(0, 1, (24, 36, 3))
    scores = np.float32(np.log(np.eye(3)[scenes[0].label] * 0.4 + 0.2) + noise)
    setting = Setting(CRFParams(4.0, 12.0, 10.0, 2.0, 1.5), iterations=3, normalization="symmetric")
    model = SimpleNamespace(crf=setting, segmenter=SimpleNamespace(scores=lambda images: [scores] * len(images)))
    chosen = {name: updates.UPDATES[name] for name in ("mean field", "Frank-Wolfe, entropy 1")}
    network, mean_field, frank_wolfe = updates.measure(model, scenes, [0, 1, 2], chosen)
    assert network["energy"] == 0 and 0.2 < network["mean_iou"] < 0.7
    for found in (mean_field, frank_wolfe):
        assert found["energy"] < -1 and found["mean_iou"] > network["mean_iou"] + 0.2
    assert "Frank-Wolfe, entropy 1" in updates.table([network, mean_field, frank_wolfe], "test").text()
