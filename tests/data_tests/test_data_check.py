"""`rev-det data check`: what it finds beyond what training checks, all of it at once, counted and graded."""

import json
import os
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from rev_det.data.annotations import check_coco_json
from rev_det.data.check import check_overlap
from rev_det.data.findings import ERROR, NOTE, WARNING
from rev_det_cli import main


@pytest.fixture
def summarise(write, images):
    """What training does before it starts."""
    return lambda content: check_coco_json("pets", write(content), images)


def texts(report, severity):
    return [finding.text for finding in report.findings if finding.severity == severity]


def test_good_data_have_no_findings(good, check):
    seen = []
    report = check(good, progress=lambda items, total: seen.append(total) or items)
    assert report.findings == [] and seen == [2]
    assert (report.num_images, report.num_instances) == (2, 4)
    assert report.classes == [(3, "cat"), (7, "dog")]


def test_the_pixels_of_every_image_are_looked_at(good, images, check):
    good["images"].append(good["images"][0] | {"id": 12, "file_name": "deep.png"})
    Image.fromarray(np.full((40, 60), 4000, np.uint16)).save(os.path.join(images, "deep.png"))
    path = os.path.join(images, "1.png")
    whole = open(path, "rb").read()
    open(path, "wb").write(whole[: len(whole) // 2])
    good["images"][0]["width"] = 61
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter: is checked as it is seen
    good["images"].append(good["images"][0] | {"id": 13, "file_name": "turned.png", "width": 60})
    Image.new("RGB", (60, 40)).save(os.path.join(images, "turned.png"), exif=exif)
    sizes, broken = sorted(texts(check(good), ERROR), reverse=True)[:2]
    assert re.match(r"2 of 4 \(50 %\) images cannot be decoded: 1\.png \(.*(truncated|broken)", broken)
    assert "deep.png (its grey has more than 8 bits" in broken
    assert "images have another size than their annotations say: 0.png (60x40, not 61x40)" in sizes
    assert "turned.png (40x60, not 60x40)" in sizes


@pytest.mark.parametrize(
    "name, shown", [("\udce9.png", r"\udce9.png"), ("a\nb.png", r"a\nb.png"), ("\0", r"\x00")]
)
def test_names_that_cannot_be_printed_are_shown_as_escapes(good, images, write, capsys, name, shown):
    good["images"][1]["file_name"] = name
    path = write(good)
    assert main(["data", "check", f"pets={path}:{images}"]) == 1
    assert f"images are not files in {images}: {shown}; check" in capsys.readouterr().out
    if name == "\0":
        return
    os.rename(os.path.join(images, "1.png"), os.path.join(os.fsencode(images), os.fsencode(name)))
    assert main(["data", "check", f"pets={path}:{images}"]) == 0
    assert main(["data", "view", f"pets={path}:{images}", "--output", os.path.join(images, "sheet.png")]) == 0


def rle_at(x, y, compressed):
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[y : y + 10, x : x + 10] = 1
    if compressed:
        rle = mask_util.encode(mask)
        return {"size": [40, 60], "counts": rle["counts"].decode()}
    changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0))
    return {"size": [40, 60], "counts": np.diff([0, *changes, 2400]).tolist()}


ALL, SECOND, FOURTH, NEW = slice(None), slice(1, 2), slice(3, 4), None
COPY = {"id": 12, "file_name": "copy.bmp", "height": 40, "width": 60}
MASKS = ([[2, 2, 12, 2, 12, 12, 2, 12]], rle_at(2, 2, compressed=True), rle_at(2, 2, compressed=False))
APART = r"1 of 4 .* masks and boxes are not of the same place: id 2"
OVER = r"1 of 4 \(25 %\) {} reach outside their image, by up to {} pixels: id 2; is 'bbox' \[x, y, width"
DEFECTS = [
    ("annotations", ALL, {"iscrowd": 1}, ERROR, "all annotations are crowd regions"),
    ("annotations", ALL, {"bbox": [0.1, 0.2, 0.3, 0.4]}, ERROR, "all boxes lie between 0 and 1"),
    ("annotations", SECOND, {"bbox": [20, 20, 60, 10]}, WARNING, OVER.format("boxes", 20)),
    ("annotations", SECOND, {"segmentation": [[20, 20, 90, 20, 30, 30]]}, WARNING, OVER.format("masks", 30)),
    *(("annotations", SECOND, {"segmentation": mask}, WARNING, APART) for mask in MASKS),
    (
        "annotations",
        FOURTH,
        {"bbox": [5, 25, 10, 10], "image_id": 11, "category_id": 3},
        WARNING,
        r"1 of 4 .* instances have the class and box of another: id 3 = id 4",
    ),
    ("categories", NEW, {"id": 9, "name": "bird"}, WARNING, r"1 of 3 .* classes have no instances: bird"),
    ("images", NEW, COPY | {"file_name": "0.png"}, WARNING, r"1 of 3 .* listed more than once: 0\.png"),
    (
        "images",
        NEW,
        COPY,
        WARNING,
        r"1 of 3 .* have the same content under several names: 0\.png = copy\.bmp",
    ),
    ("images", NEW, COPY, NOTE, r"1 of 3 .* images have no instances: copy\.bmp; training leaves them out"),
]


@pytest.mark.parametrize("section, place, change, severity, text", DEFECTS)
def test_what_training_could_bear_is_found_counted_and_graded(
    good, images, check, summarise, section, place, change, severity, text
):
    with Image.open(os.path.join(images, "0.png")) as image:
        image.save(os.path.join(images, "copy.bmp"))
    if place is NEW:
        good[section].append(change)
    else:
        for record in good[section][place]:
            record.update(change)
    report = check(good)
    assert any(re.search(text, line) for line in texts(report, severity)), report.findings
    summarise(good)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_mask_that_fits_its_box_is_not_reported(good, check, compressed):
    good["annotations"][1]["segmentation"] = rle_at(20, 20, compressed)
    assert check(good).findings == []


@pytest.mark.parametrize("seed", range(5))
def test_extents_of_run_lengths_are_pycocotools(good, check, seed):
    """A box that pycocotools finds around any mask is that of the same place."""
    mask = np.asfortranarray(np.random.default_rng(seed).random((40, 60)) < 0.003 * seed + 0.001, np.uint8)
    mask[17, 23] = 1
    rle = mask_util.encode(mask)
    good["annotations"][1].update(
        segmentation={"size": [40, 60], "counts": rle["counts"].decode()}, bbox=mask_util.toBbox(rle).tolist()
    )
    assert check(good).findings == []


def test_all_defects_are_named_at_once_the_worst_first(good, check):
    good["images"][0]["width"] = 61
    good["images"][1]["file_name"] = "gone.png"
    good["categories"].append({"id": 9, "name": "bird"})
    good["annotations"][0].update(area=-1)
    good["annotations"][1].update(segmentation="abc")
    good["annotations"][2].update(keypoints=[1])
    report = check(good)
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities, key=[ERROR, WARNING, NOTE].index)
    assert len(texts(report, ERROR)) == 5 and len(texts(report, WARNING)) == 1


# ---- two sets ----


@pytest.fixture
def two_sets(good, images):
    """The second has the same classes, an image of its own and a copy of one of the first."""
    with Image.open(os.path.join(images, "0.png")) as image:
        image.save(os.path.join(images, "copy.bmp"))
    Image.new("RGB", (60, 40), (9, 9, 9)).save(os.path.join(images, "own.png"))
    other = json.loads(json.dumps(good))
    for image, name in zip(other["images"], ("copy.bmp", "own.png"), strict=True):
        image["file_name"] = name
    return good, other


def test_images_that_two_sets_share_are_found_by_their_content(two_sets, check):
    train, val = (check(content, name) for content, name in zip(two_sets, ("train", "val"), strict=True))
    (finding,) = check_overlap(train, val)
    assert finding.severity == ERROR
    assert "1 of 2 (50 %) images of 'val' are also in 'train': copy.bmp = 0.png" in finding.text
    assert "2 of 2 (100 %) images" in check_overlap(train, train)[0].text


def test_sets_with_other_classes_do_not_go_together(two_sets, check):
    train, val = two_sets
    val["images"] = val["images"][1:]
    val["annotations"] = [a for a in val["annotations"] if a["image_id"] == 11]
    val["categories"][0]["name"] = "bird"
    (finding,) = check_overlap(check(train, "train"), check(val, "val"))
    assert finding.severity == ERROR
    assert "'train' and 'val' differ in their classes or ids: bird, dog" in finding.text


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
    two_sets[0]["categories"].append({"id": 9, "name": "bird"})
    assert main(["data", "check", f"a={write(two_sets[0])}:{images}"]) == 0
    assert capsys.readouterr().out.endswith("\n0 errors, 1 warning\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["a=nowhere.json:."], "nowhere.json does not exist"),
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
