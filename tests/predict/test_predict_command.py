"""`rev-det predict`: from files to pictures and JSON, with a run's detector."""

import json
import re

import cv2
import numpy as np
import pytest
from detectron2.modeling import GeneralizedRCNN
from nano_detector import save_image
from PIL import Image
from pycocotools.coco import COCO

from rev_det.cli import main
from rev_det.predict import Detector, find_sources, read_frames


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        save_image(folder / f"{index}.png", index)
    return folder


def command(run, photos, out, *options):
    arguments = ["predict", photos, "--run", run, "--device", "cpu", "--output", out, *options]
    return main([str(argument) for argument in arguments])


def test_pictures_and_results_of_a_folder(nano_run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(nano_run, photos, out, "--threshold", 0.2, "--batch-size", 2) == 0
    assert {p.name for p in out.iterdir()} == {"0.jpg", "1.jpg", "2.jpg", "predictions.json", "images.json"}
    results = json.loads((out / "predictions.json").read_text())
    printed, err = capsys.readouterr()
    line = f"{len(results)} objects in 3 files ("
    assert line in printed and f"written to {out}" in printed
    assert re.search(r"predict and draw \(float32 on cpu\): 100%.* 3/3", err)
    counts = {name: int(n) for name, n in re.findall(r"(ant|bee|cat): (\d+)", printed.split(line)[1])}
    ids = {"ant": 3, "bee": 7, "cat": 8}
    assert counts == {n: c for n, i in ids.items() if (c := sum(r["category_id"] == i for r in results))}


def test_pictures_of_earlier_calls_are_not_passed_over(nano_run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(nano_run, photos, out) == 0
    assert command(nano_run, photos, out) == 0
    assert "also holds" not in capsys.readouterr().out
    (photos / "0.png").unlink()
    assert command(nano_run, photos, out) == 0
    assert f"{out} also holds 1 picture that this call has not written\n" in capsys.readouterr().out


def test_chosen_classes_alone(nano_run, photos, tmp_path):
    assert command(nano_run, photos, tmp_path / "out", "--threshold", 0.2, "--classes", "bee", "cat") == 0
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {r["category_id"] for r in results} <= {7, 8} and results


def test_where_nothing_is_found_the_highest_score_says_what_to_try(nano_run, photos, tmp_path, capsys):
    (photos / "0.png").write_text("no image")
    options = ("--no-pictures", "--classes", "bee", "cat")
    assert command(nano_run, photos, tmp_path / "all", *options, "--threshold", 0) == 1
    results = json.loads((tmp_path / "all" / "predictions.json").read_text())
    best = max(result["score"] for result in results)
    capsys.readouterr()
    assert command(nano_run, photos, tmp_path / "out", *options, "--threshold", 0.99) == 1
    out = capsys.readouterr().out
    assert "0 objects in 2 files\n" in out
    assert f"no score for bee, cat is as high as the --threshold of 0.99: the highest is {best:.3f}," in out
    assert "the detector knows ant, bee, cat\n" in out
    # It fails with an IndexError, whatever the images are.
    assert "predictions.json is an empty list, which pycocotools' loadRes cannot load\n" in out
    with pytest.raises(IndexError):
        COCO(str(tmp_path / "out/images.json")).loadRes(str(tmp_path / "out/predictions.json"))


def test_one_bad_image_is_reported_at_the_end_and_skipped(nano_run, photos, tmp_path, capsys):
    (photos / "1.png").write_text("no image")
    assert command(nano_run, photos, tmp_path / "out", "--no-pictures") == 1
    out, err = capsys.readouterr()
    assert "objects in 2 files" in out
    reason = "cannot identify image file as BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP"
    assert f"1 of 3 files could not be read, or not to the end:\n  {photos}/1.png: {reason}\n" in err
    images = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [image["file_name"] for image in images] == [f"{photos}/0.png", f"{photos}/2.png"]


def test_of_a_video_that_is_cut_off_the_frames_that_are_there_are_kept(nano_run, tmp_path, capsys):
    path, out = tmp_path / "clip.avi", tmp_path / "out"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12.0, (64, 48))
    for seed in range(12):
        writer.write(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    writer.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert command(nano_run, path, out, "--threshold", 0.2, "--batch-size", 4) == 1
    printed, err = capsys.readouterr()
    count = int(re.search(rf"  {path}: (\d+) of the 12 frames that the video announces", err)[1])
    assert 0 < count < 12 and "objects in 1 file (" in printed and " 12/12 " in err
    truth = COCO(str(out / "images.json"))
    assert [image["frame"] for image in truth.dataset["images"]] == list(range(count))
    assert truth.loadRes(str(out / "predictions.json")).getImgIds() == truth.getImgIds()
    (video,) = find_sources([str(out / "clip.mp4")])
    assert len(list(read_frames(video))) == count


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere.jpg", "--run", "{run}"], "nowhere.jpg does not exist"),
        (["{photos}"], "name a detector: --run"),
        (["{photos}", "--run", "{run}", "--classes", "dog"], "no class 'dog'"),
        (["{photos}", "--run", "{run}", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["{photos}", "--config", "mask_rcnn_rev_vit_b_fpn_3x"], "--weights is missing"),
    ],
)
def test_what_the_user_can_mend_is_one_line(nano_run, photos, tmp_path, capsys, arguments, words):
    arguments = [word.format(run=nano_run, photos=photos) for word in arguments]
    assert main(["predict", *arguments, "--device", "cpu", "--output", str(tmp_path / "out")]) == 2
    assert re.search(rf"^error: .*{words}.*$", capsys.readouterr().err, re.M)


def test_extreme_images_are_named_and_skipped(nano_run, photos, tmp_path, capsys, monkeypatch):
    Image.new("RGB", (900, 2)).save(photos / "1.png")
    Image.new("RGB", (200, 100)).save(photos / "2.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 100 - 1)
    assert command(nano_run, photos, tmp_path / "out", "--batch-size", 2) == 1
    out, err = capsys.readouterr()
    assert "objects in 1 file" in out and "2 of 3 files could not be read, or not to the end:\n" in err
    assert "/1.png: it has 900 x 2 pixels; reduced to 96, nothing is left of its shorter side" in err
    assert "/2.png: it has 200 x 100 pixels, more than 0 million pixels, or 65500 a side" in err
    assert [i["id"] for i in json.loads((tmp_path / "out/images.json").read_text())["images"]] == [1]


def test_an_image_that_does_not_fit_into_memory_is_named_and_skipped(
    nano_run, photos, tmp_path, capsys, monkeypatch
):
    save_image(photos / "1.png", 1, height=80)
    prepare = Detector._prepare

    def fail_later(self, image):
        prepared = prepare(self, image)
        return prepared | ({"image": None} if image.shape[0] == 80 else {})

    def run_out(self, inputs):
        if any(item["image"] is None for item in inputs):
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
            )
        return real(self, inputs)

    real = GeneralizedRCNN.forward
    monkeypatch.setattr(Detector, "_prepare", fail_later)
    monkeypatch.setattr(GeneralizedRCNN, "forward", run_out)
    assert command(nano_run, photos, tmp_path / "out", "--threshold", 0.2) == 1
    out, err = capsys.readouterr()
    assert "objects in 2 files" in out
    assert "1 of 3 files could not be read, or not to the end:\n" in err
    assert f"  {photos}/1.png: the image does not fit into memory\n" in err
    assert command(nano_run, photos, tmp_path / "out", "--batch-size", 3) == 2
    assert "error: 3 images at a time do not fit into memory; lower --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[" * 100_000, '{"images": [{"id": "1", "file_name": "1.png"}]}', "[]"])
def test_a_file_with_ids_that_is_none_is_named(nano_run, photos, tmp_path, capsys, content):
    (tmp_path / "ids.json").write_text(content)
    assert command(nano_run, photos, tmp_path / "out", "--dataset-json", tmp_path / "ids.json") == 2
    assert re.search(r"^error: .*ids\.json is not", capsys.readouterr().err, re.M)
