"""The mapper is Detectron2's, except that an unreadable image is named."""

import os
import sys

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image

from rev_det.data import RevDatasetMapper, register_coco_json

BOTH = pytest.mark.parametrize("is_train", [True, False])


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.MIN_SIZE_TRAIN = (40,)
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


@pytest.fixture
def records(content, write, images):
    register_coco_json("pets", write(content), images)
    return DatasetCatalog.get("pets")


@BOTH
def test_readable_images_are_mapped_as_by_detectron2(cfg, records, is_train):
    ours = RevDatasetMapper(cfg, is_train)(records[0])
    theirs = DatasetMapper(cfg, is_train)(records[0])
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["image"], theirs["image"])
    if is_train:
        assert torch.equal(ours["instances"].gt_boxes.tensor, theirs["instances"].gt_boxes.tensor)
        assert len(ours["instances"].gt_masks) == 2


def halve(path):
    data = open(path, "rb").read()
    open(path, "wb").write(data[: len(data) // 2])


def replace_by(make):
    def replace(path):
        os.unlink(path)
        make(path)

    return replace


SPOILED = {
    "cut": (halve, "truncated|broken"),
    "text": (lambda path: open(path, "w").write("no image"), "cannot identify image file as BMP, .*WEBP"),
    "empty": (lambda path: open(path, "w").close(), "cannot identify image file"),
    "gone": (os.remove, "No such file"),
    "deep": (lambda path: Image.fromarray(np.full((40, 60), 4000, np.uint16)).save(path), "more than 8 bits"),
    # To read it, Pillow would run Ghostscript.
    "PostScript": (lambda path: Image.new("RGB", (60, 40)).save(path, "EPS"), "cannot identify image file"),
    "folder": (replace_by(os.mkdir), "is a folder, not a file"),
    "pipe": (replace_by(lambda path: os.mkfifo(path)), "is a pipe or a device, not a file"),
    "device": (replace_by(lambda path: os.symlink("/dev/zero", path)), "is a pipe or a device, not a file"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes")
@pytest.mark.parametrize("kind", SPOILED)
def test_image_that_cannot_be_decoded_is_named(cfg, records, kind):
    spoil, reason = SPOILED[kind]
    spoil(records[1]["file_name"])
    message = rf"1\.png \(image_id 11\) cannot be decoded: .*({reason}).*replace the file"
    for use in (
        RevDatasetMapper(cfg, True),
        RevDatasetMapper(cfg, False),
        RevDatasetMapper(cfg).check_readable,
    ):
        with pytest.raises(ValueError, match=message):
            use(records[1])


def test_other_errors_pass_unchanged(cfg, records):
    records[0]["width"] += 1
    with pytest.raises(SizeMismatchError, match="Mismatched image shape"):
        RevDatasetMapper(cfg, True)(records[0])


@pytest.mark.parametrize("image_format", ["rgb", "YUV-BT.601", "CMYK", ""])
def test_an_image_format_that_models_cannot_take_is_an_error(cfg, image_format):
    cfg.INPUT.FORMAT = image_format
    with pytest.raises(ValueError, match=f"INPUT.FORMAT is '{image_format}'; allowed are 'RGB', 'BGR', 'L'"):
        RevDatasetMapper(cfg, True)


def test_images_can_be_tried_without_mapping_them(cfg, records):
    mapper = RevDatasetMapper(cfg, True)
    before = repr(records)
    for record in records:
        mapper.check_readable(record)
    assert repr(records) == before
    with pytest.raises(SizeMismatchError, match="Mismatched image shape"):
        mapper.check_readable({**records[0], "height": 1})
