"""Configs of earlier versions: their fields are found under the names of today."""

import pytest

from deeplab_jax.config import load_config, recorded_config
from deeplab_jax.errors import UserError


def test_search_flags_of_then_set_the_fields_of_now():
    config = load_config("camvid", ["crf.search_images=7", "crf.search_grid.bilateral_weight=1.5,2.5"])
    assert config.search.images == 7
    assert config.search.grid.bilateral_weight == (1.5, 2.5)
    assert "search_images" not in config.crf


@pytest.mark.parametrize("override", ["data.early_share=0", "data.early_crop=17,17", "data.early_scales=0.5,1.0"])
def test_flags_that_became_part_of_a_list_are_refused_with_its_name(override):
    with pytest.raises(UserError, match=r"are now config\.data\.stages; give --config\.data\.stages="):
        load_config("camvid", [override])


def test_the_form_that_the_message_shows_is_accepted():
    config = load_config("camvid", ["data.stages=((0.25, (17, 25), (0.5, 1.0)),)"])
    assert config.data.stages == ((0.25, (17, 25), (0.5, 1.0)),)
    assert load_config("camvid", ["data.stages=()"]).data.stages == ()


def test_a_config_file_of_then_works(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from deeplab_jax.configs import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    config.crf.search_images = 12\n"
        "    config.crf.search_thin = ('pole',)\n"
        "    config.data.update(early_share=0.5, early_crop=(81, 97))\n"
        "    return config\n"
    )
    config = load_config(str(tmp_path / "mine.py"))
    assert (config.search.images, config.search.thin, config.search.passes) == (12, ("pole",), 2)
    assert config.data.stages == ((0.5, (81, 97), (0.25, 0.375, 0.5, 0.625, 0.75)),)
    assert "early_share" not in config.data and "search_thin" not in config.crf


def test_a_config_file_of_then_that_reads_a_moved_group_is_told_the_new_name(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from deeplab_jax.configs import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    config.crf.search_grid.update(bilateral_weight=(1.0,))\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match=r"mine\.py: .*config\.crf\.search_grid is now config\.search\.grid"):
        load_config(str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.head_rates_stride=32", "always those of output stride 8"),
        ("model.width_multiplier=0.5", r"now a backbone of its own; docs/extending\.md"),
    ],
)
def test_flags_that_are_gone_are_refused_with_what_to_do(override, words):
    with pytest.raises(UserError, match=f"{override.partition('=')[0]}: .*{words}"):
        load_config("camvid", [override])


def test_gone_fields_of_a_config_file_and_a_record(tmp_path):
    head = "from deeplab_jax.configs import base\ndef get_config():\n    config = base.get_config()\n"
    (tmp_path / "mine.py").write_text(f"{head}    config.model.width_multiplier = 0.5\n    return config\n")
    with pytest.raises(
        UserError, match=r"mine\.py: config\.model\.width_multiplier=0\.5: a VGG-16 with fewer channels"
    ):
        load_config(str(tmp_path / "mine.py"))
    model = {"head_rates": [3, 6], "head_rates_stride": 32, "width_multiplier": 1.0, "output_stride": 32}
    recorded = recorded_config({"model": model}).model
    assert (recorded.head_rates, "width_multiplier" in recorded, "head_rates_stride" in recorded) == (
        (12, 24),
        False,
        False,
    )
    assert recorded_config({"model": {"head_rates": [6], "head_rates_stride": 8}}).model.head_rates == (6,)


def test_a_record_of_then_has_the_fields_of_now():
    config = recorded_config(
        {
            "seed": 3,
            "crf": {"iterations": 4, "search_images": 9, "search_grid": {"gaussian_weight": [1.0, 2.0]}},
            "data": {"early_share": 0.25, "early_crop": [17, 25], "early_scales": [0.5, 1.0], "crop": [33, 49]},
        }
    )
    assert (config.seed, config.crf.iterations, config.search.images) == (3, 4, 9)
    assert config.search.grid.gaussian_weight == (1.0, 2.0)
    assert config.search.grid.bilateral_rgb_std == (3.0, 4.0, 5.0, 6.0)  # a default that it did not record
    assert config.data.stages == ((0.25, (17, 25), (0.5, 1.0)),)
    assert config.data.crop == (33, 49)
    assert config.optimizer.name == "sgd"
    assert recorded_config({"data": {"early_share": 0.0, "early_crop": [17, 25]}}).data.stages == ()
