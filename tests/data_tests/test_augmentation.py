"""Augmentations by name: their sizes, and annotations that stay where the image shows the object."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as coco_mask

from rev_det.config import add_rev_det_config
from rev_det.data import RevDatasetMapper, augmentation
from rev_det.data.augmentation import build_augmentations

HEIGHT, WIDTH = 100, 240
# The object of every picture, in its upper left part so that crops cut it or miss it: x0, y0, x1, y1.
OBJECT = (9, 13, 41, 41)


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_rev_det_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN = tuple(range(480, 801, 32))
    cfg.INPUT.MAX_SIZE_TRAIN = 1333
    cfg.INPUT.LSJ.SIZE = 200
    return cfg


@pytest.fixture(autouse=True)
def seeded():
    """Detectron2's augmentations draw from numpy's global generator."""
    state = np.random.get_state()
    np.random.seed(0)
    yield
    np.random.set_state(state)


@pytest.fixture
def masks(cfg):
    """Train masks; cropping polygons takes shapely."""
    pytest.importorskip("shapely")
    cfg.MODEL.MASK_ON = True
    return cfg


def rle(x0, y0, x1, y1):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[y0:y1, x0:x1] = 1
    return coco_mask.encode(mask)


def polygon(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


@pytest.fixture
def record(tmp_path):
    """A black picture with a white object, and a crowd that must not become an instance."""
    x0, y0, x1, y1 = OBJECT
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[y0:y1, x0:x1] = 255
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    instance = {"bbox": list(OBJECT), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
    instance["segmentation"] = polygon(*OBJECT)
    crowd = {**instance, "bbox": [90, 60, 150, 95], "segmentation": rle(90, 60, 150, 95), "iscrowd": 1}
    return {
        "file_name": str(path),
        "image_id": 1,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [instance, crowd],
    }


def draws(augmentations, image, count):
    """Sizes after augmentation with what was done."""
    for _ in range(count):
        aug_input = T.AugInput(image)
        transforms = T.AugmentationList(augmentations)(aug_input).transforms
        yield aug_input.image.shape[:2], transforms


def parts(transforms, kind):
    return [transform for transform in transforms if isinstance(transform, kind)]


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
def test_default_is_detectron2s(cfg, is_train, flip):
    cfg.INPUT.RANDOM_FLIP = flip
    plain = get_cfg()
    plain.INPUT.RANDOM_FLIP = flip
    assert str(build_augmentations(cfg, is_train)) == str(utils.build_augmentation(cfg, is_train))
    assert str(build_augmentations(plain, is_train)) == str(utils.build_augmentation(plain, is_train))


@pytest.mark.parametrize("name", ["swin", "lsj"])
def test_test_time_has_no_part_in_it(cfg, name):
    cfg.INPUT.AUGMENTATION = name
    assert str(build_augmentations(cfg, False)) == str(utils.build_augmentation(cfg, False))


@pytest.mark.parametrize("height,width", [(240, 320), (320, 150)])
def test_swin_crops_every_other_time_and_ends_in_the_multi_scale_resize(cfg, height, width):
    cfg.INPUT.AUGMENTATION = "swin"
    augmentations = build_augmentations(cfg, True)
    image = np.zeros((height, width, 3), np.uint8)
    cropped = flipped = 0
    before_crop, final = set(), set()
    for size, transforms in draws(augmentations, image, 60):
        resizes, crops = parts(transforms, T.ResizeTransform), parts(transforms, T.CropTransform)
        assert len(crops) == len(resizes) - 1
        flipped += len(parts(transforms, T.HFlipTransform))
        # One pixel is lost or won when the other side is rounded.
        assert min(size) in cfg.INPUT.MIN_SIZE_TRAIN or abs(max(size) - 1333) <= 1
        assert max(size) <= 1333
        final.add(min(size))
        if crops:
            cropped += 1
            before = (resizes[0].new_h, resizes[0].new_w)
            before_crop.add(min(before))
            assert max(before) <= 4200
            for side, cut in zip(before, (crops[0].h, crops[0].w), strict=True):
                assert min(side, 384) <= cut <= min(side, 600)
    assert 15 < cropped < 45 and 15 < flipped < 45
    assert before_crop == {400, 500, 600}
    assert len(final) > 5


def test_swin_keeps_the_longest_side_before_the_crop(cfg):
    cfg.INPUT.AUGMENTATION = "swin"
    image = np.zeros((20, 400, 3), np.uint8)
    resizes = [parts(done, T.ResizeTransform) for _, done in draws(build_augmentations(cfg, True), image, 20)]
    assert {pair[0].new_w for pair in resizes if len(pair) == 2} == {4200}


@pytest.mark.parametrize("height,width", [(240, 320), (320, 150)])
def test_lsj_images_are_squares_of_1024_pixels(cfg, height, width):
    cfg.INPUT.AUGMENTATION = "lsj"
    cfg.INPUT.LSJ.SIZE = 1024
    scales = []
    for size, transforms in draws(build_augmentations(cfg, True), np.zeros((height, width, 3), np.uint8), 20):
        assert size == (1024, 1024)
        (resize,) = parts(transforms, T.ResizeTransform)
        scales.append(max(resize.new_h, resize.new_w) / 1024)
    assert 0.1 <= min(scales) < 0.5 and 1.5 < max(scales) <= 2.0


def test_lsj_size_and_scales_are_keys(cfg):
    cfg.merge_from_list(["INPUT.AUGMENTATION", "lsj", "INPUT.LSJ.SIZE", 96, "INPUT.LSJ.SCALES", (0.5, 0.5)])
    image = np.full((200, 100, 3), 255, np.uint8)
    aug_input = T.AugInput(image)
    T.AugmentationList(build_augmentations(cfg, True))(aug_input)
    assert aug_input.image.shape == (96, 96, 3)
    assert (aug_input.image == 255).all(axis=2).sum() == 48 * 24


@pytest.mark.parametrize("name", ["swin", "lsj"])
def test_log_shows_what_is_done(cfg, name):
    cfg.INPUT.AUGMENTATION = name
    shown = str(build_augmentations(cfg, True))
    assert " object at 0x" not in shown
    assert ("absolute_range" in shown) == (name == "swin")


def compare_with_picture(mapped, with_masks):
    """The instance is where the picture is white, to two pixels; returns whether there is one."""
    instances = mapped["instances"]
    # Resizing blurs the object's border; LSJ's padding has 128.
    white = mapped["image"].min(dim=0).values > 200
    if not len(instances):
        assert white.sum() <= 4 * white.any(dim=1).sum() or white.sum() <= 4 * white.any(dim=0).sum()
        return False
    assert len(instances) == 1
    rows, columns = white.any(dim=1).nonzero(), white.any(dim=0).nonzero()
    if not len(rows):  # a sliver, all of it blurred
        (box,) = instances.gt_boxes.tensor
        assert min(box[2] - box[0], box[3] - box[1]) < 4
        return True
    shown = torch.cat([columns.min()[None], rows.min()[None], columns.max()[None] + 1, rows.max()[None] + 1])
    # A pixel of the source is up to eight wide here, and half of it is blur.
    torch.testing.assert_close(instances.gt_boxes.tensor[0], shown.float(), atol=5, rtol=0)
    if with_masks:
        masks = instances.gt_masks
        if hasattr(masks, "polygons"):
            mask = torch.from_numpy(utils.polygons_to_bitmask(masks.polygons[0], *white.shape))
        else:
            mask = masks.tensor[0]
        x0, y0, x1, y1 = shown.tolist()
        inside = torch.zeros_like(white)
        inside[y0:y1, x0:x1] = True
        border = 2 * 5 * (x1 - x0 + y1 - y0 + 10)
        assert (mask != inside).sum() <= border
        # Unlike the border's, no error far away is forgiven.
        far = torch.ones_like(white)
        far[max(y0 - 5, 0) : y1 + 5, max(x0 - 5, 0) : x1 + 5] = False
        assert not (mask & far).any()
    return True


@pytest.mark.parametrize("name", ["swin", "lsj"])
@pytest.mark.parametrize(
    "segmentation,mask_format", [("polygon", "polygon"), ("polygon", "bitmask"), ("rle", "bitmask")]
)
def test_masks_and_boxes_follow_the_picture(masks, record, name, segmentation, mask_format):
    masks.INPUT.AUGMENTATION = name
    masks.INPUT.MASK_FORMAT = mask_format
    if segmentation == "rle":
        record["annotations"][0]["segmentation"] = rle(*OBJECT)
    mapper = RevDatasetMapper(masks, True)
    found = [compare_with_picture(mapper(record), True) for _ in range(25)]
    assert any(found) and not all(found)


@pytest.mark.parametrize("name", ["swin", "lsj"])
def test_boxes_without_masks_follow_the_picture(cfg, record, name):
    cfg.INPUT.AUGMENTATION = name
    mapper = RevDatasetMapper(cfg, True)
    found = [compare_with_picture(mapper(record), False) for _ in range(25)]
    assert any(found) and not all(found)


def test_boxes_are_tight_around_what_a_crop_leaves_of_a_mask(masks, record):
    # The lower half of a triangle that stands on its tip is narrower than its box.
    x0, y0, x1, y1 = OBJECT
    record["annotations"][0]["segmentation"] = [[x0, y0, x1, y0, (x0 + x1) / 2, y1]]
    masks.INPUT.AUGMENTATION = "lsj"
    masks.INPUT.LSJ.SCALES = (2.0, 2.0)
    mapper = RevDatasetMapper(masks, True)
    for instances in (mapper(record)["instances"] for _ in range(20)):
        if len(instances):
            xy = np.concatenate(instances.gt_masks.polygons[0]).reshape(-1, 2)
            tight = torch.tensor([*xy.min(axis=0), *xy.max(axis=0)], dtype=torch.float32)
            torch.testing.assert_close(instances.gt_boxes.tensor[0], tight)


def test_annotations_in_integers_are_as_exact_as_others(masks, record):
    masks.INPUT.AUGMENTATION = "swin"
    mapper = RevDatasetMapper(masks, True)
    found = {}
    for kind in (int, float):
        record["annotations"][0]["bbox"] = [kind(number) for number in OBJECT]
        record["annotations"][0]["segmentation"] = [[kind(number) for number in polygon(*OBJECT)[0]]]
        np.random.seed(1)
        found[kind] = [mapper(record)["instances"] for _ in range(5)]
    for ours, exact in zip(found[int], found[float], strict=True):
        assert torch.equal(ours.gt_boxes.tensor, exact.gt_boxes.tensor)
        np.testing.assert_array_equal(ours.gt_masks.polygons, exact.gt_masks.polygons)


def test_padding_is_background_in_masks_and_ignored_in_semantic_labels(masks, record, tmp_path):
    masks.INPUT.AUGMENTATION = "lsj"
    masks.INPUT.LSJ.SCALES = (0.5, 0.5)
    masks.INPUT.MASK_FORMAT = "bitmask"
    record["annotations"][0]["segmentation"] = rle(*OBJECT)
    record["sem_seg_file_name"] = str(tmp_path / "labels.png")
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(record["sem_seg_file_name"])
    mapped = RevDatasetMapper(masks, True)(record)
    shown = torch.zeros(200, 200, dtype=torch.bool)
    shown[:42, :100] = True
    mask = mapped["instances"].gt_masks.tensor[0]
    assert mask[shown].any() and not mask[~shown].any()
    assert (mapped["sem_seg"][shown] == 0).all() and (mapped["sem_seg"][~shown] == 255).all()


@pytest.mark.parametrize("name", ["swin", "lsj"])
def test_left_keypoints_stay_left_and_those_cut_off_are_unlabelled(cfg, record, name):
    cfg.INPUT.AUGMENTATION = name
    cfg.MODEL.KEYPOINT_ON = True
    cfg.DATASETS.TRAIN = ("people",)
    MetadataCatalog.get("people").set(
        keypoint_names=["left_ear", "right_ear"], keypoint_flip_map=[("left_ear", "right_ear")]
    )
    x0, y0, x1, y1 = OBJECT
    middle = (y0 + y1) / 2
    record["annotations"][0]["keypoints"] = [x0, middle, 2, x1, middle, 2]
    mapper = RevDatasetMapper(cfg, True)
    visible = []
    for mapped in (mapper(record) for _ in range(40)):
        instances = mapped["instances"]
        if not len(instances):
            continue
        left, right = instances.gt_keypoints.tensor[0]
        visible.append((left[2] > 0).item() + (right[2] > 0).item())
        box = instances.gt_boxes.tensor[0]
        for point, edge in ((left, 0), (right, 2)):
            if point[2] > 0:
                torch.testing.assert_close(point[0], box[edge], atol=1.0, rtol=0)
            else:
                assert not point.any()
    assert {1, 2} <= set(visible)


@pytest.mark.parametrize("name", ["swin", "lsj"])
@pytest.mark.parametrize("left", ["crowds", "nothing"])
def test_images_without_instances_are_mapped(masks, record, name, left):
    masks.INPUT.AUGMENTATION = name
    record["annotations"] = record["annotations"][1:] if left == "crowds" else []
    mapped = RevDatasetMapper(masks, True)(record)
    assert len(mapped["instances"]) == 0
    assert mapped["instances"].image_size == tuple(mapped["image"].shape[1:])


def test_records_are_not_changed(masks, record):
    masks.INPUT.AUGMENTATION = "swin"
    before = repr(record)
    RevDatasetMapper(masks, True)(record)
    assert repr(record) == before


def test_unknown_name_is_an_error(cfg):
    cfg.INPUT.AUGMENTATION = "Swin"
    with pytest.raises(
        ValueError, match="INPUT.AUGMENTATION is 'Swin'; allowed are 'default', 'swin', 'lsj'"
    ):
        RevDatasetMapper(cfg, True)


@pytest.mark.parametrize("name", ["swin", "lsj"])
def test_two_crops_are_an_error(cfg, name):
    cfg.INPUT.AUGMENTATION = name
    cfg.INPUT.CROP.ENABLED = True
    with pytest.raises(ValueError, match=f"'{name}', which crops on its own, but INPUT.CROP.ENABLED is True"):
        RevDatasetMapper(cfg, True)
    RevDatasetMapper(cfg, False)


def test_detectron2s_crop_still_comes_first_by_default(cfg):
    cfg.INPUT.CROP.ENABLED = True
    assert isinstance(RevDatasetMapper(cfg, True).augmentations.augs[0], T.RandomCrop)


@pytest.mark.parametrize(
    "key,value",
    [("SIZE", 0), ("SIZE", -1), ("SCALES", (0.0, 2.0)), ("SCALES", (2.0, 0.1)), ("SCALES", (1.0,))],
)
def test_impossible_jitter_is_an_error(cfg, key, value):
    cfg.INPUT.AUGMENTATION = "lsj"
    cfg.INPUT.LSJ[key] = value
    with pytest.raises(ValueError, match=f"INPUT.LSJ.{key} (is|must be) "):
        RevDatasetMapper(cfg, True)


@pytest.mark.parametrize(
    "key, value",
    [
        ("RANDOM_FLIP", "diagonal"),
        ("MIN_SIZE_TRAIN", ()),
        ("MIN_SIZE_TRAIN", (-1,)),
        ("MIN_SIZE_TRAIN", ("64",)),
        ("MIN_SIZE_TRAIN_SAMPLING", "any"),
        ("MIN_SIZE_TEST", -1),
        ("MAX_SIZE_TRAIN", 0),
        ("MAX_SIZE_TEST", 0),
    ],
)
@pytest.mark.parametrize("is_train", [True, False])
def test_values_that_detectron2_would_fail_on_later_are_named(cfg, key, value, is_train):
    cfg.INPUT[key] = value
    with pytest.raises(ValueError, match=f"INPUT.{key} (is|must be) "):
        RevDatasetMapper(cfg, is_train)


@pytest.mark.parametrize(
    "sizes, valid", [((64, 96), True), ((96, 64), False), ((64,), False), ((1, 2, 3), False)]
)
def test_a_range_of_short_sides_has_two_ends(cfg, sizes, valid):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = sizes, "range"
    if valid:
        RevDatasetMapper(cfg, True)
    else:
        with pytest.raises(ValueError, match="INPUT.MIN_SIZE_TRAIN must be "):
            RevDatasetMapper(cfg, True)


@pytest.mark.parametrize("sizes", [(0,), 64])
def test_no_resize_and_a_single_number_remain_possible(cfg, sizes):
    cfg.INPUT.MIN_SIZE_TRAIN = sizes
    assert isinstance(RevDatasetMapper(cfg, True).augmentations.augs[0], T.ResizeShortestEdge)


@pytest.mark.parametrize(
    "style, size, message",
    [
        ("square", [0.9, 0.9], "INPUT.CROP.TYPE is 'square'"),
        ("relative", [0.9], "INPUT.CROP.SIZE must be two shares"),
        ("relative_range", [-1.0, 2.0], "INPUT.CROP.SIZE must be two shares"),
        ("absolute", [0.9, 0.9], "INPUT.CROP.SIZE must be .* two numbers of pixels"),
        ("absolute_range", [64, 32], "INPUT.CROP.SIZE must be .* the smaller first"),
    ],
)
def test_impossible_crops_are_an_error(cfg, style, size, message):
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, style, size
    with pytest.raises(ValueError, match=message):
        RevDatasetMapper(cfg, True)


def test_missing_shapely_is_an_error_before_training(cfg, monkeypatch):
    monkeypatch.setattr(augmentation, "find_spec", lambda name: None)
    cfg.INPUT.AUGMENTATION = "swin"
    RevDatasetMapper(cfg, True)  # boxes are cropped without it
    cfg.MODEL.MASK_ON = True
    message = "cropping masks needs the package shapely.*pip install shapely"
    with pytest.raises(ValueError, match=message):
        RevDatasetMapper(cfg, True)
    cfg.INPUT.AUGMENTATION, cfg.INPUT.CROP.ENABLED = "default", True
    with pytest.raises(ValueError, match=f"INPUT.CROP.ENABLED is True, and {message}"):
        RevDatasetMapper(cfg, True)
