"""What is written: pictures, videos, and JSON that COCO's own tools read."""

import json
import os

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from nano_detector import CATEGORY_IDS, CLASSES, save_image, save_video
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from rev_det.predict import PredictionWriter, check_folder, find_sources, predict, read_frames
from rev_det.predict.classes import named_classes

HEIGHT, WIDTH = 48, 64
NAMED = named_classes(CLASSES, CATEGORY_IDS)


def instances(left=8.0, height=HEIGHT, width=WIDTH) -> Instances:
    """One bee."""
    result = Instances((height, width))
    result.pred_boxes = Boxes(torch.tensor([[left, 4.0, left + 32.0, 44.0]]))
    result.scores = torch.tensor([0.75])
    result.pred_classes = torch.tensor([1])
    result.pred_masks = torch.zeros(1, height, width, dtype=torch.bool)
    result.pred_masks[:, 10:20, 10:30] = True
    return result


def grey_image(path, height=HEIGHT, width=WIDTH) -> str:
    Image.fromarray(np.full((height, width, 3), 128, np.uint8)).save(path)
    return str(path)


def grey_video(path, frames, height=HEIGHT, width=WIDTH) -> str:
    return save_video(path, np.full((frames, height, width, 3), 128, np.uint8))


class OneBee:
    """A detector of one bee in any image, moving by a pixel with every picture; it counts its batches."""

    def __init__(self, before=lambda: None):
        self.before = before
        self.batches = []

    def check(self, image):
        pass

    def __call__(self, images):
        self.before()
        first = sum(self.batches)
        self.batches.append(len(images))
        return [instances(8.0 + first + i, *image.shape[:2]) for i, image in enumerate(images)]


def written(folder, name):
    return json.loads((folder / name).read_text())


def run(paths, folder, batch_size=1, detector=None, classes=NAMED, **options):
    """Detect bees in files; the detector and the failures."""
    detector = detector or OneBee()
    with PredictionWriter(str(folder), classes, **options) as writer:
        failures = predict(detector, find_sources([str(p) for p in paths]), writer, batch_size)
    return detector, failures


def num_frames(path):
    (source,) = find_sources([str(path)])
    return source.num_frames()


def test_the_results_are_cocos_and_its_own_tools_read_them(tmp_path):
    path = grey_image(tmp_path / "photo.png")
    run([path], tmp_path / "out")
    (result,) = written(tmp_path / "out", "predictions.json")
    assert (result["category_id"], result["bbox"], result["score"]) == (7, [8.0, 4.0, 32.0, 40.0], 0.75)
    assert np.array_equal(mask_util.decode(result["segmentation"]), instances().pred_masks[0].numpy())
    coco = COCO(str(tmp_path / "out" / "images.json"))
    loaded = coco.loadRes(str(tmp_path / "out" / "predictions.json"))
    assert [a["image_id"] for a in loaded.loadAnns(loaded.getAnnIds(catIds=[7]))] == [result["image_id"]]
    assert coco.loadImgs([result["image_id"]]) == [
        {"id": result["image_id"], "file_name": path, "height": HEIGHT, "width": WIDTH}
    ]
    found = [(category["id"], category["name"]) for category in coco.loadCats(coco.getCatIds())]
    assert found == list(zip(CATEGORY_IDS, CLASSES, strict=True))


def test_images_of_a_given_file_keep_its_ids_and_others_get_new_ones(tmp_path, dataset_json):
    for folder in ("sub", "other"):
        (tmp_path / folder).mkdir()
    paths = [grey_image(tmp_path / name) for name in ("0.png", "sub/1.png", "other/1.png", "other/2.png")]
    run(paths, tmp_path / "out", dataset_json=dataset_json)
    ids = {image["file_name"]: image["id"] for image in written(tmp_path / "out", "images.json")["images"]}
    assert ids == dict(zip(paths, (41, 40, 42, 43), strict=True))
    paths += [grey_image(tmp_path / "other" / "0.png")]
    with pytest.raises(ValueError, match="/0.png and .*/other/0.png are both the image 41 of --dataset-json"):
        run(paths, tmp_path / "out", dataset_json=dataset_json, pictures=False)


@pytest.mark.parametrize(
    "images",
    ['[{"id": 1}]', '[{"id": "1", "file_name": "1.png"}]', '[{"id": true, "file_name": "1.png"}]', "3"],
)
def test_images_that_cannot_be_used_are_named(tmp_path, images):
    (tmp_path / "a.json").write_text(f'{{"images": {images}}}')
    with pytest.raises(ValueError, match="a.json is not in COCO's format: .*images"):
        PredictionWriter(str(tmp_path / "out"), NAMED, str(tmp_path / "a.json"))


def test_keypoints_are_drawn_where_they_are_and_written_as_coco_counts_pixels(tmp_path):
    (source,) = find_sources([grey_image(tmp_path / "a.png")])
    (frame,) = read_frames(source)
    found = instances()
    found.pred_keypoints = torch.full((1, 17, 3), 20.0)
    with PredictionWriter(str(tmp_path / "out"), NAMED) as writer:
        writer.add(frame, found)
    assert written(tmp_path / "out", "predictions.json")[0]["keypoints"][:3] == [19.5, 19.5, 20.0]


def test_pictures_show_what_was_found_at_the_images_size(tmp_path):
    run([grey_image(tmp_path / "photo.png", 501, 601)], tmp_path / "out")
    picture = np.asarray(Image.open(tmp_path / "out" / "photo.jpg")).astype(int)
    assert picture.shape == (501, 601, 3)
    coloured = np.abs(picture - 128).max(2) > 30
    assert coloured[12:18, 12:28].mean() > 0.5  # the mask
    assert not coloured[200:, 200:].any()


# Beyond four times, Detectron2 could not write labels. It takes masks that are two pixels wide for polygons.
@pytest.mark.parametrize(
    "size, drawn", [((48, 64), (192, 256)), ((150, 224), (300, 448)), ((700, 2), (700, 2)), ((1, 1), (4, 4))]
)
def test_small_pictures_are_enlarged_so_that_labels_are_legible(tmp_path, size, drawn):
    run([grey_image(tmp_path / "a.png", *size)], tmp_path / "out")
    assert Image.open(tmp_path / "out" / "a.jpg").size == drawn[::-1]


def test_videos_become_videos_of_the_same_length_rate_and_size(tmp_path):
    path = grey_video(tmp_path / "clip.avi", 5)
    detector, failures = run([path], tmp_path / "out", batch_size=2)
    assert failures == [] and detector.batches == [2, 2, 1]
    (out,) = find_sources([str(tmp_path / "out" / "clip.mp4")])
    frames = list(read_frames(out))
    assert len(frames) == 5 and frames[0].rate == 12.0 and frames[0].image.shape == (HEIGHT, WIDTH, 3)
    assert all(np.abs(f.image.astype(int) - 128).max() > 60 for f in frames)  # all annotated
    images = written(tmp_path / "out", "images.json")["images"]
    assert [(i["file_name"], i["frame"]) for i in images] == [(path, n) for n in range(5)]
    results = written(tmp_path / "out", "predictions.json")
    assert [r["bbox"][0] for r in results] == [8.0, 9.0, 10.0, 11.0, 12.0]
    assert [r["image_id"] for r in results] == [i["id"] for i in images]


@pytest.mark.parametrize("height, width", [(2, 2), (1, 64)])
def test_videos_of_any_size_are_drawn(tmp_path, height, width):
    run([grey_video(tmp_path / "clip.avi", 3, height, width)], tmp_path / "out")
    assert num_frames(tmp_path / "out" / "clip.mp4") == 3


@pytest.mark.parametrize("pictures", [True, False])
def test_images_and_videos_mix_in_batches_and_keep_their_order(tmp_path, pictures):
    paths = [
        grey_image(tmp_path / "a.png"),
        grey_video(tmp_path / "b.avi", 2),
        grey_video(tmp_path / "c.avi", 3),
    ]
    detector, _ = run(paths, tmp_path / "out", batch_size=4, pictures=pictures)
    assert detector.batches == [4, 2]
    images = written(tmp_path / "out", "images.json")["images"]
    expected = [(0, None), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert [(i["file_name"], i.get("frame")) for i in images] == [(paths[i], n) for i, n in expected]
    drawn = sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".json")
    assert drawn == (["a.jpg", "b.mp4", "c.mp4"] if pictures else [])
    assert [num_frames(tmp_path / "out" / name) for name in drawn[1:]] == [2, 3][: len(drawn)]


def test_what_cannot_be_read_is_returned_and_the_rest_written(tmp_path):
    bad, worse = tmp_path / "bad.jpg", tmp_path / "worse.mp4"
    bad.write_text("no image")
    worse.write_text("no video")
    good = [grey_image(tmp_path / name) for name in ("a.png", "z.png")]
    done = []
    with PredictionWriter(str(tmp_path / "out"), NAMED) as writer:
        sources = find_sources([good[0], str(bad), str(worse), good[1]])
        failures = predict(OneBee(), sources, writer, 2, done.append)
    assert [path for path, _ in failures] == [str(bad), str(worse)]
    assert "cannot identify image file" in failures[0][1]
    assert [i["file_name"] for i in written(tmp_path / "out", "images.json")["images"]] == good
    assert done == [2]


def test_errors_of_the_detector_are_not_taken_for_bad_images_and_leave_earlier_results(tmp_path):
    def fail():
        raise ValueError("not of the image")

    path = grey_image(tmp_path / "a.png")
    run([path], tmp_path / "out")
    with pytest.raises(ValueError, match="not of the image"):
        run([path], tmp_path / "out", detector=OneBee(fail))
    assert len(written(tmp_path / "out", "predictions.json")) == 1


def test_an_interrupted_run_keeps_what_it_has(tmp_path):
    def interrupt():
        if len(bee.batches) == 2:
            # Were it killed here, nothing would look like a whole video.
            assert not list((tmp_path / "out").glob("clip.*"))
            raise KeyboardInterrupt

    bee = OneBee(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run([grey_video(tmp_path / "clip.avi", 4)], tmp_path / "out", detector=bee)
    assert len(written(tmp_path / "out", "predictions.json")) == 2
    assert num_frames(tmp_path / "out" / "clip.mp4") == 2


def test_nothing_found_is_an_empty_list_and_a_picture(tmp_path):
    (source,) = find_sources([grey_image(tmp_path / "a.png")])
    with PredictionWriter(str(tmp_path / "out"), NAMED) as writer:
        writer.add(next(read_frames(source)), instances()[torch.tensor([False])])
    assert written(tmp_path / "out", "predictions.json") == []
    assert (np.abs(np.asarray(Image.open(tmp_path / "out" / "a.jpg")).astype(int) - 128) < 4).all()


ODD = os.fsdecode(b"\xff\n")  # not UTF-8, and more than a line


def test_names_that_are_not_utf8_lose_nothing(tmp_path):
    folder = tmp_path / ODD
    folder.mkdir()
    paths = [grey_image(folder / f"{ODD}.png"), grey_video(folder / f"{ODD}2.avi", 2)]
    _, failures = run(paths, folder / "out", classes=named_classes(["$a$", "\ud800\n", "c"]))
    assert failures == []
    images = written(folder / "out", "images.json")
    assert [image["file_name"] for image in images["images"]] == [paths[0], paths[1], paths[1]]
    assert images["categories"][1]["name"] == "\ud800\n"
    assert len(written(folder / "out", "predictions.json")) == 3
    assert num_frames(folder / "out" / f"{ODD}2.mp4") == 2 and (folder / "out" / f"{ODD}.jpg").exists()


def test_the_longest_names_have_pictures_and_videos(tmp_path):
    stems, out = ["x" * 251, "y" * 251], tmp_path / "out"
    run([grey_image(tmp_path / f"{stems[0]}.png"), grey_video(tmp_path / f"{stems[1]}.avi", 1)], out)
    assert sorted(path.stem for path in out.glob("?" * 255)) == stems


def test_nothing_that_is_read_is_overwritten(tmp_path):
    photo = save_image(tmp_path / "photo.jpg", 0)
    sources = find_sources([photo])
    check_folder(str(tmp_path / "out"), sources, [photo, "https://example.org/w.pth"])
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(
            ValueError, match="would overwrite .*photo.jpg, which is read; name another place"
        ):
            check_folder(str(folder), sources)
    for name in ("images.json", "predictions.json", ".part-images.json"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"would overwrite .*/{name}, which is read"):
            check_folder(str(tmp_path), [], [str(tmp_path / name)])


@pytest.mark.parametrize(
    "folder, message",
    [
        ("file", "--output file cannot be made: .*/file is a file; name another folder"),
        ("file/below", "--output file/below cannot be made: .*/file is a file"),
        ("taken", "--output taken cannot be used: taken/a.jpg is a folder"),
        ("/proc/below", "--output /proc/predictions.json cannot be written to the folder /proc: "),
    ],
)
def test_a_folder_that_takes_no_results_is_named(tmp_path, monkeypatch, folder, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "a.jpg").mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        check_folder(folder, find_sources([grey_image(tmp_path / "a.png")]))


def test_a_batch_of_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--batch-size must be at least 1, got 0"):
        run([], tmp_path / "out", batch_size=0)


def test_a_video_that_cannot_be_written_is_an_error_with_the_reason_and_not_kept(
    tmp_path, full_disk, monkeypatch
):
    noise = np.random.default_rng(0).integers(0, 256, (9, HEIGHT, WIDTH, 3), dtype=np.uint8)
    path, out = save_video(tmp_path / "clip.avi", noise), tmp_path / "out"
    with full_disk(5000), pytest.raises(OSError, match=r"clip\.mp4 cannot be written: \d of 9 frames"):
        run([path], out)
    assert {file.name for file in out.iterdir()} == {"images.json", "predictions.json"}
    monkeypatch.setattr("cv2.VideoWriter.isOpened", lambda self: False, raising=False)
    with pytest.raises(OSError, match="no MPEG-4; --no-pictures writes JSON alone"):
        run([path], out)
    (source,) = find_sources([path])
    with PredictionWriter(str(out), NAMED) as writer:
        for file in out.iterdir():
            file.unlink()
        out.rmdir()
        with pytest.raises(OSError, match=r"clip\.mp4 cannot be written: No such file or directory"):
            writer.add(next(read_frames(source)), instances())
        out.mkdir()
