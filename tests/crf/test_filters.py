"""A filter is added as docs/extending.md does it: its file and one line."""

import jax
import numpy as np
import pytest
from absl import flags

from deeplab_jax import crf_flags
from deeplab_jax.crf import CRFParams, MeanFieldCRF, Setting, filters, mean_field, write_preset
from tests.extending import module_of

PARAMS = CRFParams(2.0, 6.0, 30.0, 1.5, 1.0)


@pytest.fixture
def sampled(monkeypatch):
    """The page's example, in the registry as "sampled"."""
    module = module_of("A filter of the CRF", "sampled", monkeypatch)
    monkeypatch.setitem(filters.FILTERS, "sampled", filters.Filter(module))


def test_it_is_a_filter_like_the_others(sampled, scene, definition):
    unary, image = scene.unary[:9, :10], scene.image[:9, :10]
    q = np.asarray(mean_field(unary, image, PARAMS, 2, bilateral="sampled", normalization="none"))
    kernel, spatial = definition.image_kernels(image, PARAMS)
    groups = np.arange(90) // 4 * 4  # each point counts as the first of its four
    kernels = [(kernel[:, groups], PARAMS.bilateral_weight), (spatial, PARAMS.gaussian_weight)]
    wanted = definition.mean_field(unary.reshape(-1, 4), kernels, 2, "none")
    np.testing.assert_allclose(q.reshape(-1, 4), wanted, atol=2e-4)
    layer = MeanFieldCRF(4, PARAMS, 1, bilateral="sampled", learn=("stds",))
    variables = layer.init(jax.random.key(0), unary, image)
    gradient = jax.jit(jax.grad(lambda v: layer.apply(v, unary, image)[..., 0].sum()))(variables)
    assert np.abs(gradient["params"]["log_bilateral_rgb_std"]).max() > 0


def test_the_flag_takes_its_name(sampled):
    values = flags.FlagValues()
    crf_flags.define_bilateral("", values)
    values(["refine", "--bilateral=sampled"])
    assert values.bilateral == "sampled"
    with pytest.raises(
        flags.IllegalFlagValueError, match=r"^flag --bilateral=sample: must be one of auto, .*, sampled$"
    ):
        values(["refine", "--bilateral=sample"])


def test_a_setting_takes_its_filter_from_the_flag_then_the_preset_then_the_model(sampled, tmp_path):
    model = Setting(CRFParams(), bilateral="exact")
    write_preset(tmp_path / "own.json", Setting(PARAMS, 3, "before", bilateral="sampled"))
    for given, wanted in (
        ([], (10, "after", "exact")),
        (["--preset=v2_vgg16"], (10, "after", "exact")),
        ([f"--preset={tmp_path}/own.json"], (3, "before", "sampled")),
        ([f"--preset={tmp_path}/own.json", "--bilateral=separable", "--normalization=none"], (3, "none", "separable")),
    ):
        values = flags.FlagValues()
        crf_flags.define("v2_resnet101", values)
        values(["refine", *given])
        found = crf_flags.setting(values, None, model)
        assert (found.iterations, found.normalization, found.bilateral) == wanted
