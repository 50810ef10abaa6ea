"""The report page: its contents, and that it is self-contained."""

import json
import re

import numpy as np
import pytest

from deeplab_jax.errors import UserError
from deeplab_jax.imaging import files
from deeplab_jax.imaging.palettes import voc_palette
from deeplab_jax.pages import charts
from deeplab_jax.pages.report import build_report, write_report
from tests.browser import complaints, headless_browser, keep_screenshot
from tests.toy_workdir import photograph

pytest.importorskip("jinja2", reason="Jinja2 is not installed")
HOSTILE = '<script>alert("name")</script>'


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir as `main` leaves it, with a class and an image whose names are hostile."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(
        json.dumps({"name": "toy", "seed": 3, "crf": {"iterations": 5, "preset": HOSTILE}})
    )
    run = {
        "time": "2026-01-01",
        "command": ["main.py", "--config", "toy"],
        "deeplab_jax": "0",
        "commit": "abcdef0123456789",
    }
    (folder / "run.json").write_text(
        json.dumps([run | {"python": "3.11", "packages": {"jax": "1"}, "devices": ["cpu:x"]}])
    )
    rows = [
        {"step": n, "train/loss": 2 / n, "train/loss_crf": 1 / n, "train/learning_rate": 0.1} for n in range(1, 900)
    ]
    text = "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 900, "train/lo'
    (folder / "metrics.jsonl").write_text(text)
    results = [
        {
            "crf_iterations": n,
            "bilateral": "exact",
            "mean_iou": 0.5 + n / 100,
            "pixel_accuracy": 0.75,
            "mean_accuracy": 0.6,
            "frequency_weighted_iou": None,
            "per_class_iou": {"sky": 0.4 + n / 100, HOSTILE: None},
            "trimap": {str(w): {"mean_iou": 0.3, "pixel_accuracy": w / 100} for w in (1, 5, 10)},
            "images": 2,
        }
        for n in (0, 1, 5)
    ]
    (folder / "eval").mkdir()
    (folder / "eval" / "val.json").write_text(json.dumps(results))
    pictures = []
    for index, kind in enumerate(("best", "sample")):
        names = {key: f"overlays/parts/{kind}_{key}.png" for key in ("photo", "truth", "0", "1", "5")}
        image = photograph((60, 80), seed=index)
        files.write_png(folder / "eval" / names["photo"], image)
        for n, key in enumerate(("truth", "0", "1", "5")):
            files.write_palette_png(
                folder / "eval" / names[key], (image[..., 0] // (60 + n)).astype(np.uint8), voc_palette()
            )
        about = {"kind": kind, "index": index, "overlay": "x.png", "photo": names["photo"], "truth": names["truth"]}
        pictures.append(about | {"labels": {n: names[n] for n in ("0", "1", "5")}})
    images = [{"name": HOSTILE, "mean_iou": [0.25, 0.3, 0.45]}, {"name": "b", "mean_iou": [None, None, None]}]
    about = {"crf_iterations": [0, 1, 5], "images": images, "pictures": pictures}
    (folder / "eval" / "val_images.json").write_text(json.dumps(about))
    return folder


def test_page_holds_numbers_curves_and_pictures(workdir):
    page = build_report(workdir)
    for text in (
        "mean IoU",
        "55.0",
        "+5.0",
        "CRF ×5",
        "network alone",
        "2 images",
        "abcdef0123",
        "off 25.0",
        "on 45.0",
    ):
        assert text in page
    assert page.count("data:image/jpeg;base64,") == 8  # two images: photograph, truth, off, on
    assert page.count('class="compare"') == 2
    assert len(re.findall(r'class="card strip">(.*?)</div>', page, re.DOTALL)[0].split("<figure>")) == 4
    assert page.count('class="chart"') == 4  # loss, learning rate, two trimaps


def test_names_are_escaped_and_nothing_is_loaded(workdir):
    page = build_report(workdir)
    assert HOSTILE not in page
    assert "&lt;script&gt;alert" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page
    for source in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert source.startswith("data:")


def test_workdir_without_results_has_a_page(workdir, tmp_path, capsys):
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    assert "No evaluation yet" in write_report(tmp_path).read_text()
    with pytest.raises(UserError, match="not a training workdir"):
        build_report(tmp_path / "none")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "val.json").write_text("{")
    assert "No evaluation yet" in build_report(tmp_path)
    assert re.search(r"warning: .*val\.json: is not JSON .*; the page omits it", capsys.readouterr().err)


def test_charts_place_points_and_break_at_gaps():
    svg = charts.line_chart({"a<b": [(0, 0.0), (1, 1.0), (2, float("nan")), (3, 2.0)]}, "step", "loss", marks=True)
    path = re.search(r'<path d="([^"]*)"', svg).group(1)
    assert re.sub(r"[\d. ]", "", path) == "MLM"
    points = [tuple(map(float, p)) for p in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    assert points[0] == (56.0, 220.0)
    assert points[-1] == (508.0, 12.0)
    assert "a&lt;b: 1, 1" in svg
    assert charts.line_chart({"none": []}, "", "") == ""


def test_thinning_keeps_the_mean():
    points = [(float(n), float(n % 7)) for n in range(1000)]
    thin = charts.thinned(points, 100)
    assert len(thin) == 100
    assert np.mean([y for _, y in thin]) == pytest.approx(np.mean([y for _, y in points]))


def test_in_a_browser(workdir):
    page = write_report(workdir)
    with headless_browser(1240, 1400) as driver:
        driver.get(page.as_uri())
        sizes = driver.execute_script("return Array.from(document.images).map(i => i.naturalWidth)")
        assert len(sizes) == 11
        assert min(sizes) > 0
        clip = "return getComputedStyle(document.querySelector('.compare .on')).clipPath"
        before = driver.execute_script(clip)
        driver.execute_script(
            "const i = document.querySelector('.compare input'); i.value = 10; i.dispatchEvent(new Event('input'))"
        )
        assert driver.execute_script(clip) != before
        assert "10%" in driver.execute_script(clip)
        assert driver.execute_script("return performance.getEntriesByType('resource').length") in (0, len(sizes))
        assert keep_screenshot(driver, "report.png").stat().st_size > 10_000
        assert complaints(driver) == []


def copied(workdir, folder):
    import shutil

    return shutil.copytree(workdir, folder / "w")


@pytest.mark.parametrize("kind", ["absolute", "above", "link"])
def test_pictures_from_elsewhere_are_not_embedded(workdir, tmp_path, capsys, kind):
    """A stranger's list names a file of the reader's own."""
    private = tmp_path / "private.png"
    files.write_png(private, photograph((60, 80), seed=7))
    stranger = copied(workdir, tmp_path)
    path = stranger / "eval" / "val_images.json"
    about = json.loads(path.read_text())
    name = {"absolute": str(private), "above": "../../private.png", "link": "link.png"}[kind]
    if kind == "link":
        (stranger / "eval" / name).symlink_to(private)
    about["pictures"][0]["photo"] = name
    path.write_text(json.dumps(about))
    page = build_report(stranger)
    assert page.count("data:image/jpeg;base64,") == 4  # the other photograph's
    assert f"names the picture {name!r}, which is not in it; it is left out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "eval/val.json", "eval/val_images.json", "config.json"])
@pytest.mark.parametrize("content", ["", "null", "{}", "[[]]", "[" * 100_000])
def test_a_damaged_file_is_left_out_and_said(workdir, tmp_path, capsys, name, content):
    stranger = copied(workdir, tmp_path)
    (stranger / name).write_text(content + "\n")
    assert "</html>" in build_report(stranger)
    nothing = (content, name) in (("{}", "eval/val_images.json"), ("{}", "config.json"))
    assert nothing or f"{name}: " in capsys.readouterr().err


def test_a_diverged_run_has_a_page(workdir, tmp_path):
    stranger = copied(workdir, tmp_path)
    losses = [1.0, 1e17, 1e17, 1e300, float("nan"), float("inf"), -1e308]
    rows = [{"step": n, "train/loss": v, "train/flat": 1e17, "train/none": 1e300} for n, v in enumerate(losses)]
    (stranger / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = build_report(stranger)
    assert page.count('class="chart"') == 4  # loss, the flat line, two trimaps
    assert "nan" not in page.split("<svg", 1)[1].split("</svg>")[0]


def test_the_page_never_replaces_a_file_of_the_run(workdir):
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"config\.json: writing it would overwrite the input"):
        write_report(workdir, workdir / "eval" / ".." / "config.json")
    assert (workdir / "config.json").read_bytes() == before
    with pytest.raises(UserError, match=r"best\.json: writing it would overwrite"):  # nor one that is not there yet
        write_report(workdir, workdir / "best.json")
