"""Every defect of a data set is found: training stops at the first error, `rev-det data check` names all."""

import os
import re
import sys

import pytest

from rev_det import files
from rev_det.data.annotations import check_coco_json
from rev_det.data.check import check_data
from rev_det.data.findings import ERROR, NOTE, WARNING

RLE = {"size": [40, 60], "counts": [100, 200, 2100]}
SECTIONS = pytest.mark.parametrize("section", ["images", "annotations", "categories"])


@pytest.fixture
def summarise(write, images):
    """What training does before it starts."""
    return lambda content: check_coco_json("pets", write(content), images)


@pytest.fixture
def is_refused(check, write, images):
    """Require an error of training that `data check` finds as well, in the same words."""

    def require(content, message, error=ValueError):
        assert any(re.search(message, text) for text in texts(check(content), ERROR)), check(content).findings
        with pytest.raises(error, match=f"dataset 'pets': .*annotations.json: .*{message}"):
            check_coco_json("pets", write(content), images)

    return require


def texts(report, severity):
    return [finding.text for finding in report.findings if finding.severity == severity]


def test_valid_file_is_summarised(content, summarise):
    assert summarise(content).num_crowds == 0
    content["annotations"][0]["segmentation"] = RLE
    content["annotations"][1].update(iscrowd=1, segmentation=RLE)
    summary = summarise(content)
    assert summary.category_ids == (3, 7) and summary.classes == ("cat", "dog")
    assert (summary.num_images, summary.num_instances, summary.num_masks) == (2, 4, 4)
    assert summary.num_rle == 1  # the crowd is not counted
    assert summary.num_crowds == 1 and summary.dropped == frozenset()


# ---- what is no annotation file at all, or has no images ----


def make_fifo(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, r"set\.json does not exist"),
        (os.mkdir, r"set\.json is a folder, not a file"),
        pytest.param(
            make_fifo,
            r"set\.json is a pipe or a device, not a file",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes"),
        ),
        (b'{"images": [\n{"id": 1', r"set\.json is not valid JSON: .* in line 2, column"),
        (b"\xef\xbb\xbf{}", r"set\.json is not valid JSON: it begins with a byte order mark"),
        (b'{"a": "\xe9"}', r"set\.json is not a text file in UTF-8: .* byte 0xe9 in position 7"),
        (b"[]", "set.json holds a list.*results file"),
        (b"[" * 100_000, r"set\.json is not JSON that can be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"set\.json is not JSON that can be read"),
    ],
)
@pytest.mark.parametrize("reader", [check_coco_json, check_data])
def test_what_is_no_annotation_file_is_named(images, tmp_path, reader, make, message):
    path = tmp_path / "set.json"
    path.write_bytes(make) if isinstance(make, bytes) else make(path)
    with pytest.raises((ValueError, FileNotFoundError), match=f"dataset 'pets': .*{message}"):
        reader("pets", str(path), images)


def test_missing_image_folder(content, write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere does not exist"):
        check_coco_json("pets", write(content), str(tmp_path / "nowhere"))


def test_unreadable_file_is_named(content, summarise, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", path)

    # Not by file permissions: root may read everything.
    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(ValueError, match=r"Permission denied: .*annotations\.json"):
        summarise(content)


# ---- structure and values ----


@SECTIONS
@pytest.mark.parametrize(
    "value, found", [([], "empty"), ({"a": 1}, "a dict"), (None, "missing, there are info")]
)
def test_section_must_be_a_filled_list(content, is_refused, section, value, found):
    content[section] = value
    if value is None:
        del content[section]
    is_refused(content, f"'{section}' is {found}")


VALUES = [
    *(("images", key, None, "missing") for key in ("id", "file_name", "height", "width")),
    *(("categories", key, None, "missing") for key in ("id", "name")),
    *(("annotations", key, None, "missing") for key in ("id", "image_id", "category_id", "bbox")),
    ("images", "id", True, "True"),
    ("images", "height", "40", "'40'"),
    ("images", "width", 0, "0"),
    ("images", "width", 10**30, "10+"),
    ("images", "file_name", "", "''"),
    ("categories", "name", 5, "5"),
    ("categories", "name", "a\ud800", r"'a\\ud800'"),
    *(
        ("annotations", "bbox", [1, 2, value, 4], "")
        for value in ("3", True, None, float("nan"), float("inf"), 10**30, 10**400, -(10**12))
    ),
    ("annotations", "bbox", [float("nan"), 10**400, 1, 2], ""),
    ("annotations", "bbox", [1, 2, 3], r"\[1, 2, 3\]"),
    ("annotations", "bbox", "1234", "'1234'"),
    *(
        ("annotations", "area", value, "")
        for value in (-5, float("nan"), float("inf"), 10**400, "100", None, True)
    ),
    ("annotations", "iscrowd", 2, "2"),
    ("annotations", "iscrowd", [], r"\[\]"),
    ("annotations", "ignore", 1, "1"),
    ("annotations", "ignore", None, "None"),
    *(
        ("annotations", "keypoints", value, "")
        for value in (7, "abc", {"a": 1}, None, [1, 2], [1, 2, "2"], [1, True, 2], [1, 2, 1e12])
    ),
]


@pytest.mark.parametrize("section, key, value, found", VALUES)
def test_wrong_values_are_named_with_their_record(content, is_refused, section, key, value, found):
    content[section][1][key] = value
    if found == "missing":
        del content[section][1][key]
    total = len(content[section])
    is_refused(
        content, rf"1 of {total} \(.* %\) {section} have no '{key}' that is .*: {section}\[1\] \({found}"
    )


def test_what_may_be_left_out_may_also_be_given(content, summarise):
    content["annotations"][0].update(keypoints=[1, 2.5, 2, 0, 0, 0], ignore=0, iscrowd=0, area=7.5)
    content["annotations"][1].update(keypoints=[])
    assert summarise(content).num_instances == 4


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([1, 1, 5, 5, 1, 5], "neither a list of polygons"),
        ("abc", "neither a list of polygons"),
        ([[1, 1, 5, "5", 1, 5]], "a coordinate that is not a number of pixels.*'5'"),
        ([[0, 0, True, 0, 5, 5]], "a coordinate that is not a number.*True"),
        ([[1, float("nan"), 5, 5, 1, 5]], "a coordinate that is not a number.*nan"),
        ([[1, 1, 5, float("inf"), 1, 5]], "a coordinate that is not a number.*inf"),
        ([[0, 0, 10**400, 0, 5, 5]], "a coordinate that is not a number.*1000"),
        ([[0, 0, 9, 0, 9, 9], [0, -601, 9, 0, 5, 5]], r"far outside of its image: id 1 \(-601 for 60x40"),
        ({"size": [60, 40], "counts": [2400]}, r"'size' is not .*\[60, 40\], image 0\.png"),
        ({"size": [40.0, 60.0], "counts": [2400]}, r"'size' is not .*\[40.0, 60.0\]"),
        ({"size": [40, 60], "counts": [100, 200]}, "damaged"),
        ({"size": [40, 60], "counts": [-1, 2401]}, "damaged"),
        ({"size": [40, 60], "counts": "P["}, "damaged"),
        ({"size": [40, 60], "counts": "P1"}, "damaged"),  # 32 pixels; evaluation would never end
        ({"size": [40, 60], "counts": "OOO"}, "damaged"),  # negative lengths
        ({"size": [40, 60], "counts": "\u00e9"}, "damaged"),
        ({"size": [40, 60]}, "damaged"),
    ],
)
def test_malformed_segmentation_is_named(content, is_refused, segmentation, message):
    content["annotations"][0]["segmentation"] = segmentation
    is_refused(content, rf"1 of 4 \(25 %\) annotations have a 'segmentation' .*{message}")


def test_all_that_have_a_fault_are_counted_and_the_first_five_named(enlarge, content, is_refused):
    content = enlarge(content, 20)
    for annotation in content["annotations"][:7]:
        annotation["bbox"] = [1, 2, 3]
    is_refused(content, r"7 of 20 \(35 %\) annotations .*annotations\[4\] \(\[1, 2, 3\]\) and 2 more")


@SECTIONS
def test_record_that_is_no_object(content, is_refused, section):
    content[section][1] = [7]
    is_refused(content, rf"{section} are not objects: {section}\[1\] \(\[7\]\)")


@SECTIONS
def test_duplicate_ids(content, is_refused, section):
    content[section][1]["id"] = content[section][0]["id"]
    is_refused(content, f"ids of '{section}' are given more than once: ")


def test_class_names_that_results_could_not_tell_apart_are_named(content, is_refused):
    content["categories"].append({"id": 9, "name": "dog"})
    is_refused(content, r"1 of 3 .* class names are given more than once: dog.*rename them")


@pytest.mark.parametrize("key, section", [("category_id", "categories"), ("image_id", "images")])
def test_references_must_exist(content, is_refused, key, section):
    content["annotations"][3][key] = 99
    is_refused(content, rf"1 of 4 \(25 %\) annotations have a '{key}' that '{section}' lacks: id 4 \(99\)")


def test_keys_that_json_has_twice_are_a_warning(good, write, images, caplog):
    path = write(good)
    text = open(path).read().replace('"iscrowd": 0', '"iscrowd": 1, "iscrowd": 0', 1)
    open(path, "w").write(text)
    (warning,) = texts(check_data("pets", path, images), WARNING)
    assert warning == "1 keys are given more than once, the last counts: 'iscrowd' of id 1"
    assert check_coco_json("pets", path, images).num_crowds == 0 and warning in caplog.text


# ---- images ----


def test_missing_images_are_counted_and_the_first_five_named(content, is_refused):
    for key in range(20, 27):
        content["images"].append({"id": key, "file_name": f"sub/{key}.png", "height": 4, "width": 4})
    words = r"7 of 9 \(78 %\) images are not files in .*: sub/20\.png, .*sub/24\.png and 2 more"
    is_refused(content, words, FileNotFoundError)


def test_images_in_subfolders_are_found(content, images, summarise):
    os.mkdir(os.path.join(images, "sub"))
    os.rename(os.path.join(images, "1.png"), os.path.join(images, "sub", "1.png"))
    content["images"][1]["file_name"] = "sub/1.png"
    assert summarise(content).num_images == 2


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes")
@pytest.mark.parametrize("make", [os.mkdir, make_fifo, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_no_image(content, images, is_refused, make):
    path = os.path.join(images, "1.png")
    os.unlink(path)
    make(path)
    is_refused(content, r"1 of 2 \(50 %\) images are not files in .*: 1\.png", FileNotFoundError)


@pytest.mark.parametrize(
    "count, expected", [(1, [0]), (2, [0, 1]), (8, range(8)), (20, [0, 2, 5, 8, 10, 13, 16, 19])]
)
def test_a_few_images_from_the_whole_file_are_there_to_be_tried(content, images, summarise, count, expected):
    content["images"] = [{**content["images"][0], "id": key} for key in range(count)]
    for annotation in content["annotations"]:
        annotation["image_id"] = 0
    sample = summarise(content).sample
    assert [entry["image_id"] for entry in sample] == list(expected)
    path = os.path.join(images, "0.png")
    assert sample[0] == {"file_name": path, "image_id": 0, "height": 40, "width": 60}


def test_only_images_that_may_be_extreme_are_remembered(content, summarise):
    assert summarise(content).extreme == ()
    content["images"][1] |= {"width": 60, "height": 3001}
    (entry,) = summarise(content).extreme
    assert (entry["height"], entry["width"]) == (3001, 60) and entry["file_name"].endswith("1.png")


# ---- degenerate instances ----

DEGENERATE = {
    "two points": {"segmentation": [[1, 1, 5, 5]]},
    "no point": {"segmentation": [[]]},
    "odd count": {"segmentation": [[1, 1, 5, 5, 1, 5, 3]]},
    "no width": {"bbox": [5, 5, 0, 10]},
    "negative height": {"bbox": [5, 5, 10, -3]},
    "outside": {"bbox": [70, 5, 10, 10]},
    "empty mask": {"segmentation": {"size": [40, 60], "counts": [2400]}},
    "empty compressed mask": {"segmentation": {"size": [40, 60], "counts": "P[2"}},
    "no segmentation": {"segmentation": []},
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_one_degenerate_instance_of_a_hundred_is_dropped_two_are_refused(
    content, enlarge, summarise, is_refused, caplog, kind
):
    content = enlarge(content, 100)
    content["annotations"][1].update(DEGENERATE[kind])
    summary = summarise(content)
    assert summary.dropped == {2} and summary.num_instances == summary.num_masks == 99
    assert "1 of 100 (1 %) instances are degenerate: id 2 (" in caplog.text
    assert "1 are left out of training and evaluation" in caplog.text
    content["annotations"][0].update(DEGENERATE[kind])
    if kind == "no segmentation":  # how the set was made, if there are many
        assert summarise(content).num_instances == 100
    else:
        is_refused(content, r"2 of 100 \(2 %\) instances are degenerate: id 1 \(.*more than 1%")


def test_boxes_alone_are_a_valid_dataset(good, summarise, check):
    for annotation, empty in zip(good["annotations"], ([], None, {}, []), strict=True):
        annotation["segmentation"] = empty
    del good["annotations"][0]["segmentation"]
    summary = summarise(good)
    assert summary.num_masks == 0 and summary.num_instances == 4
    assert texts(check(good), NOTE) == ["no instance has a mask: train with MODEL.MASK_ON False"]
