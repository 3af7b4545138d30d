"""Every defect of a COCO-format file is found when the dataset is registered, and the message names it."""

import os

import pytest

from rev_det import files
from rev_det.data.validation import check_coco_json

RLE = {"size": [40, 60], "counts": [100, 200, 2100]}


def check(json_file, images):
    return check_coco_json("pets", json_file, images)


def test_valid_file_is_summarised(content, write, images):
    content["annotations"][0]["segmentation"] = RLE
    content["annotations"][1].update(iscrowd=1, segmentation=RLE)
    summary = check(write(content), images)
    assert summary.category_ids == (3, 7) and summary.classes == ("cat", "dog")
    assert (summary.num_images, summary.num_instances, summary.num_masks) == (2, 4, 4)
    assert summary.num_rle == 1  # the crowd is not counted
    assert summary.dropped == frozenset()


def test_missing_annotation_file(images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pets.*nowhere\.json does not exist"):
        check(str(tmp_path / "nowhere.json"), images)


def test_folder_given_as_annotation_file(images):
    with pytest.raises(FileNotFoundError, match="is a folder"):
        check(images, images)


def test_missing_image_folder(content, write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere does not exist"):
        check(write(content), str(tmp_path / "nowhere"))


def test_truncated_json_names_file_and_line(content, write, images):
    path = write(content)
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"images": [\n{"id": 1')
    with pytest.raises(ValueError, match=r"annotations\.json is not valid JSON: .* in line 2, column"):
        check(path, images)


def test_binary_file_is_not_json(images, tmp_path):
    path = tmp_path / "binary.json"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.json is not a text file in UTF-8"):
        check(str(path), images)


def test_unreadable_file_is_named(content, write, images, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # Not by file permissions: root may read everything.
    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(ValueError, match=r"annotations\.json cannot be read: Permission denied"):
        check(write(content), images)


def test_results_file_is_recognised(write, images):
    with pytest.raises(ValueError, match="holds a list.*results file"):
        check(write([]), images)


@pytest.mark.parametrize("section", ["images", "annotations", "categories"])
def test_missing_section_is_named(content, write, images, section):
    del content[section]
    with pytest.raises(ValueError, match=f"missing '{section}', found 'info'"):
        check(write(content), images)


@pytest.mark.parametrize("section", ["images", "annotations", "categories"])
@pytest.mark.parametrize(("value", "found"), [([], "empty"), ({"a": 1}, "a dict")])
def test_section_must_be_a_filled_list(content, write, images, section, value, found):
    content[section] = value
    with pytest.raises(ValueError, match=f"'{section}' is {found}"):
        check(write(content), images)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        *(("images", key) for key in ("id", "file_name", "height", "width")),
        *(("annotations", key) for key in ("id", "image_id", "category_id", "bbox")),
        *(("categories", key) for key in ("id", "name")),
    ],
)
def test_required_fields_are_named_with_their_record(content, write, images, section, key):
    del content[section][1][key]
    with pytest.raises(ValueError, match=rf"'{key}' of {section}\[1\] is missing"):
        check(write(content), images)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("images", "height", "40", r"'height' of images\[0\] is '40', expected an integer"),
        ("images", "id", True, r"'id' of images\[0\] is True, expected an integer"),
        ("images", "width", 0, r"images\[0\] has .* width 0"),
        ("images", "file_name", "", r"images\[0\] has file_name ''"),
        ("categories", "name", 5, r"'name' of categories\[0\] is 5, expected a text"),
        ("annotations", "bbox", [1, 2, 3], r"annotations\[0\] \(id 1\): 'bbox' is \[1, 2, 3\], expected"),
        ("annotations", "bbox", [1, 2, "3", 4], "expected four finite numbers"),
        ("annotations", "bbox", [1, 2, float("nan"), 4], "expected four finite numbers"),
        ("annotations", "bbox", [1, 2, True, 4], "expected four finite numbers"),
        ("annotations", "bbox", [1, 2, 10**400, 4], "expected four finite numbers"),
        ("annotations", "segmentation", [[0, 0, True, 0, 5, 5]], "a coordinate that is not a finite number"),
        ("annotations", "segmentation", [[0, 0, 1e18, 0, 5, 5]], r"a coordinate of 1e\+18, but image 0.png"),
        (
            "annotations",
            "segmentation",
            [[0, 0, 9, 0, 9, 9], [0, -601, 9, 0, 5, 5]],
            "a coordinate of 601, .* is 60x40",
        ),
        ("annotations", "iscrowd", 2, "'iscrowd' is 2, expected 0 or 1"),
        ("annotations", "ignore", 1, "'ignore' is not supported"),
        ("annotations", "area", -5, r"annotations\[0\] \(id 1\): 'area' is -5, expected a number of pixels"),
        ("annotations", "area", float("nan"), "'area' is nan, expected"),
        ("annotations", "area", float("inf"), "'area' is inf, expected"),
        ("annotations", "area", "100", "'area' is '100', expected"),
        ("annotations", "area", None, "'area' is None, expected"),
        ("annotations", "area", True, "'area' is True, expected"),
    ],
)
def test_wrong_values_are_named(content, write, images, section, key, value, message):
    content[section][0][key] = value
    with pytest.raises(ValueError, match=message):
        check(write(content), images)


def test_record_that_is_no_object(content, write, images):
    content["annotations"][2] = 7
    with pytest.raises(ValueError, match=r"annotations\[2\] is a int, expected an object"):
        check(write(content), images)


@pytest.mark.parametrize("section", ["images", "annotations", "categories"])
def test_duplicate_ids(content, write, images, section):
    content[section][1]["id"] = content[section][0]["id"]
    with pytest.raises(ValueError, match=f"'{section}' has duplicate ids"):
        check(write(content), images)


def test_class_names_that_results_could_not_tell_apart_are_named(content, write, images):
    content["categories"].append({"id": 9, "name": "dog"})
    with pytest.raises(ValueError, match=r"class names are given more than once \(dog\).*rename them"):
        check(write(content), images)


@pytest.mark.parametrize(("key", "section"), [("category_id", "categories"), ("image_id", "images")])
def test_references_must_exist(content, write, images, key, section):
    content["annotations"][3][key] = 99
    with pytest.raises(ValueError, match=rf"a '{key}' that '{section}' lacks \(99\)"):
        check(write(content), images)


def test_missing_images_are_counted_and_the_first_five_named(content, write, images):
    for key in range(20, 27):
        content["images"].append({"id": key, "file_name": f"sub/{key}.png", "height": 4, "width": 4})
    with pytest.raises(FileNotFoundError, match=r"7 of the 9 .*: sub/20\.png, .*sub/24\.png and 2 more"):
        check(write(content), images)


def test_images_in_subfolders_are_found(content, write, images):
    os.mkdir(os.path.join(images, "sub"))
    os.rename(os.path.join(images, "1.png"), os.path.join(images, "sub", "1.png"))
    content["images"][1]["file_name"] = "sub/1.png"
    assert check(write(content), images).num_images == 2


DEGENERATE = {
    "two points": {"segmentation": [[1, 1, 5, 5]]},
    "one point": {"segmentation": [[1, 1]]},
    "no point": {"segmentation": [[]]},
    "odd count": {"segmentation": [[1, 1, 5, 5, 1, 5, 3]]},
    "no width": {"bbox": [5, 5, 0, 10]},
    "negative height": {"bbox": [5, 5, 10, -3]},
    "outside": {"bbox": [70, 5, 10, 10]},
    "empty mask": {"segmentation": {"size": [40, 60], "counts": [2400]}},
    "empty compressed mask": {"segmentation": {"size": [40, 60], "counts": "P[2"}},
    "no segmentation": {"segmentation": []},
}


@pytest.mark.parametrize("change", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_degenerate_instance_is_dropped_and_named(content, write, images, enlarge, caplog, change):
    content = enlarge(content, 100)
    content["annotations"][1].update(change)
    with caplog.at_level("WARNING", logger="rev_det"):
        summary = check(write(content), images)
    assert summary.dropped == {2} and summary.num_instances == summary.num_masks == 99
    assert "1 of 100 instances are degenerate: id 2 (" in caplog.text


@pytest.mark.parametrize("change", [change for key, change in DEGENERATE.items() if key != "no segmentation"])
def test_more_than_one_percent_degenerate_is_an_error(content, write, images, enlarge, change):
    content = enlarge(content, 199)
    for annotation in content["annotations"][:2]:
        annotation.update(change)
    with pytest.raises(ValueError, match=r"2 of 199 instances are degenerate, more than 1%: id 1 \("):
        check(write(content), images)


def test_instance_keeps_its_valid_polygons(content, write, images, enlarge, caplog):
    content = enlarge(content, 100)
    content["annotations"][1]["segmentation"].append([3, 3, 4, 4])
    with caplog.at_level("WARNING", logger="rev_det"):
        summary = check(write(content), images)
    assert summary.dropped == frozenset()
    assert "0 are left out of training and evaluation, the others keep their valid polygons" in caplog.text


def test_boxes_alone_are_a_valid_dataset(content, write, images):
    for annotation, empty in zip(content["annotations"], ([], None, {}, []), strict=True):
        annotation["segmentation"] = empty
    del content["annotations"][0]["segmentation"]
    summary = check(write(content), images)
    assert summary.num_masks == 0 and summary.num_instances == 4


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([1, 1, 5, 5, 1, 5], "must be a list of polygons"),
        ("abc", "must be a list of polygons"),
        ([[1, 1, 5, "5", 1, 5]], "not a finite number"),
        ([[1, 1, 5, float("inf"), 1, 5]], "not a finite number"),
        ({"size": [60, 40], "counts": [2400]}, r"'size' .* is \[60, 40\], but image 0\.png has height 40"),
        ({"size": [40, 60], "counts": [100, 200]}, "damaged"),
        ({"size": [40, 60], "counts": [-1, 2401]}, "damaged"),
        ({"size": [40, 60], "counts": "P["}, "damaged"),
        ({"size": [40, 60], "counts": "P1"}, "damaged"),  # 32 pixels; evaluation would never end
        ({"size": [40, 60], "counts": "OOO"}, "damaged"),  # negative lengths
        ({"size": [40.0, 60.0], "counts": [2400]}, r"'size' .* is \[40.0, 60.0\]"),
        ({"size": [40, 60], "counts": "\u00e9"}, "damaged"),
        ({"size": [40, 60]}, "damaged"),
    ],
)
def test_malformed_segmentation_is_named(content, write, images, segmentation, message):
    content["annotations"][0]["segmentation"] = segmentation
    with pytest.raises(ValueError, match=rf"annotations\[0\] \(id 1\): .*{message}"):
        check(write(content), images)


def test_crowd_regions_are_counted(content, write, images):
    assert check(write(content), images).num_crowds == 0
    for annotation in content["annotations"][1:]:
        annotation.update(iscrowd=1, segmentation=RLE)
    assert check(write(content), images).num_crowds == 3


@pytest.mark.parametrize(
    "count, expected", [(1, [0]), (2, [0, 1]), (8, range(8)), (20, [0, 2, 5, 8, 10, 13, 16, 19])]
)
def test_a_few_images_from_the_whole_file_are_there_to_be_tried(content, write, images, count, expected):
    content["images"] = [{**content["images"][0], "id": key} for key in range(count)]
    for annotation in content["annotations"]:
        annotation["image_id"] = 0
    sample = check(write(content), images).sample
    assert [entry["image_id"] for entry in sample] == list(expected)
    path = os.path.join(images, "0.png")
    assert all(entry == {**sample[0], "image_id": entry["image_id"]} for entry in sample)
    assert sample[0] == {"file_name": path, "image_id": 0, "height": 40, "width": 60}


def test_only_images_that_may_be_extreme_are_remembered(content, write, images):
    assert check(write(content), images).extreme == ()
    content["images"][1] |= {"width": 60, "height": 3001}
    (entry,) = check(write(content), images).extreme
    assert (entry["height"], entry["width"]) == (3001, 60) and entry["file_name"].endswith("1.png")


def test_nesting_without_end_is_named(images, tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"dataset '\w+': .*deep\.json is not JSON that can be read"):
        check(str(tmp_path / "deep.json"), images)
