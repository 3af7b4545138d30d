"""`rev-det data check`: every defect is found, counted and graded, all at once."""

import json
import os
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from rev_det.data.check import ERROR, NOTE, WARNING, check_data, check_overlap
from rev_det_cli import main


@pytest.fixture
def good(content, images):
    """Two images of different content, two instances each."""
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(os.path.join(images, "1.png"))
    return content


@pytest.fixture
def check(write, images):
    def run(content, name="pets", **options):
        return check_data(name, write(content, f"{name}.json"), images, **options)

    return run


def findings(report, severity):
    return [finding.text for finding in report.findings if finding.severity == severity]


def test_good_data_have_no_findings(good, check):
    done = []
    report = check(good, done=lambda count, total: done.append((count, total)))
    assert report.findings == []
    assert (report.num_images, report.num_instances, report.num_classes) == (2, 4, 2)
    assert done == [(1, 2), (2, 2)]


DEFECTS = {
    "image cut": (ERROR, r"1 of 2 \(50 %\) images cannot be decoded: 1\.png \(.*(truncated|broken)"),
    "image deep": (
        ERROR,
        r"1 of 2 \(50 %\) images cannot be decoded: 1\.png \(its grey has more than 8 bits",
    ),
    "image gone": (ERROR, r"1 of 2 \(50 %\) images do not exist: 1\.png"),
    "image size": (ERROR, r"1 of 2 .* another size than their annotations say: 0\.png \(60x40, not 61x40\)"),
    "image id twice": (ERROR, r"1 of 3 .* ids of 'images' are given more than once: 10"),
    "annotation id twice": (ERROR, r"1 of 4 .* ids of 'annotations' are given more than once: 1"),
    "category id twice": (ERROR, r"1 of 2 .* ids of 'categories' are given more than once: 3"),
    "unknown image": (ERROR, r"1 of 4 .* instances are of an image that is not listed: id 4"),
    "unknown class": (ERROR, r"1 of 4 .* instances are of a class that is not listed: id 4"),
    "normalised": (ERROR, "all boxes lie between 0 and 1"),
    "mask outside": (WARNING, r"1 of 4 \(25 %\) masks reach outside their image, by up to 30 pixels: id 2"),
    "box outside": (WARNING, r"1 of 4 .* boxes reach outside their image, by up to 20 pixels: id 2"),
    "box empty": (WARNING, r"1 of 4 .* boxes are empty or wholly outside their image: id 3"),
    "mask elsewhere": (WARNING, r"1 of 4 .* masks and boxes are not of the same place: id 2"),
    "mask elsewhere, compressed": (WARNING, r"1 of 4 .* masks and boxes are not of the same place: id 2"),
    "mask elsewhere, in runs": (WARNING, r"1 of 4 .* masks and boxes are not of the same place: id 2"),
    "instance twice": (WARNING, r"1 of 5 .* instances have the class and box of another: id 4 = id 5"),
    "empty class": (WARNING, r"1 of 3 \(33 %\) classes have no instances: bird"),
    "class name twice": (ERROR, r"1 of 2 .* class names are given more than once: cat"),
    "file twice": (WARNING, r"1 of 3 .* files are listed more than once: 0\.png"),
    "same content": (WARNING, r"1 of 3 .* have the same content under several names: 0\.png = copy\.bmp"),
    "no instances": (NOTE, r"1 of 2 .* images have no instances: 1\.png"),
}


def rle_at(x, y, compressed):
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[y : y + 10, x : x + 10] = 1
    if compressed:
        rle = mask_util.encode(mask)
        return {"size": [40, 60], "counts": rle["counts"].decode()}
    changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0))
    return {"size": [40, 60], "counts": np.diff([0, *changes, 2400]).tolist()}


def break_data(defect, content, folder):
    """Put one defect into good data."""
    image, annotation = content["images"], content["annotations"]
    match defect:
        case "image cut":
            path = os.path.join(folder, "1.png")
            whole = open(path, "rb").read()
            open(path, "wb").write(whole[: len(whole) // 2])
        case "image deep":
            Image.fromarray(np.full((40, 60), 4000, np.uint16)).save(os.path.join(folder, "1.png"))
        case "image gone":
            os.unlink(os.path.join(folder, "1.png"))
        case "image size":
            image[0]["width"] = 61
        case "image id twice":
            image.append(image[0] | {"file_name": "1.png"})
        case "annotation id twice":
            annotation[1]["id"] = 1
        case "category id twice":
            content["categories"][0]["id"] = 3
        case "unknown image":
            annotation[3]["image_id"] = 99
        case "unknown class":
            annotation[3]["category_id"] = 99
        case "normalised":
            for each in annotation:
                each["bbox"] = [0.1, 0.2, 0.3, 0.4]
        case "mask outside":
            annotation[1]["segmentation"][0][2] = 90
        case "box outside":
            annotation[1]["bbox"] = [20, 20, 60, 10]
        case "box empty":
            annotation[2]["bbox"] = [5, 25, 0, 10]
        case "mask elsewhere":
            annotation[1]["segmentation"] = [[2, 2, 12, 2, 12, 12, 2, 12]]
        case "mask elsewhere, compressed":
            annotation[1]["segmentation"] = rle_at(2, 2, compressed=True)
        case "mask elsewhere, in runs":
            annotation[1]["segmentation"] = rle_at(2, 2, compressed=False)
        case "instance twice":
            annotation.append(annotation[3] | {"id": 5})
        case "empty class":
            content["categories"].append({"id": 9, "name": "bird"})
        case "class name twice":
            content["categories"][0]["name"] = "cat"
        case "file twice":
            image.append(image[0] | {"id": 12})
        case "same content":
            Image.open(os.path.join(folder, "0.png")).save(os.path.join(folder, "copy.bmp"))
            image.append(image[0] | {"id": 12, "file_name": "copy.bmp"})
        case "no instances":
            del annotation[2:]


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_found_counted_and_graded(good, images, check, defect):
    severity, text = DEFECTS[defect]
    break_data(defect, good, images)
    report = check(good)
    found = findings(report, severity)
    assert any(re.search(text, line) for line in found), report.findings


@pytest.mark.parametrize("defect", [name for name, (severity, _) in DEFECTS.items() if severity == ERROR])
def test_what_is_counted_is_not_said_again_in_the_words_of_training(good, images, check, defect):
    break_data(defect, good, images)
    assert not [text for text in findings(check(good), ERROR) if "training refuses" in text]


def test_data_with_boxes_alone_say_how_to_train_on_them(good, check):
    good["annotations"][0]["segmentation"] = []
    for annotation in good["annotations"][1:]:
        del annotation["segmentation"]
    assert findings(check(good), NOTE) == ["no instance has a mask: train with MODEL.MASK_ON False"]


@pytest.mark.parametrize("compressed", [True, False])
def test_a_mask_that_fits_its_box_is_not_reported(good, check, compressed):
    good["annotations"][1]["segmentation"] = rle_at(20, 20, compressed)
    assert check(good).findings == []


def test_all_defects_are_named_at_once_the_worst_first(good, images, check):
    for defect in ("no instances", "empty class", "mask outside", "image size", "image gone"):
        break_data(defect, good, images)
    report = check(good)
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities, key=[ERROR, WARNING, NOTE].index)
    assert len(findings(report, WARNING)) >= 2 and len(findings(report, ERROR)) == 2


def test_what_training_refuses_is_an_error_in_its_words(good, check):
    good["annotations"][0]["bbox"] = [1, 2, 3]
    (error,) = findings(check(good), ERROR)
    assert error.startswith("training refuses these data: annotations[0] (id 1): 'bbox' is [1, 2, 3]")
    good["annotations"][0].update(bbox=[1, 2, 3, 4], area=-1)
    assert any("(id 1): 'area' is -1, expected" in error for error in findings(check(good), ERROR))


def test_boxes_given_by_two_corners_get_a_hint(good, check):
    for annotation in good["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height]
    hints = [text for text in findings(check(good), WARNING) if "is 'bbox' [x, y, width, height]" in text]
    assert hints


def test_a_turned_photo_is_checked_as_it_is_seen(good, check, images):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    with Image.open(os.path.join(images, "0.png")) as image:
        image.save(os.path.join(images, "0.png"), exif=exif)
    (error,) = findings(check(good), ERROR)
    assert "0.png (40x60, not 60x40)" in error


@pytest.mark.parametrize("text, message", [("[]", "holds a list"), ("{", "is not valid JSON")])
def test_what_is_no_annotation_file_is_an_error(tmp_path, images, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_data("pets", str(tmp_path / "a.json"), images)


# ---- two sets ----


def other_set(good):
    """The same classes; an image of its own, and a copy of one of `good` under another name."""
    other = json.loads(json.dumps(good))
    other["images"] = [
        {"id": 1, "file_name": "copy.bmp", "height": 40, "width": 60},
        {"id": 2, "file_name": "own.png", "height": 40, "width": 60},
    ]
    for annotation in other["annotations"]:
        annotation["image_id"] -= 9
    return other


@pytest.fixture
def two_sets(good, images):
    with Image.open(os.path.join(images, "0.png")) as image:
        image.save(os.path.join(images, "copy.bmp"))
    Image.new("RGB", (60, 40), (9, 9, 9)).save(os.path.join(images, "own.png"))
    return good, other_set(good)


def test_images_that_two_sets_share_are_found_by_their_content(two_sets, check):
    train, val = (check(content, name) for content, name in zip(two_sets, ("train", "val"), strict=True))
    (finding,) = check_overlap(train, val)
    assert finding.severity == ERROR
    assert "1 of 2 (50 %) images of 'val' are also in 'train': copy.bmp = 0.png" in finding.text


def test_sets_with_other_classes_do_not_go_together(two_sets, check):
    train, val = two_sets
    val["images"] = val["images"][1:]
    val["annotations"] = [a for a in val["annotations"] if a["image_id"] == 2]
    val["categories"][0]["name"] = "bird"
    (finding,) = check_overlap(check(train, "train"), check(val, "val"))
    assert finding.severity == ERROR
    assert "'train' and 'val' differ in their classes or ids: bird, dog" in finding.text


def test_all_are_a_hundred_percent(good, check):
    assert "2 of 2 (100 %) images" in check_overlap(check(good), check(good, "again"))[0].text


# ---- the command ----


def test_the_command_prints_all_and_fails_on_errors_alone(two_sets, write, images, capsys):
    train, val = (f"{n}={write(c, f'{n}.json')}:{images}" for n, c in zip("ab", two_sets, strict=True))
    assert main(["data", "check", train]) == 0
    assert capsys.readouterr().out == "a: 2 images, 4 instances, 2 classes\n  ok\n\n0 errors, 0 warnings\n"
    assert main(["data", "check", train, val]) == 1
    out = capsys.readouterr().out
    assert "b: 2 images, 4 instances, 2 classes\n  ok\n" in out
    assert "a and b\n  error    1 of 2 (50 %) images of 'b' are also in 'a'" in out
    assert out.endswith("\n1 error, 0 warnings\n")


def test_warnings_alone_do_not_fail(good, write, images, capsys):
    good["categories"].append({"id": 9, "name": "bird"})
    assert main(["data", "check", f"a={write(good)}:{images}"]) == 0
    assert capsys.readouterr().out.endswith("\n0 errors, 1 warning\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["a=nowhere.json:."], "nowhere.json does not exist"),
        (["a={json}:nowhere"], "nowhere does not exist"),
        (["{json}"], "error: data set '"),
        (["{json}"], "expected NAME=JSON:IMAGES"),
        (["a={json}:{images}", "a={json}:{images}"], "must have different names"),
    ],
)
def test_what_the_user_can_mend_is_one_line(good, write, images, capsys, arguments, words):
    json_file = write(good)
    assert main(["data", "check", *(a.format(json=json_file, images=images) for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err
