"""The search over a grid of the CRF's parameters, coarse to fine, on a landscape whose best is known."""

import json

import numpy as np
import pytest

from deeplab_jax.config import load_config
from deeplab_jax.errors import UserError
from deeplab_jax.runs.job import Job
from deeplab_jax.search import grid, groups
from deeplab_jax.search.grid import Candidate, Counts, Ledger, Row
from tests.small_disk import mounted

GRID = dict(grid.GRIDS["v2"]) | {"normalization": ("after",)}
BEST = Candidate(4.5, 55.0, 3.5, 3.0, 3.0, "after")


class Landscape:
    """A scorer whose mean IoU falls with the distance from BEST; images differ a little."""

    objective = "mean_iou"

    def __init__(self, images: int = 40, stop_after: int | None = None):
        self.images, self.stop_after, self.measured = images, stop_after, []

    def __len__(self) -> int:
        return self.images

    def count(self, image, settings):
        for setting in settings:
            if self.stop_after is not None and len(self.measured) >= self.stop_after:
                raise KeyboardInterrupt
            self.measured.append((setting, image))
            far = 6.0 if setting is None else sum(abs(a - b) / s for a, b, s in zip(setting, BEST, (1, 10, 1, 1, 1)))
            hit = np.array([10_000 - 500 * far - 3 * (image % 5)])
            counts = Counts(hit, np.array([10_000]), np.array([10_000]))
            yield setting, {"mean_iou": counts, "trimap": counts}


def ledger(tmp_path, **about) -> Ledger:
    return Ledger(tmp_path / "results.jsonl", about)


def test_finds_the_best_between_the_coarse_values(tmp_path):
    scorer = Landscape()
    result = grid.search(scorer, ledger(tmp_path), GRID, say=str)
    assert result.best == BEST
    every = len(grid.settings_of(GRID)) * 40
    assert len(scorer.measured) < every / 3  # most settings were dropped early
    assert len(scorer.measured) == len(set(scorer.measured))  # nothing was measured twice
    assert result.rows[0].setting == BEST and result.rows[0].images == 40
    assert [len(scores) for _, scores in result.grids] == [128, 27]
    assert any(row.setting is None and row.images == 40 for row in result.rows)


def test_exhaustive_measures_all_on_all(tmp_path):
    scorer = Landscape(6)
    grid.search(scorer, ledger(tmp_path), GRID, passes=1, exhaustive=True, say=str)
    assert len(scorer.measured) == (128 + 1) * 6


def test_a_stopped_search_goes_on(tmp_path):
    whole = Landscape()
    expected = grid.search(whole, ledger(tmp_path / "whole"), GRID, say=str)
    first = Landscape(stop_after=700)
    with pytest.raises(KeyboardInterrupt):
        grid.search(first, ledger(tmp_path, step=1), GRID, say=str)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('["[3.0, 30.0, 3.0, 3.0, 3.0, \\"after\\"]", 0, {"mean')  # torn by a kill
    second = Landscape()
    result = grid.search(second, ledger(tmp_path, step=1), GRID, say=str)
    assert result.best == expected.best and result.rows == expected.rows
    assert len(first.measured) + len(second.measured) == len(whole.measured)


def test_a_full_disk_during_a_search_is_a_sentence(tmp_path):
    with mounted(tmp_path / "disk", "64k") as disk:
        results = ledger(disk, step=1)
        many = {"mean_iou": Counts(*[np.arange(21)] * 3)}
        with pytest.raises(UserError, match=r"results.jsonl: cannot be written \(no space left on device\); free disk"):
            for image in range(4000):
                results.add(None, image, many)
        results.close()
        whole = [line for line in (disk / "results.jsonl").read_text().splitlines()[1:] if line.endswith("]")]
        assert len(whole) > 100  # what was written stands


def test_results_of_another_checkpoint_are_not_used(tmp_path):
    grid.search(Landscape(4), ledger(tmp_path, step=1), GRID, passes=1, say=str)
    assert ledger(tmp_path, step=1).results
    assert not ledger(tmp_path, step=2).results


def test_a_reference_outside_the_grid_may_win(tmp_path):
    axes = GRID | {"bilateral_xy_std": (30.0, 40.0), "bilateral_weight": (3.0, 3.5)}
    result = grid.search(Landscape(5), ledger(tmp_path), axes, references=[BEST], say=str)
    assert result.best == BEST


@pytest.mark.parametrize(("offset", "wins"), [(0.2, True), (-2.0, False)])
def test_an_improved_setting_counts_only_where_it_is_better(tmp_path, offset, wins):
    axes = GRID | {"bilateral_xy_std": (50.0,), "bilateral_weight": (4.0,)}
    improve = lambda best: best._replace(bilateral_weight=best.bilateral_weight + offset)  # noqa: E731
    result = grid.search(Landscape(5), ledger(tmp_path), axes, passes=1, improve=improve, say=str)
    assert result.best.bilateral_weight == (4.0 + offset if wins else 4.0)
    assert sum(row.images == 5 and row.setting is not None for row in result.rows) >= 2


@pytest.mark.parametrize("stop_after", [None, 100])
def test_progress_ends_at_its_total(tmp_path, monkeypatch, stop_after):
    meters = []

    class Meter(grid.Meter):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            meters.append(self)

    monkeypatch.setattr(grid, "Meter", Meter)
    if stop_after:
        with pytest.raises(KeyboardInterrupt):
            grid.search(Landscape(stop_after=stop_after), ledger(tmp_path), GRID, say=str)
    grid.search(Landscape(), ledger(tmp_path), GRID, say=str)
    # The best of the coarse pass is in the fine one too, and measured already.
    assert meters[-1].total - 40 <= meters[-1].done <= meters[-1].total
    assert meters[-1].measured == meters[-1].done - (stop_after or 0)


@pytest.mark.parametrize("objective, best", [("mean_iou", 3.0), ("trimap", 6.0), ("both", 5.0)])
def test_both_objectives_can_count(tmp_path, objective, best):
    class TwoPeaks(Landscape):
        def count(self, image, settings):
            for setting in settings:
                w = setting.bilateral_weight if setting else 0.0
                iou, trimap = (Counts(np.array([h]), *[np.array([1000.0])] * 2) for h in (900 - 20 * (w - 3) ** 2,
                               900 - 40 * (w - 6) ** 2))  # fmt: skip
                yield setting, {"mean_iou": iou, "trimap": trimap}

    scorer = TwoPeaks(5)
    scorer.objective = objective
    result = grid.search(scorer, ledger(tmp_path), GRID | {"bilateral_xy_std": (50.0,)}, passes=1, say=str)
    assert result.best.bilateral_weight == best
    scores = result.rows[0].scores
    assert scores["both"] == pytest.approx((scores["mean_iou"] + scores["trimap"]) / 2)


def test_mean_iou_is_of_the_sum():
    one = Counts(np.array([10, 0]), np.array([10, 0]), np.array([10, 5]))
    two = Counts(np.array([0, 20]), np.array([10, 20]), np.array([0, 30]))
    assert grid.mean_iou([one, two]) == pytest.approx((10 / 20 + 20 / 35) / 2)


def test_finer_grids_stay_positive():
    axes = GRID | {"bilateral_rgb_std": (1.0, 3.0), "gaussian_weight": (0.0, 2.0)}
    fine = grid.around(Candidate(3.0, 30.0, 1.0, 0.0, 3.0, "after"), axes)
    assert fine["bilateral_rgb_std"] == (1.0, 2.0) and fine["gaussian_weight"] == (0.0, 1.0)
    assert fine["thin_factor"] == (1.0,) and fine["thin"] == ((),)  # fields with a default need no axis


def test_thin_classes_have_a_multiple_of_the_weight():
    flags = grid.thin_flags(["pole", "sign"], ["sky", "pole", "sign"])
    assert flags == (False, True, True)
    axes = {"bilateral_weight": (1.0, 2.0), "thin_factor": (1.0, 2.0, 4.0), "thin": (flags,)}
    axes |= {"bilateral_xy_std": (30.0,), "bilateral_rgb_std": (3.0,), "gaussian_weight": (0.5,)}
    axes |= {"gaussian_xy_std": (1.0,), "normalization": ("after",)}
    settings = grid.settings_of(axes)
    assert len(settings) == 6 and settings[5] == Candidate(2.0, 30.0, 3.0, 0.5, 1.0, "after", 4.0, flags)
    np.testing.assert_array_equal(settings[5].params.bilateral_weight, [2, 8, 8])
    assert settings[5].params.gaussian_weight == 0.5 and settings[5].params.bilateral_xy_std == 30.0
    assert grid.around(settings[5], axes)["thin_factor"] == (3.0, 4.0, 5.0)
    assert grid.around(settings[5], axes)["thin"] == (flags,)
    assert settings[5]._replace(thin=()).params.bilateral_weight == 2.0  # nothing is thin: a factor has no meaning
    with pytest.raises(UserError, match="thin class 'poles': no such class; there are sky, pole, sign"):
        grid.thin_flags(["poles"], ["sky", "pole", "sign"])


def test_a_search_ends_where_another_process_does(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPLAB_HEARTBEAT_SECONDS", "1")
    job = Job(0, 2)
    words = "process 1 did not appear in 1 seconds; run the same command again, which continues from here"
    with pytest.raises(UserError, match=words), job.meeting(tmp_path / "m"):
        grid.search(Landscape(), ledger(tmp_path), GRID, passes=1, say=str, job=job)
    assert len(ledger(tmp_path).results) > 0  # its own share is kept


def test_settings_are_json_keys():
    assert json.loads(BEST.key) == [4.5, 55.0, 3.5, 3.0, 3.0, "after", 1.0, []]
    assert Row(None, 1, {}).setting is None


def test_the_gain_is_given_for_a_group_that_the_search_did_not_see(tmp_path):
    """Of two settings, each helps one group and harms the other: chosen on the other, both harm."""
    a, b = BEST, BEST._replace(bilateral_weight=1.0)
    found = ledger(tmp_path)
    hits = {(None, 0): 50, (None, 1): 50, (None, 2): 50, (a, 0): 70, (a, 1): 70, (a, 2): 40, (b, 0): 45, (b, 1): 45}
    for (setting, image), hit in (hits | {(b, 2): 90}).items():
        counts = Counts(np.array([hit]), np.array([100]), np.array([100]))
        found.add(setting, image, {"mean_iou": counts, "trimap": counts})
    gains = groups.gains_on_unseen(found, [a, b], ["x", "x", "y"], "mean_iou")
    iou = lambda hit: hit / (200 - hit)  # noqa: E731
    assert [(g.group, g.images) for g in gains] == [("x", 2), ("y", 1)]
    assert [g.gain for g in gains] == pytest.approx([iou(45) - iou(50), iou(40) - iou(50)])
    line = groups.sentence(gains, "mean_iou")
    assert line.startswith(
        "mean_iou gained on a group that the search did not see: x -4.30 (2 images), y -8.33 (1 images)"
    )
    assert groups.gains_on_unseen(found, [a, b], ["x"] * 3, "mean_iou") == [] and groups.sentence([], "mean_iou") == ""


def test_values_of_an_axis():
    assert grid.axis("bilateral_xy_std", ["50", "30", "40.5"], "--bilateral_xy_std") == (30.0, 40.5, 50.0)
    for values in (["a"], [], ["0"], ["nan"], [-1.0]):
        with pytest.raises(UserError, match="--bilateral_xy_std="):
            grid.axis("bilateral_xy_std", values, "--bilateral_xy_std")
    with pytest.raises(UserError, match="--thin_factor=0: needs finite numbers, above 0"):
        grid.axis("thin_factor", ["0"], "--thin_factor")
    assert grid.axis("gaussian_weight", (0.0,), "--gaussian_weight") == (0.0,)
    for name, value in (("bilateral_xy_std", 0.001), ("bilateral_xy_std", 1e9), ("bilateral_weight", 1e9)):
        with pytest.raises(UserError, match=f"--{name}=.*: must lie between"):  # no preset may hold it
            grid.axis(name, [1.0, value], f"--{name}")


def test_the_finer_grid_stays_within_what_presets_hold():
    axes = {"bilateral_weight": (0.0, 2.0), "bilateral_xy_std": (0.01, 4.0), "gaussian_xy_std": (2.0, 1e6)}
    axes |= {"bilateral_rgb_std": (3.0,), "gaussian_weight": (0.0,), "normalization": ("after",)}
    fine = grid.around(grid.Candidate(0.0, 0.01, 3.0, 0.0, 1e6, "after"), axes)
    assert (fine["bilateral_weight"], fine["bilateral_xy_std"]) == ((0.0, 1.0), (0.01, 2.005))
    assert fine["gaussian_xy_std"] == (500001.0, 1e6)


def test_images_without_boundaries_do_not_decide_the_first_round(tmp_path):
    """The trimap of the first round's images is empty, so its mean IoU counts there."""

    class Empty(Landscape):
        def count(self, image, settings):
            none = Counts(*[np.zeros(1)] * 3)
            first = image in grid._spread(len(self))[:4]
            return ((s, c | {"trimap": none} if first else c) for s, c in super().count(image, settings))

    for objective in ("trimap", "both"):
        scorer = Empty(40)
        scorer.objective = objective
        found = grid.search(scorer, ledger(tmp_path / objective), GRID, passes=1, say=str)
        assert (
            found.best == grid.search(Landscape(40), ledger(tmp_path / f"{objective}_"), GRID, passes=1, say=str).best
        )
        assert not any(np.isnan(value) for row in found.rows for value in [row.scores["both"]])


def test_a_group_without_labels_has_no_gain(tmp_path):
    setting = grid.Candidate(1.0, 1.0, 1.0, 1.0, 1.0, "after")
    found = ledger(tmp_path)
    for image in range(3):
        for which, hit in ((None, 50), (setting, 60)):
            counts = Counts(*(np.array([n if image < 2 else 0]) for n in (hit, 100, 100)))
            found.add(which, image, {"mean_iou": counts, "trimap": counts})
    assert [g.group for g in groups.gains_on_unseen(found, [setting], ["x", "y", "void"], "both")] == ["x", "y"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("grid.bilateral_xy_std", (0.0, 30.0), r"config\.search\.grid\.bilateral_xy_std=0\.0,30\.0: needs .* above 0"),
        ("grid.gaussian_weight", (), r"config\.search\.grid\.gaussian_weight=: needs finite numbers"),
    ],
)
def test_mistakes_in_the_config_are_named(field, value, message):
    config = load_config("shapes")
    assert grid.configured_axes(config.search) == {name: tuple(v) for name, v in config.search.grid.items()}
    config.search.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        grid.configured_axes(config.search)
