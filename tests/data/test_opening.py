"""Which files of a folder are labels, what the masks are called, and what is left out with a note."""

import json

import numpy as np
import pytest

from deeplab_jax.data.annotations import opening
from deeplab_jax.data.annotations.drawing import polygon
from deeplab_jax.errors import UserError
from tests.data.test_convert_labels import LARGE, H, W, coco_file, flat

TRIANGLE = [[0, 0], [4, 0], [4, 4]]
SHAPE = {"label": "cat", "points": TRIANGLE, "shape_type": "polygon"}


def labelme(path, photograph, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"imageHeight": 8, "imageWidth": 9, "imagePath": photograph, "shapes": [SHAPE | fields]}
    path.write_text(json.dumps(content))


def stems(source):
    return sorted(stem for stem, _ in opening.open_labels(source).masks)


def test_labelme_photographs_in_subfolders_keep_them(tmp_path):
    for day in ("monday", "tuesday"):
        labelme(tmp_path / "all" / day / "a.json", "a.jpg")
        labelme(tmp_path / "apart" / "labels" / day / "a.json", f"..\\..\\photos\\{day}\\a.jpg")
        labelme(tmp_path / "moved" / day / "a.json", f"C:\\Users\\me\\{day}\\a.jpg")
    labelme(tmp_path / "apart" / "labels" / "b.json", "../photos/b.jpg")
    assert stems(tmp_path / "all") == stems(tmp_path / "moved") == ["monday/a", "tuesday/a"]
    assert stems(tmp_path / "apart") == ["b", "monday/a", "tuesday/a"]
    assert stems(tmp_path / "all" / "monday") == ["a"]


def test_a_labelme_shape_without_a_label_has_no_class(tmp_path):
    labelme(tmp_path / "a.json", "a.jpg", label=None)
    labelme(tmp_path / "b.json", "b.jpg")
    found = opening.open_labels(tmp_path)
    assert (list(found.names), found.without_class) == (["background", "cat"], 1)


def cvat(inside):
    return f'<annotations><image id="0" name="a.jpg" width="9" height="8">{inside}</image></annotations>'


def test_a_cvat_shape_without_a_label_has_no_class(tmp_path):
    points = 'points="0,0;4,0;4,4"'
    (tmp_path / "a.xml").write_text(cvat(f'<polygon {points}/><polygon label="cat" {points}/>'))
    found = opening.open_labels(tmp_path / "a.xml")
    assert (list(found.names), found.without_class) == (["background", "cat"], 1)
    np.testing.assert_array_equal(found.masks[0][1](), polygon([TRIANGLE], (8, 9)))


def test_xml_of_other_programs_is_passed_over(tmp_path):
    (tmp_path / "a.xml").write_text(cvat('<polygon label="cat" points="0,0;4,0;4,4"/>'))
    (tmp_path / "boxes.xml").write_text("<annotation><filename>a.jpg</filename></annotation>")
    assert stems(tmp_path) == ["a"]
    for source in (tmp_path / "boxes.xml", tmp_path):
        (tmp_path / "a.xml").unlink(missing_ok=True)
        with pytest.raises(UserError, match=r"holds no labels in a known format: .*'CVAT for images 1.1'"):
            opening.open_labels(source)


def test_files_of_a_second_tool_are_noted(tmp_path):
    labelme(tmp_path / "1.json", "1.jpg")
    image = {"id": 1, "file_name": "2.jpg", "height": 8, "width": 9}
    whole = {"images": [image], "categories": [{"id": 1, "name": "dog"}], "annotations": []}
    (tmp_path / "coco.json").write_text(json.dumps(whole))
    (tmp_path / "3.xml").write_text(cvat(""))
    (tmp_path / "boxes.xml").write_text("<annotation/>")
    found = opening.open_labels(tmp_path)
    assert [stem for stem, _ in found.masks] == ["2"]
    assert found.notes == [
        f"1 labelme file, such as {tmp_path / '1.json'}, is left out: only COCO is read",
        f"1 CVAT file, such as {tmp_path / '3.xml'}, is left out: only COCO is read",
    ]


def test_label_studio_tasks_without_areas_are_noted(tmp_path):
    value = {"polygonlabels": ["cat"], "points": TRIANGLE}
    results = ([{"original_width": 9, "original_height": 8, "value": value}], [], [])
    tasks = [{"data": {"image": f"{n}.jpg"}, "annotations": [{"result": r}]} for n, r in enumerate(results)]
    (tmp_path / "tasks.json").write_text(json.dumps([*tasks, {"data": {"image": "3.jpg"}, "annotations": []}]))
    found = opening.open_labels(tmp_path)
    assert [stem for stem, _ in found.masks] == ["0"]
    assert found.notes == ["3 images without annotations get no mask"]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"shapes": []}', b"\xff\xfe", b'{"images": [], "annotations": []}'])
def test_what_holds_no_labels_is_told(tmp_path, content):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="in"):
        opening.open_labels(tmp_path / "in")


def test_damaged_annotations_give_a_sentence(tmp_path):
    rng = np.random.default_rng(0)
    shape = {"label": "cat", "points": LARGE, "shape_type": "polygon"}
    whole = [
        json.dumps({"shapes": [shape], "imagePath": "a.jpg", "imageHeight": H, "imageWidth": W}),
        coco_file(tmp_path, [{"category_id": 1, "segmentation": [flat(LARGE)]}]).read_text(),
        json.dumps([{"data": {"image": "a.jpg"}, "annotations": [{"result": [
            {"original_width": W, "original_height": H, "value": {"polygonlabels": ["cat"], "points": LARGE}}]}]}]),
    ]  # fmt: skip
    refused = 0
    for n in range(200):
        text = whole[n % 3]
        at = int(rng.integers(len(text)))
        piece = ("", "null", "[]", '"x"', "-1", "1e999")[int(rng.integers(6))]
        (tmp_path / "d.json").write_text(text[:at] + piece + text[at + int(rng.integers(1, 9)) :])
        try:
            for _, make in opening.open_labels(tmp_path / "d.json").masks:
                make()
        except UserError as e:
            refused += 1
            assert "d.json" in str(e) and "\n" not in str(e)
    assert refused > 100
