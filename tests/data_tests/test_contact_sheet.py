"""`rev-det data view`: a sheet of annotated images."""

import os

import numpy as np
import pytest
from detectron2.data import Metadata
from PIL import Image

from rev_det.data import contact_sheet
from rev_det_cli import main


@pytest.fixture
def pets(content, write, images):
    """Six grey images: 0 and 1 with a cat and a dog each, 2 with a cat alone, the others bare."""
    content["images"] = [
        {"id": 10 + index, "file_name": f"{index}.png", "height": 40, "width": 60} for index in range(6)
    ]
    for index in range(6):
        Image.new("RGB", (60, 40), (128, 128, 128)).save(os.path.join(images, f"{index}.png"))
    content["annotations"].append(content["annotations"][0] | {"id": 5, "image_id": 12})
    return f"pets={write(content)}:{images}"


@pytest.fixture
def drawn(monkeypatch):
    """The images of the last sheet."""
    names = []
    real = contact_sheet.write_sheet

    def write_sheet(path, tiles, titles):
        names[:] = [title.partition(":")[0] for title in titles]
        real(path, tiles, titles)

    monkeypatch.setattr(contact_sheet, "write_sheet", write_sheet)
    return names


def sheet(pets, path, *options):
    return main(["data", "view", pets, "--output", str(path), *map(str, options)])


def test_annotations_are_drawn_over_their_images(pets, tmp_path, capsys, monkeypatch, drawn):
    # Detectron2's colours are random, and some are nearly grey.
    monkeypatch.setattr("detectron2.utils.visualizer.random_color", lambda **_: np.array([1.0, 0.2, 0.0]))
    assert sheet(pets, tmp_path / "sheet.png") == 0
    assert drawn == ["0.png", "1.png", "2.png"]  # those with instances
    assert capsys.readouterr().out == f"3 images of 'pets' drawn in {tmp_path}/sheet.png\n"
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    assert pixels.shape == (448, 3 * 448, 3)
    for tile in np.split(pixels, 3, axis=1):
        grey = (np.abs(tile - 128) < 4).all(2)
        colour = np.ptp(tile, axis=2) > 40
        assert grey.mean() > 0.2 and colour.mean() > 0.01


def test_only_images_with_the_classes_asked_for(pets, tmp_path, drawn):
    assert sheet(pets, tmp_path / "sheet.jpg", "--classes", "dog") == 0
    assert drawn == ["0.png", "1.png"]


def test_the_seed_chooses(pets, tmp_path, drawn):
    chosen = set()
    for seed in (0, 0, 1, 2, 3, 4):
        assert sheet(pets, tmp_path / "sheet.png", "--num", 2, "--seed", seed) == 0
        assert len(drawn) == 2 and drawn == sorted(drawn)
        chosen.add((seed, *drawn))
    assert len(chosen) == 5  # the same seed, the same images
    assert len({names[1:] for names in chosen}) > 1


def test_without_output_the_picture_has_the_name_of_the_set(pets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "view", pets]) == 0
    assert (tmp_path / "pets.png").is_file()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--num", "0"], "--num must be at least 1"),
        (["--classes", "bird"], "--classes: there is no class 'bird'; there are cat, dog, fox"),
        (["--classes", "fox"], "no image of dataset 'pets' has an instance of fox"),
        (["--output", "sheet.xyz"], "must end with .png or .jpg"),
        (["--output", "nowhere/sheet.png"], "the folder nowhere does not exist"),
    ],
)
def test_arguments_that_do_not_go(pets, content, write, tmp_path, capsys, options, words):
    content["categories"].append({"id": 9, "name": "fox"})
    write(content)
    assert sheet(pets, tmp_path / "sheet.png", *options) == 2
    assert words in capsys.readouterr().err


def test_images_that_cannot_be_drawn_are_named_and_left_out(pets, images, tmp_path, capsys):
    open(os.path.join(images, "1.png"), "w").write("no image")
    Image.new("RGB", (20000, 20)).save(os.path.join(images, "2.png"))
    assert sheet(pets, tmp_path / "sheet.png") == 1
    assert Image.open(tmp_path / "sheet.png").size == (448, 448)
    first, broken, narrow = capsys.readouterr().err.splitlines()
    assert first == "2 of 3 images could not be drawn:"
    assert "1.png: cannot identify image file" in broken
    assert "2.png: it has 20000 x 20 pixels; reduced to 448, nothing is left" in narrow
    open(os.path.join(images, "0.png"), "w").write("no image")
    assert sheet(pets, tmp_path / "other.png") == 2
    assert "no image of dataset 'pets' can be drawn, the first is" in capsys.readouterr().err
    assert not list(tmp_path.glob("*other*"))


# Matplotlib would draw what stands between dollar signs as a formula, and cannot draw half a character.
@pytest.mark.parametrize("name", [r"$\frac{$", "a\ud800"])
def test_names_of_classes_and_images_are_drawn_whatever_they_are(name, tmp_path):
    record = {"annotations": [{"bbox": [2, 2, 20, 20], "bbox_mode": 0, "category_id": 0}]}
    metadata = Metadata(name="any", thing_classes=[name])
    image = np.zeros((40, 60, 3), np.uint8)
    tile = contact_sheet.draw_tile(image, metadata, contact_sheet.Visualizer.draw_dataset_dict, record)
    contact_sheet.write_sheet(str(tmp_path / "sheet.png"), [tile], [name])
    assert tile.any() and metadata.thing_classes == [name]
