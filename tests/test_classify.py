"""Classification: the official preprocessing, the head put back, accuracy counted."""

import numpy as np
import pytest
import torch
from image_folder import make_image, save_by_rank, save_images
from PIL import Image
from reference import Vectors, image
from tiny_named import CLASSES, add_tiny_model, save_tiny, tiny_logits

from rev_det.classify import (
    Accuracy,
    ImageFiles,
    load_classifier,
    predict,
    preprocessing,
    read_labels,
)
from rev_det.engine.amp import Precision

FLOAT32 = Precision("cpu")


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    add_tiny_model(monkeypatch)


@pytest.fixture
def classifier(tmp_path):
    return load_classifier(save_tiny(tmp_path / "tiny.pyth"))[0]


@pytest.mark.parametrize("name, seed", [("rev_vit_s", 101), ("rev_mvit_b", 103)])
def test_the_logits_are_the_official_models(name, seed, tmp_path):
    vectors = Vectors(f"parity_{name}.npz")
    state = {key: value.float() for key, value in vectors.state().items()}
    torch.save({"model_state": state}, tmp_path / "file.pyth")
    classifier, weights = load_classifier(tmp_path / "file.pyth")
    assert weights.model == name
    x = image((2, 3, 224, 224), seed)
    with torch.no_grad():
        assert vectors.error("logits", classifier(x.float())) < 1e-5
        assert vectors.error("logits", classifier.double()(x)) < 1e-9


def test_under_autocast_the_head_stays_in_float32(classifier):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = classifier(torch.ones(1, 3, 224, 224))
    assert logits.dtype == torch.float32
    # Not values of bfloat16, which has 8 significant bits.
    assert not torch.equal(logits, logits.bfloat16().float())


def test_a_file_without_a_head_is_an_error_that_names_the_published_one(tmp_path):
    path = save_tiny(tmp_path / "t.pyth", **{"head.projection.weight": None, "head.projection.bias": None})
    with pytest.raises(ValueError, match=r"t\.pyth holds no classifier .* https://example.org/t\.pyth"):
        load_classifier(path)


@pytest.mark.parametrize("width, height", [(500, 300), (300, 500), (256, 256), (100, 90)])
def test_preprocessing_is_the_official_one(width, height):
    picture = make_image(1, width, height)
    # 256 / 224 of the crop on the shorter side, the middle, ImageNet's statistics of RGB.
    scale = 256 / min(width, height)
    resized = picture.resize((int(scale * width), int(scale * height)), Image.Resampling.BICUBIC)
    left, top = (round((side - 224) / 2) for side in resized.size)
    crop = np.asarray(resized, dtype=np.float64)[top : top + 224, left : left + 224] / 255
    expected = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    found = preprocessing()(picture)
    assert tuple(found.shape) == (3, 224, 224)
    assert np.abs(found.numpy() - expected.transpose(2, 0, 1)).max() < 1e-5


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_every_colour_mode_becomes_rgb(mode, tmp_path):
    picture = make_image(1).convert(mode)
    picture.save(tmp_path / "a.tif")
    _, found, problem = ImageFiles([str(tmp_path / "a.tif")])[0]
    assert problem == ""
    assert torch.equal(found, preprocessing()(picture.convert("RGB")))


@pytest.mark.parametrize("workers", [0, 2])
def test_predictions_are_in_the_files_order_whatever_the_batches(classifier, tmp_path, workers):
    paths = save_images(tmp_path / "images", 5)
    batches = list(predict(classifier, ImageFiles(paths), FLOAT32, batch_size=2, workers=workers))
    assert [batch.paths for batch in batches] == [paths[:2], paths[2:4], paths[4:]]
    expected = tiny_logits(torch.stack([preprocessing()(make_image(seed)) for seed in range(5)])).softmax(1)
    found = torch.cat([batch.probabilities for batch in batches])
    assert torch.allclose(found, expected, atol=1e-6)
    assert (expected.max(0).values - expected.min(0).values).max() > 1e-3  # the images do differ


def test_accuracy_counts_first_and_among_five(classifier, tmp_path):
    ranks = [0, 4, 0, 5, 1, 9, 0]
    files = ImageFiles.from_folder(save_by_rank(tmp_path / "val", tiny_logits, ranks), CLASSES)
    accuracy = Accuracy()
    for batch in predict(classifier, files, FLOAT32, batch_size=3):
        accuracy.add(batch)
    assert (accuracy.images, accuracy.top1, accuracy.top5) == (7, 3, 5)
    assert accuracy.unreadable == []


def test_files_that_cannot_be_read_are_named_with_the_reason_and_the_others_counted(classifier, tmp_path):
    folder = save_by_rank(tmp_path / "val", tiny_logits, [0, 0, 7])
    (folder / "n100" / "text.JPEG").write_text("no image")
    whole = next(folder.glob("*/0.JPEG")).read_bytes()
    (folder / "n109" / "cut.JPEG").write_bytes(whole[: len(whole) // 2])
    accuracy = Accuracy()
    for batch in predict(classifier, ImageFiles.from_folder(folder, CLASSES), FLOAT32, batch_size=2):
        accuracy.add(batch)
    assert (accuracy.images, accuracy.top1, accuracy.top5) == (3, 2, 2)
    (text, why_text), (cut, why_cut) = accuracy.unreadable
    assert (text, cut) == (str(folder / "n100/text.JPEG"), str(folder / "n109/cut.JPEG"))
    assert "cannot identify image" in why_text
    assert "truncated" in why_cut


def test_a_batch_of_unreadable_files_only(classifier, tmp_path):
    paths = [str(tmp_path / "absent.jpg")]
    (batch,) = predict(classifier, ImageFiles(paths), FLOAT32)
    assert (batch.paths, tuple(batch.probabilities.shape)) == ([], (0, CLASSES))
    assert batch.unreadable[0][0] == paths[0]


@pytest.mark.parametrize("folders, words", [(9, "val has 9 folders, .* 10 classes"), (10, "no images in")])
def test_a_folder_that_is_not_imagenets_is_an_error(folders, words, tmp_path):
    for i in range(folders):
        (tmp_path / "val" / f"n{i}").mkdir(parents=True)
    with pytest.raises(ValueError, match=words):
        ImageFiles.from_folder(tmp_path / "val", 10)


def test_nothing_to_classify_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*val"):
        ImageFiles.from_folder(tmp_path / "val", 10)
    with pytest.raises(ValueError, match="no images"):
        ImageFiles([])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": -1}])
def test_batches_and_workers_have_bounds(classifier, tmp_path, options):
    files = ImageFiles(save_images(tmp_path / "images", 1))
    with pytest.raises(ValueError, match="at least 1 and workers at least 0: "):
        predict(classifier, files, FLOAT32, **options)


def test_logits_that_are_not_finite_are_an_error_not_a_class(classifier, tmp_path):
    paths = save_images(tmp_path / "images", 1)
    with torch.no_grad():
        classifier.head.weight.mul_(torch.inf)
    with pytest.raises(ValueError, match=r"0\.png .* not finite: .* float32 on cpu"):
        list(predict(classifier, ImageFiles(paths), FLOAT32))


def test_a_batch_that_does_not_fit_into_memory_is_an_error_that_says_so(classifier, tmp_path):
    def fail(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    classifier.forward = fail
    with pytest.raises(ValueError, match="2 images at a time do not fit .* lower --batch-size"):
        list(predict(classifier, ImageFiles(save_images(tmp_path / "images", 2)), FLOAT32))


def test_labels_are_one_on_each_line(tmp_path):
    (tmp_path / "labels.txt").write_text("tench, Tinca\r\n goldfish\n", encoding="utf-8")
    assert read_labels(tmp_path / "labels.txt", 2) == ["tench, Tinca", "goldfish"]
    with pytest.raises(ValueError, match=r"labels\.txt has 2 lines, but the classifier has 3"):
        read_labels(tmp_path / "labels.txt", 3)
    with pytest.raises(FileNotFoundError, match="absent"):
        read_labels(tmp_path / "absent.txt", 3)
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        read_labels(tmp_path / "labels.txt", 1)
