"""Config keys that follow from the data: registration, number of classes, mask format."""

import os

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from rev_det.config import add_rev_det_config
from rev_det.data import (
    class_names,
    register_datasets,
    resolve_mask_format,
    resolve_num_classes,
)

ROOT = os.path.join(os.path.dirname(__file__), "..", "..")
RLE = {"size": [40, 60], "counts": [100, 200, 2100]}


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_rev_det_config(cfg)
    cfg.MODEL.MASK_ON = True
    return cfg


@pytest.fixture
def pets(cfg, content, write, images):
    """A config that trains and tests on ``content``."""
    cfg.DATASETS.COCO_JSON = [["pets", write(content), images]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("pets",)
    return cfg


def test_entries_are_registered_in_any_number_of_calls(pets):
    for _ in range(2):
        register_datasets(pets)
    assert class_names(["pets"]) == ["cat", "dog"]


def test_entries_may_come_from_the_command_line(cfg, content, write, images):
    entries = str([["pets", write(content), images]])
    cfg.merge_from_list(["DATASETS.COCO_JSON", entries, "DATASETS.TRAIN", "('pets',)"])
    register_datasets(cfg)
    assert len(DatasetCatalog.get("pets")) == 2


@pytest.mark.parametrize(
    "entry", ["pets", ["pets"], ["pets", "a"], ["pets", "a", "b", "c"], ["pets", 1, "b"], ["", "a", "b"]]
)
def test_malformed_entry_is_shown_with_the_form(cfg, entry):
    cfg.DATASETS.COCO_JSON = [entry]
    with pytest.raises(ValueError, match=r"DATASETS\.COCO_JSON .*expected \[\[NAME, JSON, IMAGES\]"):
        register_datasets(cfg)


def test_one_bad_entry_registers_none(pets):
    pets.DATASETS.COCO_JSON.append(["more"])
    with pytest.raises(ValueError, match="more"):
        register_datasets(pets)
    assert "pets" not in DatasetCatalog


def test_names_of_the_generated_sets_are_reserved(pets):
    pets.DATASETS.COCO_JSON[0][0] = "shapes_val"
    with pytest.raises(ValueError, match="'shapes_val' belongs to a generated set"):
        register_datasets(pets)


def test_unused_dataset_is_reported(pets, caplog):
    pets.DATASETS.TRAIN = pets.DATASETS.TEST = ()
    with caplog.at_level("WARNING", logger="rev_det"):
        register_datasets(pets)
    assert "'pets' is registered, but DATASETS.TRAIN and .TEST do not name it" in caplog.text


def test_generated_set_is_drawn_below_the_datasets_folder_when_used(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    # Another test may have used it.
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "shapes_val" in catalog:
            catalog.remove("shapes_val")
    register_datasets(cfg)
    assert not os.listdir(tmp_path)
    cfg.DATASETS.TEST = ("shapes_val",)
    for _ in range(2):
        register_datasets(cfg)
    assert os.listdir(tmp_path / "shapes" / "val" / "images")
    assert not (tmp_path / "shapes" / "train").exists()
    assert class_names(["shapes_val"]) == ["circle", "square", "triangle"]
    assert len(DatasetCatalog.get("shapes_val")) == 80
    resolve_num_classes(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3


def test_default_number_of_classes_is_taken_from_the_data(pets, caplog):
    register_datasets(pets)
    with caplog.at_level("INFO", logger="rev_det"):
        resolve_num_classes(pets)
    assert pets.MODEL.ROI_HEADS.NUM_CLASSES == pets.MODEL.RETINANET.NUM_CLASSES == 2
    assert "MODEL.ROI_HEADS.NUM_CLASSES = 2, from dataset 'pets'" in caplog.text


@pytest.mark.parametrize("head", ["ROI_HEADS", "RETINANET"])
def test_number_of_classes_that_disagrees_is_an_error(pets, head):
    register_datasets(pets)
    pets.MODEL[head].NUM_CLASSES = 5
    with pytest.raises(ValueError, match=rf"MODEL\.{head}\.NUM_CLASSES is 5, but .* 2 classes \(cat, dog\)"):
        resolve_num_classes(pets)


def test_training_and_test_classes_must_be_the_same(pets, content, write, images):
    content["categories"][0]["name"] = "wolf"
    pets.DATASETS.COCO_JSON.append(["wolves", write(content, "wolves.json"), images])
    pets.DATASETS.TEST = ("wolves",)
    register_datasets(pets)
    with pytest.raises(
        ValueError, match="'pets' and 'wolves' have different classes: .*dog.* against .*wolf"
    ):
        resolve_num_classes(pets)


def test_same_classes_as_a_builtin_set_are_checked_not_taken(cfg, content, write, images):
    names = MetadataCatalog.get("coco_2017_val").thing_classes
    content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    cfg.DATASETS.COCO_JSON = [["mine", write(content), images]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine",), ("coco_2017_val",)
    register_datasets(cfg)
    resolve_num_classes(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 81
    with pytest.raises(ValueError, match=r"is 81.* has 80 classes \(person, bicycle, .* and 75 more\)"):
        resolve_num_classes(cfg)


def test_builtin_datasets_alone_are_left_to_detectron2(cfg):
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    resolve_num_classes(cfg)
    resolve_mask_format(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5


def test_unknown_dataset_is_an_error_that_shows_the_form(cfg):
    cfg.DATASETS.TRAIN = ("nowhere",)
    with pytest.raises(ValueError, match="'nowhere' is not registered; give --dataset nowhere=JSON:IMAGES"):
        resolve_num_classes(cfg)
    assert "nowhere" not in MetadataCatalog


def test_class_names_of_no_dataset_are_an_error():
    with pytest.raises(ValueError, match=r"no dataset given; set DATASETS\.TRAIN"):
        class_names([])


def test_dataset_without_class_names_is_an_error():
    DatasetCatalog.register("unnamed", list)
    with pytest.raises(ValueError, match="'unnamed' has no class names"):
        class_names(["unnamed"])


@pytest.mark.parametrize(("iscrowd", "expected"), [(0, "bitmask"), (1, "polygon")])
def test_run_length_encodings_choose_bitmasks_unless_crowds(pets, content, write, caplog, iscrowd, expected):
    content["annotations"][0].update(segmentation=RLE, iscrowd=iscrowd)
    write(content)
    register_datasets(pets)
    with caplog.at_level("INFO", logger="rev_det"):
        resolve_mask_format(pets)
    assert pets.INPUT.MASK_FORMAT == expected
    assert ("INPUT.MASK_FORMAT = bitmask" in caplog.text) == (expected == "bitmask")


def test_run_length_encodings_of_a_test_set_do_not_matter(pets, content, write, images):
    content["annotations"][0]["segmentation"] = RLE
    pets.DATASETS.COCO_JSON.append(["held_out", write(content, "held_out.json"), images])
    pets.DATASETS.TEST = ("held_out",)
    register_datasets(pets)
    resolve_mask_format(pets)
    assert pets.INPUT.MASK_FORMAT == "polygon"


@pytest.mark.parametrize("missing", [1, 4])
def test_masks_without_segmentations_are_an_error(pets, content, write, missing):
    for annotation in content["annotations"][:missing]:
        annotation["segmentation"] = []
    write(content)
    register_datasets(pets)
    with pytest.raises(ValueError, match=rf"{missing} of the 4 instances .*'pets' .*MODEL\.MASK_ON False"):
        resolve_mask_format(pets)
    pets.MODEL.MASK_ON = False
    resolve_mask_format(pets)


@pytest.mark.parametrize("mask_on", [True, False])
def test_an_unknown_mask_format_is_an_error(pets, mask_on):
    pets.MODEL.MASK_ON, pets.INPUT.MASK_FORMAT = mask_on, "rle"
    with pytest.raises(ValueError, match="INPUT.MASK_FORMAT is 'rle'; allowed are 'polygon', 'bitmask'"):
        resolve_mask_format(pets)
