"""The papers' figures, and the configs of the rows."""

import pytest

from deeplab_jax.config import load_config
from experiments import ablation_resnet, aspp, beliefs, common, crf_iterations, field_of_view, learning_rate, trimap


def test_field_of_view_is_v1_table_2():
    assert [row[2:8] for row in field_of_view.PAPER] == [
        (7, 4, 224, "134.3M", 67.64, 1.44),
        (4, 4, 128, "65.1M", 63.74, 2.90),
        (4, 8, 224, "65.1M", 67.14, 2.90),
        (3, 12, 224, "20.5M", 67.64, 4.84),
    ]


def test_field_of_view_computes_receptive_fields_and_parameters():
    configs = [field_of_view.with_network(load_config(row[1]), row[1]) for row in field_of_view.PAPER]
    table = field_of_view.table(configs, [None] * 4, [None] * 4, "voc")
    assert [(row[5], row[7]) for row in table.rows] == [
        (404, 134_346_581),
        (308, 65_140_565),
        (404, 65_140_565),
        (435, 20_505_429),
    ]
    assert [config.model.head_rates for config in configs] == [(row[3],) for row in field_of_view.PAPER]
    assert [config.model.head_kernel for config in configs] == [row[2] for row in field_of_view.PAPER]
    assert all(row[9] is None and row[11] is None for row in table.rows)  # ours: empty until run


def test_field_of_view_plots_what_there_is():
    found = [[entry(0, 0.2, 0.1), entry(10, iou, 0.1)] for iou in (0.4, 0.3, 0.35, 0.2)]
    speeds, none = [1.0, 2.0, 2.0, 3.0], [None] * 4

    def lines(speeds, found):
        figure = field_of_view.plot(speeds, found, [4_000_000] * 4, "shapes")
        return {a.get_ylabel(): [list(line.get_ydata()) for line in a.get_lines()] for a in figure.axes}

    paper = [1.44 / 1.44, 2.90 / 1.44, 2.90 / 1.44, 4.84 / 1.44]
    ious = {"mean IoU with CRF [%]": [[67.64, 63.74, 67.14, 67.64], [pytest.approx(v) for v in (40, 30, 35, 20)]]}
    assert lines(speeds, none) == {"training speed, 7x7 = 1": [paper, speeds]}
    assert lines(none, found) == ious
    assert lines(speeds, found) == {"training speed, 7x7 = 1": [paper, speeds]} | ious


def test_learning_rate_is_v2_table_2():
    rows = learning_rate.variants(learning_rate.LONGEST, learning_rate.LARGEST)
    assert [(*v.cells, *v.paper) for v in rows] == [
        ("step", 30, 6000, 62.25),
        ("poly", 30, 6000, 63.42),
        ("poly", 30, 10000, 64.90),
        ("poly", 10, 10000, 64.71),
        ("poly", 10, 20000, 65.88),
    ]
    assert rows[0].overrides["optimizer.step_size"] == 2000
    assert [v.cells for v in learning_rate.variants(200, 12)][0::4] == [("step", 12, 60), ("poly", 4, 200)]


def test_aspp_is_v2_table_3():
    rows = aspp.variants()
    assert [v.paper for v in rows] == [(65.76, 69.84), (66.98, 69.73), (68.96, 71.57)]
    for v, name in zip(rows, ("voc_vgg16_largefov", "voc_vgg16_aspp_s", "voc_vgg16_aspp_l")):
        built, shipped = common.changed(load_config("voc_vgg16_aspp_l"), v.overrides), load_config(name)
        assert (built.model.head, built.model.head_rates) == (shipped.model.head, shipped.model.head_rates)


def test_resnet_ablation_is_v2_table_4():
    assert [paper for _, paper in ablation_resnet.PAPER] == [68.72, 71.27, 73.28, 74.87, 75.54, 76.35, 77.69]
    rows = ablation_resnet.variants(coco_init="runs/coco")
    built = [common.changed(load_config("voc_aspp_l"), v.overrides) for v in rows]
    assert [c.model.head for c in built] == ["plain"] * 4 + ["largefov", "aspp"]
    assert [len(c.model.scales) for c in built] == [1, 3, 3, 3, 3, 3]
    assert [len(c.data.scales) for c in built] == [1, 1, 1, 5, 5, 5]
    assert [c.init_from for c in built] == ["", "", *["runs/coco"] * 4]
    assert [v.cells[1] for v in ablation_resnet.variants()][2] == "paper only"
    staged = ablation_resnet.variants(stages=((0.5, (161, 209), (0.5, 1.0)),), continuous_scale=True)
    plain, augmented = staged[0].overrides, staged[3].overrides
    assert (plain["data.scales"], plain["data.stages"]) == ((1.0, 1.0), ((0.5, (161, 209), (1.0, 1.0)),))
    assert not {"data.scales", "data.stages"} & {*augmented}
    changed = common.changed(load_config("camvid"), plain)
    assert changed.data.stages == plain["data.stages"]
    assert built[-1].model == load_config("voc_aspp_l").model
    plain = load_config("voc_resnet101")
    assert (built[0].model.head, built[0].data.scales) == (plain.model.head, plain.data.scales)


@pytest.mark.parametrize("name", ("shapes", "camvid"))
def test_rows_build_on_small_configs_too(name):
    from deeplab_jax.models import architecture_of

    config = load_config(name)
    rows = aspp.variants(config.model.backbone, 0.33)
    rows += ablation_resnet.variants(config.model.backbone, config.data.continuous_scale, rate_scale=0.33)
    rows += learning_rate.variants(100, 6)
    for v in rows:
        architecture_of(common.changed(config, v.overrides).model)


def entry(iterations, iou, trimap_iou):
    trimap_of = {str(w): {"mean_iou": trimap_iou, "pixel_accuracy": trimap_iou + 0.1} for w in (1, 3)}
    return {
        "crf_iterations": iterations, "mean_iou": iou, "pixel_accuracy": iou + 0.1, "trimap": trimap_of,
        "trimap_source": "boundary", "images": 5,
    }  # fmt: skip


def test_trimap_table_and_plot():
    curves = {"network alone": entry(0, 0.6, 0.3), "CRF": entry(10, 0.65, 0.4)}
    table = trimap.table(curves, "mean_iou", "shapes")
    assert [row[0] for row in table.rows] == ["1 px", "3 px", "whole image"]
    assert table.rows[1][2:] == (30.0, 40.0)
    assert table.rows[2][2:] == (60.0, 65.0)
    assert "DeepLab-LargeFOV 62.25 / 67.64" in table.rows[2][1]
    assert len(trimap.plot(curves).axes) == 2


def test_crf_iterations_tables():
    results = [entry(n, 0.6 + 0.01 * n, 0.3 + 0.02 * n) for n in (0, 1, 10)]
    fixed = crf_iterations.System("piecewise 4", "fixed (v2_resnet101)", results)
    learned = crf_iterations.System("end to end 4", "learned", results)
    summary, whole, near = crf_iterations.tables([fixed, learned], 3, "shapes")
    assert summary.rows[0][2:5] == pytest.approx((60.0, 70.0, 10.0))
    assert summary.rows[0][5:8] == pytest.approx((30.0, 50.0, 20.0))
    assert summary.rows[0][8] == "70.00 at 10"
    assert [row[:2] for row in whole.rows] == [("0", 76.35), ("1", None), ("10", 77.69)]
    assert [row[2] for row in near.rows] == pytest.approx([30.0, 32.0, 50.0])


def test_belief_figures():
    import numpy as np

    q = np.array([[[0.5, 0.5], [0.4, 0.6]], [[1.0, 0.0], [0.0, 1.0]]]).reshape(2, 1, 2, 2)
    first, second = beliefs.figures_of(q, 1)
    assert first[2] == f"{(np.log(2) - 0.4 * np.log(0.4) - 0.6 * np.log(0.6)) / 2:.4f}"
    assert first[3] is None and second[2:] == (f"{0:.4f}", pytest.approx(45.0), 0.0, 50.0)
    assert beliefs.choose_class(q, ("a", "b"), "b") == 1
    with pytest.raises(beliefs.UserError, match="one of a, b"):
        beliefs.choose_class(q, ("a", "b"), "c")
    picture = beliefs.picture(np.zeros((40, 60, 3), np.uint8), q[..., 0].repeat(40, 1).repeat(30, 2), (0, 1), "a")
    assert picture.shape[1] > 3 * 60 and picture.dtype == np.uint8
