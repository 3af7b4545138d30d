"""Every defect of a data set is found: training stops at the first error, `rev-det data check` names all."""

import json
import os
import re
import sys

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from rev_det import files
from rev_det.cli import main
from rev_det.data.annotations import check_coco_json
from rev_det.data.check import check_data, check_overlap
from rev_det.data.findings import ERROR, NOTE, WARNING

RLE = {"size": [40, 60], "counts": [100, 200, 2100]}
SECTIONS = pytest.mark.parametrize("section", ["images", "annotations", "categories"])


@pytest.fixture
def good(content, images):
    """Two images of different content, two instances each."""
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(os.path.join(images, "1.png"))
    return content


@pytest.fixture
def check(write, images):
    """What `data check` finds."""

    def run(content, name="pets", **options):
        return check_data(name, write(content, f"{name}.json"), images, **options)

    return run


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


def test_good_data_have_no_findings(good, check):
    seen = []
    report = check(good, progress=lambda items, total: seen.append(total) or items)
    assert report.findings == [] and seen == [2]
    assert (report.num_images, report.num_instances) == (2, 4)
    assert report.classes == [(3, "cat"), (7, "dog")]


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


def test_instance_keeps_its_valid_polygons(content, summarise, enlarge, caplog):
    content = enlarge(content, 100)
    content["annotations"][1]["segmentation"].append([3, 3, 4, 4])
    assert summarise(content).dropped == frozenset()
    assert "0 are left out of training and evaluation, the others keep their valid polygons" in caplog.text


def test_boxes_alone_are_a_valid_dataset(good, summarise, check):
    for annotation, empty in zip(good["annotations"], ([], None, {}, []), strict=True):
        annotation["segmentation"] = empty
    del good["annotations"][0]["segmentation"]
    summary = summarise(good)
    assert summary.num_masks == 0 and summary.num_instances == 4
    assert texts(check(good), NOTE) == ["no instance has a mask: train with MODEL.MASK_ON False"]


# ---- what only `data check` looks at ----


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
