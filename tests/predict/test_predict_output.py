"""What is written: pictures, videos, and JSON that COCO's own tools read."""

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from nano_detector import CATEGORY_IDS, CLASSES, save_image
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from rev_det.predict import (
    Classes,
    Frame,
    PredictionWriter,
    check_output,
    find_sources,
    predict,
    read_frames,
)

HEIGHT, WIDTH = 48, 64
GREY = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
CLASS_NAMES = Classes(CLASSES, CATEGORY_IDS)


def instances(box=(8.0, 4.0, 40.0, 44.0), height=HEIGHT, width=WIDTH, keypoints=False) -> Instances:
    """One bee."""
    result = Instances((height, width))
    result.pred_boxes = Boxes(torch.tensor([box]))
    result.scores = torch.tensor([0.75])
    result.pred_classes = torch.tensor([1])
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, 10:20, 10:30] = True
    result.pred_masks = mask
    if keypoints:
        result.pred_keypoints = torch.full((1, 17, 3), 20.0)
    return result


def grey_image(path, height=HEIGHT, width=WIDTH) -> str:
    Image.fromarray(np.full((height, width, 3), 128, np.uint8)).save(path)
    return str(path)


def grey_video(path, frames, rate=10.0, size=(WIDTH, HEIGHT)) -> str:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), rate, size)
    for _ in range(frames):
        writer.write(np.full((size[1], size[0], 3), 128, np.uint8))
    writer.release()
    return str(path)


class Finding:
    """A detector that takes any image, and finds what a function says."""

    def __init__(self, find):
        self.find = find

    def check(self, image):
        pass

    def __call__(self, images):
        return self.find(images)


class OneBee(Finding):
    """Detects one bee, moving by a pixel with every picture, and remembers the sizes of its batches."""

    def __init__(self):
        super().__init__(self.found)
        self.batches = []
        self.seen = 0

    def found(self, images):
        self.batches.append(len(images))
        found = []
        for image in images:
            height, width = image.shape[:2]
            box = (8.0 + self.seen, 4.0, 40.0 + self.seen, 44.0)
            found.append(instances(box, height, width))
            self.seen += 1
        return found


def written(folder, name):
    return json.loads((folder / name).read_text())


def run(paths, folder, batch_size=1, **options):
    """Detect bees in files; the failures."""
    detector = OneBee()
    with PredictionWriter(str(folder), CLASS_NAMES, **options) as writer:
        failures = predict(detector, find_sources([str(p) for p in paths]), writer, batch_size)
    return detector, failures


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
    assert [(c["id"], c["name"]) for c in coco.loadCats(coco.getCatIds())] == [
        (3, "ant"),
        (7, "bee"),
        (8, "cat"),
    ]


def test_images_of_a_given_file_keep_its_ids_and_others_get_new_ones(tmp_path, dataset_json):
    for folder in ("sub", "other"):
        (tmp_path / folder).mkdir()
    paths = [grey_image(tmp_path / name) for name in ("0.png", "sub/1.png", "other/1.png", "other/2.png")]
    run(paths, tmp_path / "out", dataset_json=dataset_json)
    ids = {image["file_name"]: image["id"] for image in written(tmp_path / "out", "images.json")["images"]}
    assert ids == dict(zip(paths, (41, 40, 42, 43), strict=True))


def test_keypoints_are_drawn_where_they_are_and_written_as_coco_counts_pixels(tmp_path):
    (source,) = find_sources([grey_image(tmp_path / "a.png")])
    (frame,) = read_frames(source)
    found = instances(keypoints=True)
    with PredictionWriter(str(tmp_path / "out"), CLASS_NAMES) as writer:
        writer.add(frame, found)
    assert (found.pred_keypoints == 20.0).all()
    assert written(tmp_path / "out", "predictions.json")[0]["keypoints"][:3] == [19.5, 19.5, 20.0]


def test_pictures_show_what_was_found_at_the_images_size(tmp_path):
    run([grey_image(tmp_path / "photo.png", 500, 600)], tmp_path / "out")
    picture = np.asarray(Image.open(tmp_path / "out" / "photo.jpg")).astype(int)
    assert picture.shape == (500, 600, 3)
    coloured = np.abs(picture - 128).max(2) > 30
    assert coloured[12:18, 12:28].mean() > 0.5  # the mask
    assert not coloured[200:, 200:].any()


def test_small_pictures_are_enlarged_so_that_labels_are_legible(tmp_path):
    run([grey_image(tmp_path / "a.png"), grey_image(tmp_path / "b.png", 150, 224)], tmp_path / "out")
    assert Image.open(tmp_path / "out" / "a.jpg").size == (4 * WIDTH, 4 * HEIGHT)
    assert Image.open(tmp_path / "out" / "b.jpg").size == (448, 300)


def test_videos_become_videos_of_the_same_length_rate_and_size(tmp_path):
    path = grey_video(tmp_path / "clip.avi", 5, 12.0)
    detector, failures = run([path], tmp_path / "out", batch_size=2)
    assert failures == [] and detector.batches == [2, 2, 1]
    (out,) = find_sources([str(next((tmp_path / "out").glob("clip.*")))])
    frames = list(read_frames(out))
    assert len(frames) == 5 and frames[0].rate == 12.0
    assert all(np.abs(f.image.astype(int) - 128).max() > 60 for f in frames)  # all annotated
    images = written(tmp_path / "out", "images.json")["images"]
    assert [(i["file_name"], i["frame"]) for i in images] == [(path, n) for n in range(5)]
    results = written(tmp_path / "out", "predictions.json")
    assert [r["bbox"][0] for r in results] == [8.0, 9.0, 10.0, 11.0, 12.0]
    assert [r["image_id"] for r in results] == [i["id"] for i in images]


def test_images_and_videos_mix_in_batches_and_keep_their_order(tmp_path):
    paths = [
        grey_image(tmp_path / "a.png"),
        grey_video(tmp_path / "b.avi", 2),
        grey_video(tmp_path / "c.avi", 3),
    ]
    detector, _ = run(paths, tmp_path / "out", batch_size=4)
    assert detector.batches == [4, 2]
    images = written(tmp_path / "out", "images.json")["images"]
    assert [(i["file_name"], i.get("frame")) for i in images] == [
        (paths[0], None),
        *((paths[1], n) for n in range(2)),
        *((paths[2], n) for n in range(3)),
    ]
    lengths = [s.num_frames() for s in find_sources([str(tmp_path / "out" / "[bc].*")])]
    assert lengths == [2, 3]


def test_what_cannot_be_read_is_returned_and_the_rest_written(tmp_path):
    bad, worse = tmp_path / "bad.jpg", tmp_path / "worse.mp4"
    bad.write_text("no image")
    worse.write_text("no video")
    good = [grey_image(tmp_path / name) for name in ("a.png", "z.png")]
    done = []
    with PredictionWriter(str(tmp_path / "out"), CLASS_NAMES) as writer:
        sources = find_sources([good[0], str(bad), str(worse), good[1]])
        failures = predict(OneBee(), sources, writer, 2, done.append)
    assert [path for path, _ in failures] == [str(bad), str(worse)]
    assert "cannot identify image file" in failures[0][1]
    assert [i["file_name"] for i in written(tmp_path / "out", "images.json")["images"]] == good
    assert sum(done) == 3  # the video has no frames to count


def test_errors_of_the_detector_are_not_taken_for_bad_images_and_leave_earlier_results(tmp_path):
    def failing(images):
        raise ValueError("out of memory")

    path = grey_image(tmp_path / "a.png")
    run([path], tmp_path / "out")
    with pytest.raises(ValueError, match="out of memory"):
        with PredictionWriter(str(tmp_path / "out"), CLASS_NAMES) as writer:
            predict(Finding(failing), find_sources([path]), writer)
    assert len(written(tmp_path / "out", "predictions.json")) == 1


def test_an_interrupted_run_keeps_what_it_has(tmp_path):
    bee = OneBee()

    def interrupted(images):
        if bee.seen == 2:
            # Were it killed here, nothing would look like a whole video.
            assert not list((tmp_path / "out").glob("clip.*"))
            raise KeyboardInterrupt
        return bee(images)

    path = grey_video(tmp_path / "clip.avi", 4)
    with pytest.raises(KeyboardInterrupt):
        with PredictionWriter(str(tmp_path / "out"), CLASS_NAMES) as writer:
            predict(Finding(interrupted), find_sources([path]), writer)
    assert len(written(tmp_path / "out", "predictions.json")) == 2
    (out,) = find_sources([str(tmp_path / "out" / "clip.*")])
    assert out.num_frames() == 2


def test_without_pictures_there_is_json_alone(tmp_path):
    paths = [grey_image(tmp_path / "a.png"), grey_video(tmp_path / "b.avi", 2)]
    run(paths, tmp_path / "out", pictures=False)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"predictions.json", "images.json"}
    assert len(written(tmp_path / "out", "predictions.json")) == 3


def test_nothing_found_is_an_empty_list_and_a_picture(tmp_path):
    with PredictionWriter(str(tmp_path / "out"), CLASS_NAMES) as writer:
        predict(
            Finding(lambda images: [instances()[torch.tensor([False])] for _ in images]),
            find_sources([grey_image(tmp_path / "a.png")]),
            writer,
        )
    assert written(tmp_path / "out", "predictions.json") == []
    assert (np.abs(np.asarray(Image.open(tmp_path / "out" / "a.jpg")).astype(int) - 128) < 4).all()


def test_pictures_never_take_the_place_of_what_they_are_made_of(tmp_path):
    save_image(tmp_path / "photo.jpg", 0)
    sources = find_sources([str(tmp_path)])
    with pytest.raises(ValueError, match="would overwrite .*photo.jpg; name another folder"):
        check_output(str(tmp_path), sources)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        check_output(sources[0].path, sources)
    check_output(str(tmp_path / "out"), sources)


def test_a_file_of_images_without_names_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"images": [{"id": 1}]}')
    with pytest.raises(
        ValueError, match="a.json is not in COCO's format: images need a file_name and a whole"
    ):
        PredictionWriter(str(tmp_path / "out"), CLASS_NAMES, str(tmp_path / "a.json"))


def test_a_batch_of_none_is_refused(tmp_path):
    with PredictionWriter(str(tmp_path / "out"), CLASS_NAMES) as writer:
        with pytest.raises(ValueError, match="--batch-size must be at least 1, got 0"):
            predict(OneBee(), [], writer, 0)


def test_a_video_that_a_full_disk_cuts_short_is_an_error_and_not_kept(tmp_path, full_disk):
    path = grey_video(tmp_path / "clip.avi", 9)
    with full_disk(600), pytest.raises(OSError, match=r"clip\.mp4 cannot be written: \d of 9 frames"):
        run([path], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*clip*"))


def test_a_video_that_no_codec_can_write_is_an_error(tmp_path):
    (source,) = find_sources([grey_video(tmp_path / "clip.avi", 1)])
    with PredictionWriter(str(tmp_path / "out"), CLASS_NAMES) as writer:
        (tmp_path / "out").rmdir()
        with pytest.raises(OSError, match="--no-pictures writes JSON alone"):
            writer.add(Frame(source, GREY, 0, 10.0), instances())
        (tmp_path / "out").mkdir()
