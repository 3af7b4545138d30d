"""`rev-det predict`: from files to pictures and JSON, with a run's detector."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
from detectron2.modeling import GeneralizedRCNN
from nano_detector import save_image, save_video
from PIL import Image
from pycocotools.coco import COCO

from rev_det.predict import Detector, find_sources, read_frames
from rev_det_cli import main


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


def test_where_nothing_is_found_it_says_what_to_try(nano_run, photos, tmp_path, capsys):
    options = ("--no-pictures", "--classes", "bee", "cat", "--threshold", 0.99)
    assert command(nano_run, photos, tmp_path / "out", *options) == 0
    out = capsys.readouterr().out
    assert "0 objects in 3 files: no score for bee, cat is as high as the --threshold of 0.99," in out
    assert "the detector knows ant, bee, cat\n" in out
    # It fails with an IndexError, whatever the images are.
    assert "predictions.json is an empty list, which pycocotools' loadRes cannot load\n" in out
    with pytest.raises(IndexError):
        COCO(str(tmp_path / "out/images.json")).loadRes(str(tmp_path / "out/predictions.json"))


def test_of_a_video_that_is_cut_off_the_frames_that_are_there_are_kept(nano_run, tmp_path, capsys):
    frames = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    path, out = tmp_path / "clip.avi", tmp_path / "out"
    save_video(path, frames)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert command(nano_run, path, out, "--threshold", 0.2, "--batch-size", 4) == 1
    printed, err = capsys.readouterr()
    count = int(re.search(rf"  {path}: (\d+) of the 12 frames that the video announces", err)[1])
    assert 0 < count < 12 and "objects in 1 file (" in printed
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
        (["{photos}", "--run", "{run}", "--dataset-json", "{photos}/0.png"], "0.png is not a text file"),
        (
            ["{photos}", "--run", "{run}", "--opts", "INPUT.MIN_SIZE_TEST", "-5"],
            "INPUT.MIN_SIZE_TEST must be",
        ),
        (
            ["{photos}", "--run", "{run}", "--output", "{photos}/0.png"],
            "0.png is a file; name another folder",
        ),
        (["{photos}", "--run", "{run}", "--output", "{run}/model_final.pth/a"], "model_final.pth is a file"),
    ],
)
def test_what_the_user_can_mend_is_one_line(nano_run, photos, tmp_path, capsys, arguments, words):
    arguments = [word.format(run=nano_run, photos=photos) for word in arguments]
    assert main(["predict", "--device", "cpu", "--output", str(tmp_path / "out"), *arguments]) == 2
    assert re.search(rf"^error: .*{words}.*$", capsys.readouterr().err, re.M)


@pytest.mark.parametrize("what", ["dataset_json", "weights", "config"])
def test_what_a_command_reads_is_not_overwritten(nano_run, dataset_json, photos, tmp_path, capsys, what):
    taken = tmp_path / "images.json"
    paths = {
        "dataset_json": dataset_json,
        "weights": nano_run / "model_final.pth",
        "config": nano_run / "config.yaml",
    }
    shutil.copy(paths[what], taken)
    paths[what] = taken
    options = ("--config-file", paths["config"], "--weights", paths["weights"], "--dataset-json")
    before = taken.read_bytes()
    arguments = ["predict", photos, *options, paths["dataset_json"], "--device", "cpu", "--output", tmp_path]
    assert main([str(argument) for argument in arguments]) == 2
    assert f"would overwrite {taken}, which is read; name another place" in capsys.readouterr().err
    assert taken.read_bytes() == before and sorted(tmp_path.iterdir()) == [taken, photos]


def test_files_that_cannot_be_used_are_named_and_skipped(nano_run, photos, tmp_path, capsys, monkeypatch):
    (photos / "3.png").write_text("no image")
    Image.new("RGB", (900, 2)).save(photos / "1.png")
    Image.new("RGB", (200, 100)).save(photos / "2.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 100 - 1)
    os.mkfifo(tmp_path / "fifo.png")
    more = ("/dev/null", "--run", nano_run, "--device", "cpu", "--output", tmp_path / "out")
    arguments = ["predict", photos, tmp_path / "fifo.png", *more, "--batch-size", 2]
    assert main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert "objects in 1 file" in out and "5 of 6 files could not be read, or not to the end:\n" in err
    assert f"  {photos}/3.png: cannot identify image file as BMP" in err
    assert "/1.png: it has 900 x 2 pixels; reduced to 96, nothing is left of its shorter side" in err
    assert "/2.png: it has 200 x 100 pixels, more than 0 million pixels, or 65500 a side" in err
    assert "/fifo.png is a pipe or a device, not a file" in err and "/dev/null is a pipe or a device" in err
    assert [i["id"] for i in json.loads((tmp_path / "out/images.json").read_text())["images"]] == [1]


def test_images_two_pixels_wide_and_odd_names_are_results_and_lines(nano_run, tmp_path, capsys):
    odd = os.fsdecode(b"\xff\n")
    folder = tmp_path / f"photos{odd}"
    folder.mkdir()
    save_image(folder / f"{odd}.png", 0, height=3, width=2)
    (folder / f"{odd}.gif").write_text("no image")
    assert command(nano_run, folder, folder / "out", "--threshold", 0) == 1
    out, err = capsys.readouterr()
    assert out.endswith(f"written to {tmp_path}/photos\\udcff\\n/out\n")
    assert re.search(r"^  .*/photos\\udcff\\n/\\udcff\\n\.gif: cannot identify image file", err, re.M)
    assert (folder / "out" / f"{odd}_2.jpg").exists()
    assert json.loads((folder / "out" / "predictions.json").read_text())


def test_a_killed_run_keeps_what_it_has(nano_run, photos, tmp_path, monkeypatch):
    real = Detector.__call__

    def kill_at_the_second(self, images):
        if (tmp_path / "out" / "0.jpg").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, images)

    monkeypatch.setattr(Detector, "__call__", kill_at_the_second)
    with pytest.raises(SystemExit) as stop:
        command(nano_run, photos, tmp_path / "out", "--threshold", 0)
    assert stop.value.code == 143
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


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
