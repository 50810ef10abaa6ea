"""Labels of annotation tools become masks, areas over one another by each format's rule."""

import base64
import json

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.data import class_files, meaning
from deeplab_jax.data.annotations import conversion, label_studio
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import masks
from tests.data.miniatures import blocks, write_image
from tests.imaging.writers import pillow

H, W = 24, 32
LARGE = [[2, 2], [20, 2], [20, 20], [2, 20]]
SMALL = [[8, 8], [12, 8], [12, 12], [8, 12]]


def expected(large: int, small: int, small_on_top: bool = True) -> np.ndarray:
    label = np.zeros((H, W), np.uint8)
    label[2:20, 2:20] = large
    if small_on_top:
        label[8:12, 8:12] = small
    return label


def convert(source, tmp_path, **options):
    out = tmp_path / "out"
    result = conversion.convert(source, out, options.get("images"), options.get("classes"), options.get("examples", 0))
    made = {p.relative_to(out / "masks").as_posix(): masks.read_label(p) for p in (out / "masks").rglob("*.png")}
    return result, made


def flat(points):
    return [c for point in points for c in point]


def test_labelme(tmp_path):
    png = base64.b64encode(pillow(np.ones((4, 5), bool), "PNG")).decode()
    shapes = [
        {"label": "cat", "points": LARGE, "shape_type": "polygon"},
        {"label": "dog", "points": [[8, 8], [12, 12]], "shape_type": "rectangle"},
        {"label": "__ignore__", "points": [[24, 1], [28, 4]], "shape_type": "mask", "mask": png},
        {"label": "cat", "points": [[1, 1]], "shape_type": "point"},
        {"label": "", "points": LARGE, "shape_type": "polygon"},
    ]
    folder = tmp_path / "labels"
    folder.mkdir()
    content = {"shapes": shapes, "imagePath": "..\\photos\\a.jpg", "imageHeight": H, "imageWidth": W}
    (folder / "a.json").write_text(json.dumps(content))
    write_image(tmp_path / "photos" / "a.jpg")
    result, made = convert(folder, tmp_path, images=tmp_path / "photos", examples=3)
    wanted = expected(1, 2)
    wanted[1:5, 24:29] = 255
    np.testing.assert_array_equal(made["a.png"], wanted)
    assert result.kind == "labelme" and (result.left_out, result.without_class) == (1, 1)
    assert tuple(result.names) == ("background", "cat", "dog")
    assert (tmp_path / "out" / "classes.txt").read_text().splitlines()[1] == "cat 128 0 0"
    with Image.open(result.sheet) as sheet:
        assert sheet.width > W
    (folder / "b.json").write_text(json.dumps(content | {"shapes": [{"label": "cat", "points": [["x", 1]] * 3}]}))
    with pytest.raises(UserError, match=r"b.json: shape 1 cannot be read .*; correct it in labelme"):
        convert(folder, tmp_path)


def coco_file(tmp_path, annotations):
    content = {
        "images": [{"id": 7, "file_name": "day/a.jpg", "height": H, "width": W}],
        "categories": [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 7, "id": n, **a} for n, a in enumerate(annotations)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    return tmp_path / "coco.json"


def test_coco_small_over_large_and_crowds_void(tmp_path):
    crowd = np.zeros((H, W), bool)
    crowd[:, 30:] = True
    flips = np.flatnonzero(np.diff(np.concatenate([[False], crowd.T.ravel()])))
    counts = np.diff([0, *flips.tolist(), H * W]).tolist()
    annotations = [
        {"category_id": 3, "segmentation": [flat(SMALL)]},
        {"category_id": 1, "segmentation": [flat(LARGE)]},
        {"category_id": 1, "iscrowd": 1, "segmentation": {"size": [H, W], "counts": counts}},
        {"category_id": 1, "bbox": [0, 0, 3, 3]},
    ]
    result, made = convert(coco_file(tmp_path, annotations), tmp_path)
    wanted = expected(1, 2)
    wanted[:, 30:] = 255
    np.testing.assert_array_equal(made["day/a.png"], wanted)
    assert result.left_out == 1
    with pytest.raises(UserError, match="image 7: has an annotation that cannot be read"):
        convert(coco_file(tmp_path, [{"category_id": 1, "segmentation": {"size": [3, 3], "counts": [9]}}]), tmp_path)


def test_each_coco_file_is_read_by_its_own_ids(tmp_path):
    for name, ring, categories in (("a", LARGE, {1: "cat", 2: "dog"}), ("b", SMALL, {1: "dog", 2: "bird"})):
        content = {
            "images": [{"id": 1, "file_name": f"{name}.jpg", "height": H, "width": W}],
            "categories": [{"id": i, "name": c} for i, c in categories.items()],
            "annotations": [{"image_id": 1, "category_id": 1, "segmentation": [flat(ring)]}],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    result, made = convert(tmp_path, tmp_path)
    assert tuple(result.names) == ("background", "cat", "dog", "bird") and result.count == 2
    np.testing.assert_array_equal(made["a.png"], expected(1, 0, small_on_top=False))
    np.testing.assert_array_equal(made["b.png"], 2 * expected(0, 1))


def test_cvat(tmp_path):
    points = lambda ring: ";".join(f"{x},{y}" for x, y in ring)  # noqa: E731
    (tmp_path / "annotations.xml").write_text(f"""<?xml version="1.0"?><annotations><version>1.1</version>
      <meta><task><labels><label><name>dog</name><color>#00ff00</color></label>
      <label><name>cat</name><color>#ff0000</color></label></labels></task></meta>
      <image id="0" name="a.jpg" width="{W}" height="{H}">
        <polygon label="dog" z_order="1" points="{points(SMALL)}"/>
        <polygon label="cat" z_order="0" points="{points(LARGE)}"/>
        <mask label="dog" z_order="0" rle="1,2,1" left="24" top="3" width="2" height="2"/>
        <box label="cat" z_order="0" xtl="28" ytl="20" xbr="31" ybr="22"/>
        <points label="cat" points="1,1"/>
      </image></annotations>""")
    result, made = convert(tmp_path, tmp_path)
    wanted = expected(2, 1)
    wanted[3, 25] = wanted[4, 24] = 1
    wanted[20:22, 28:31] = 2
    np.testing.assert_array_equal(made["a.png"], wanted)
    assert result.left_out == 1
    assert (tmp_path / "out/classes.txt").read_text() == "background 0 0 0\ndog 0 255 0\ncat 255 0 0\n"
    (tmp_path / "annotations.xml").write_text("<annotations><image")
    with pytest.raises(UserError, match=r"annotations.xml: is not valid XML"):
        convert(tmp_path, tmp_path)


def packed_brush(pixels: np.ndarray) -> list[int]:
    """RGBA of a brush as Label Studio packs it: one run of single bytes, or of equal ones, a row."""
    values = np.repeat(pixels.astype(np.uint8)[..., None] * 255, 4, -1).ravel()
    bits = f"{values.size:032b}{7:05b}" + "".join(f"{n - 1:04b}" for n in (4, 8, 12, 16))
    at = 0
    while at < values.size:
        length = 1
        while at + length < values.size and values[at + length] == values[at] and length < 4000:
            length += 1
        if length > 3:
            bits += f"1{2:02b}{length - 1:012b}{values[at]:08b}"
        else:
            length = min(5, values.size - at)
            bits += f"0{0:02b}{length - 1:04b}" + "".join(f"{v:08b}" for v in values[at : at + length])
        at += length
    bits += "0" * (-len(bits) % 8)
    return [int(bits[n : n + 8], 2) for n in range(0, len(bits), 8)]


def test_label_studio(tmp_path):
    pixels = np.random.default_rng(0).random((H, W)) < 0.3
    np.testing.assert_array_equal(label_studio.brush(packed_brush(pixels), (H, W)), pixels)
    stroke = np.zeros((H, W), bool)
    stroke[22:, :5] = True
    percent = [[x * 100 / W, y * 100 / H] for x, y in LARGE]
    shapes = [
        {"polygonlabels": ["cat"], "points": percent},
        {"rectanglelabels": ["dog"], "x": 800 / W, "y": 800 / H, "width": 400 / W, "height": 400 / H, "rotation": 0},
        {"brushlabels": ["dog"], "format": "rle", "rle": packed_brush(stroke)},
    ]
    results = [{"original_width": W, "original_height": H, "value": v} for v in shapes]
    tasks = [
        {"id": 1, "data": {"image": "/data/upload/1/a%20b.jpg?x=1"}, "annotations": [{"result": results}]},
        {"id": 2, "data": {"image": "/data/c.jpg"}, "annotations": [{"was_cancelled": True, "result": results}]},
    ]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    _, made = convert(tmp_path / "export.json", tmp_path)
    wanted = expected(1, 2)
    wanted[stroke] = 2
    assert list(made) == ["a b.png"]
    np.testing.assert_array_equal(made["a b.png"], wanted)


@pytest.mark.parametrize(
    ("beside", "name"), [(None, "a.png"), ("a.jpg", "a.png"), ("9f3c2b1a-a.jpg", "9f3c2b1a-a.png")]
)
def test_uploads_to_label_studio_have_their_own_names(tmp_path, beside, name):
    results = [{"original_width": W, "original_height": H, "value": {"polygonlabels": ["cat"], "points": LARGE}}]
    task = {"data": {"image": "/data/upload/1/9f3c2b1a-a.jpg"}, "annotations": [{"result": results}]}
    (tmp_path / "export.json").write_text(json.dumps([task]))
    if beside is not None:
        (tmp_path / "images").mkdir()
        Image.new("RGB", (W, H)).save(tmp_path / "images" / beside)
    assert list(convert(tmp_path / "export.json", tmp_path)[1]) == [name]


def studio_file(tmp_path, results):
    results = [{"original_width": W, "original_height": H} | r for r in results]
    (tmp_path / "export.json").write_text(json.dumps([{"data": {"image": "a.jpg"}, "annotations": [
        {"result": results}]}]))  # fmt: skip
    return tmp_path / "export.json"


def test_label_studio_of_separate_controls(tmp_path):
    """`<Polygon>` and `<Labels>`: the area and its class are two results of one id, in either order."""
    stroke = np.zeros((H, W), bool)
    stroke[22:, :5] = True
    large = {"points": [[x * 100 / W, y * 100 / H] for x, y in LARGE], "closed": True}
    box = {"x": 800 / W, "y": 800 / H, "width": 400 / W, "height": 400 / H, "rotation": 0}
    disc = {"x": 2600 / W, "y": 400 / H, "radiusX": 300 / W, "radiusY": 300 / H, "rotation": 0}
    shapes = [
        ("polygon", large, "cat"),
        ("rectangle", box, "dog"),
        ("ellipse", disc, "egg"),
        ("brush", {"format": "rle", "rle": packed_brush(stroke)}, "dog"),
    ]
    results = []
    for n, (kind, value, label) in enumerate(shapes):
        pair = [{"type": kind, "value": value}, {"type": "labels", "value": value | {"labels": [label]}}]
        results += [{"id": f"r{n}"} | r for r in (pair if n % 2 else pair[::-1])]
    results.append({"id": "r0", "type": "choices", "value": large | {"choices": ["blurred"]}})
    result, made = convert(studio_file(tmp_path, results), tmp_path)
    assert tuple(result.names) == ("background", "cat", "dog", "egg")
    wanted = expected(1, 2)
    wanted[1:7, 23:29] = 3 * np.array([[abs(x) + abs(y) < 4.5 for x in np.arange(-2.5, 3)] for y in np.arange(-2.5, 3)])
    wanted[stroke] = 2
    np.testing.assert_array_equal(made["a.png"], wanted)
    assert (result.left_out, result.without_class) == (0, 0) and "note" not in result.words()


def test_label_studio_areas_without_a_class_are_left_out_with_a_note(tmp_path):
    percent = [[x * 100 / W, y * 100 / H] for x, y in LARGE]
    small = [[x * 100 / W, y * 100 / H] for x, y in SMALL]
    results = [
        {"id": "1", "type": "polygonlabels", "value": {"points": percent, "polygonlabels": []}},
        {"id": "2", "type": "polygon", "value": {"points": percent}},
        {"id": "3", "type": "polygonlabels", "value": {"points": small, "polygonlabels": ["dog"]}},
        {"id": "4", "type": "keypointlabels", "value": {"x": 1, "y": 1, "width": 1, "keypointlabels": ["dog"]}},
    ]
    result, made = convert(studio_file(tmp_path, results), tmp_path)
    np.testing.assert_array_equal(made["a.png"], expected(0, 1))
    assert "note: 1 annotation has no area (points, lines, boxes) and is left out" in result.words()
    assert "note: 2 annotations have no class and are left out" in result.words()


def test_colored_masks(tmp_path):
    colors = np.array([[0, 0, 0], [250, 50, 83], [92, 0, 10]], np.uint8)
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:250,50,83::\n"
                                           "dog:92,0,10::\n")  # fmt: skip
    (tmp_path / "SegmentationClass").mkdir()
    Image.fromarray(colors[blocks(0, 2, 1)]).save(tmp_path / "SegmentationClass" / "a.png")
    (tmp_path / "SegmentationClass" / "b.png").write_bytes(b"damaged")
    result, made = convert(tmp_path, tmp_path)
    np.testing.assert_array_equal(made["a.png"], blocks(0, 2, 1))
    assert result.failed == 1 and result.count == 1


def colored(folder, names, size=(6, 8)):
    """A list of labels, photographs and masks in colors under these names."""
    rng = np.random.default_rng(0)
    label = np.arange(size[0] * size[1]).reshape(size) % 2
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jpg"):
            Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / name)
        else:
            Image.fromarray((label[..., None] * [128, 0, 0]).astype(np.uint8)).save(folder / name)
    (folder / "labelmap.txt").write_text("background:0,0,0::\nroad:128,0,0::\n")
    return label


@pytest.mark.parametrize(
    ("names", "written"),
    [
        (("images/a.jpg", "masks/a.png", "images/b.jpg", "masks/b.png"), ["a.png", "b.png"]),
        (("a.jpg", "a_mask.png", "b.jpg", "b_mask.png"), ["a_mask.png", "b_mask.png"]),
        (("a.jpg", "a.png"), ["a.png"]),
        (("train/a.png", "val/a.png"), ["train/a.png", "val/a.png"]),
        (("a.png", "b.png"), ["a.png", "b.png"]),
    ],
)
def test_photographs_beside_colored_masks_are_no_masks(tmp_path, names, written):
    label = colored(tmp_path / "in", names)
    result, made = convert(tmp_path / "in", tmp_path)
    assert sorted(made) == written and tuple(result.names) == ("background", "road")
    for name in written:
        np.testing.assert_array_equal(made[name], label)


def test_folders_that_cannot_be_told_apart_are_refused(tmp_path):
    colored(tmp_path / "in", ("img/a.jpg", "masks_human/a.png", "masks_machine/a.png"))  # as Supervisely writes them
    with pytest.raises(UserError, match="in: holds photographs beside the masks; name the folder of the masks"):
        convert(tmp_path / "in", tmp_path)
    colored(tmp_path / "two", ("a.png", "a.bmp"))
    with pytest.raises(UserError, match=r"a\.bmp and a\.png: would become one mask"):
        convert(tmp_path / "two", tmp_path)


def test_masks_of_an_earlier_conversion_do_not_get_other_classes(tmp_path):
    source = tmp_path / "in"
    source.mkdir()

    def labelled(**labels):
        for name in ("a", "b", "c"):
            (source / f"{name}.json").unlink(missing_ok=True)
        for name, label in labels.items():
            shapes = [{"label": label, "points": LARGE}]
            content = {"shapes": shapes, "imagePath": f"{name}.jpg", "imageHeight": H, "imageWidth": W}
            (source / f"{name}.json").write_text(json.dumps(content))

    labelled(a="car", b="tree")
    convert(source, tmp_path)
    labelled(a="car", c="tree")  # the same classes: what is left has the same ids
    assert sorted(convert(source, tmp_path)[1]) == ["a.png", "b.png", "c.png"]
    labelled(a="bike", c="car")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"holds 1 masks of an earlier conversion with other classes, such as b\.png"):
        convert(source, tmp_path)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_one_mask_for_each_class(tmp_path):
    for name, ids in (("cat", (0, 255, 255)), ("dog", (0, 0, 255))):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.fromarray(blocks(*ids)).save(tmp_path / "in" / name / "a.png")
    _, made = convert(tmp_path / "in", tmp_path)
    np.testing.assert_array_equal(made["a.png"], blocks(0, 1, 2))


@pytest.mark.parametrize("classes", [None, "labelmap.txt"])
def test_a_rerun_does_not_read_what_it_wrote_inside_the_source(tmp_path, classes):
    source = tmp_path / "source"
    for name in ("cat", "dog") if classes is None else ("SegmentationClass", "JPEGImages"):
        (source / name).mkdir(parents=True)
    if classes is None:
        for name, mask in (("cat", [[1, 1, 0]]), ("dog", [[0, 0, 1]])):
            Image.fromarray(np.array(mask, np.uint8)).save(source / name / "a.png")
    else:
        source = tmp_path / "colored"
        source.mkdir()
        (source / "labelmap.txt").write_text("background:0,0,0::\ncat:128,0,0::\n")
        Image.fromarray(np.array([[[0, 0, 0], [128, 0, 0]]], np.uint8)).save(source / "a.png")
    for examples in (2, 0):  # the first run writes a sheet of overlays, too
        result = conversion.convert(source, source / "out", None, None, examples)
        assert result.count == 1 and "out" not in result.names
        assert [p.name for p in (source / "out" / "masks").rglob("*.png")] == ["a.png"]


def test_a_folder_of_the_background_is_no_class_of_its_own(tmp_path):
    for name, mask in (("background", [[0, 0, 1]]), ("cat", [[1, 0, 0]])):
        (tmp_path / "apart" / name).mkdir(parents=True)
        Image.fromarray(np.array(mask, np.uint8)).save(tmp_path / "apart" / name / "a.png")
    result, made = convert(tmp_path / "apart", tmp_path)
    assert tuple(result.names) == ("background", "cat")
    np.testing.assert_array_equal(made["a.png"], [[1, 0, 0]])


def test_void_that_is_written_stays_void_when_it_is_read(tmp_path):
    """The palette shows 255 black, like the background."""
    shapes = [{"label": "car", "points": LARGE}, {"label": "__ignore__", "points": SMALL}]
    content = {"shapes": shapes, "imagePath": "a.jpg", "imageHeight": H, "imageWidth": W}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text(json.dumps(content))
    _, made = convert(tmp_path / "in", tmp_path)
    assert np.unique(made["a.png"]).tolist() == [0, 1, 255]
    colors = class_files.read_classes(tmp_path / "out" / "classes.txt")[1]
    path = tmp_path / "out" / "masks" / "a.png"
    np.testing.assert_array_equal(masks.read_label(path, colors=colors), made["a.png"])
    facts = meaning.facts_of(path.read_bytes(), "a.png", colors)
    how, _ = meaning.decide([facts], 2, colors)
    np.testing.assert_array_equal(masks.read_label(path, meaning=how), made["a.png"])


def test_classes_without_a_background_are_noted(tmp_path):
    for name, mask in (("car", [[1, 0, 0]]), ("road", [[0, 0, 1]])):
        (tmp_path / "apart" / name).mkdir(parents=True)
        Image.fromarray(np.array(mask, np.uint8)).save(tmp_path / "apart" / name / "a.png")
    (tmp_path / "classes.txt").write_text("road\ncar\n")
    result, made = convert(tmp_path / "apart", tmp_path, classes=tmp_path / "classes.txt")
    np.testing.assert_array_equal(made["a.png"], [[1, 0, 0]])
    assert result.notes[0].startswith("pixels without an annotation are 'road', the first class of ")
    (tmp_path / "classes.txt").write_text("nothing\nroad\ncar\n")
    assert convert(tmp_path / "apart", tmp_path, classes=tmp_path / "classes.txt")[0].notes == []


def test_a_given_classes_file_is_not_replaced(tmp_path):
    shape = {"label": "cat", "points": [[2, 2], [9, 2], [9, 9]], "shape_type": "polygon"}
    content = {"shapes": [shape], "imagePath": "a.jpg", "imageHeight": 12, "imageWidth": 20}
    (tmp_path / "a.json").write_text(json.dumps(content))
    classes = tmp_path / "out" / "classes.txt"
    classes.parent.mkdir()
    classes.write_text("ground\ncat\ndog\n")
    with pytest.raises(UserError, match=r"classes\.txt: writing it would overwrite the input"):
        conversion.convert(tmp_path, tmp_path / "out", None, classes, 0)
    assert classes.read_text() == "ground\ncat\ndog\n"
    for label in ("cat", "cat", "dog"):  # results of an earlier run may be replaced, also by other classes
        (tmp_path / "a.json").write_text(json.dumps(content | {"shapes": [shape | {"label": label}]}))
        conversion.convert(tmp_path, tmp_path / "new", None, None, 0)
    assert class_files.read_classes(tmp_path / "new" / "classes.txt")[0] == ("background", "dog")


@pytest.mark.parametrize("name", ("cat # the black one", "cat\ndog", "cat\n", "#"))
def test_a_class_that_no_classes_file_can_name_leaves_none_behind(tmp_path, name):
    (tmp_path / "labels").mkdir()
    shapes = [{"label": label, "points": LARGE, "shape_type": "polygon"} for label in ("dog", name)]
    content = {"shapes": shapes, "imagePath": "a.jpg", "imageHeight": H, "imageWidth": W}
    (tmp_path / "labels" / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="cannot be written to a classes file") as told:
        convert(tmp_path / "labels", tmp_path)
    assert str(told.value).startswith(f"{tmp_path / 'labels'}: ")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
