"""Classification: the official preprocessing, the head put back, images of every kind."""

import numpy as np
import pytest
import torch
from image_folder import make_image, save_images
from PIL import Image
from reference import Vectors, image
from tiny_named import CLASSES, add_tiny_model, save_tiny, tiny_logits, tiny_state

from rev_det.checkpoint.named import NAMED_MODELS, read_geometry
from rev_det.classify import find_validation_images, load_classifier, predict, preprocessing, read_labels
from rev_det.engine.amp import Precision

FLOAT32 = Precision("cpu")
HEAD = {"weight": "head.projection.weight", "bias": "head.projection.bias"}


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    add_tiny_model(monkeypatch)


@pytest.fixture
def classifier(tmp_path):
    return load_classifier(save_tiny(tmp_path / "tiny.pyth"))[0]


# ---- the named models ----


@pytest.mark.parametrize("name", NAMED_MODELS)
def test_a_named_model_has_its_size_its_heads_and_its_file(name):
    named = NAMED_MODELS[name]
    with torch.device("meta"):
        model = named.build()
    assert read_geometry(model.state_dict()).model == name
    assert model.blocks[0].F.attn.num_heads == named.num_heads
    assert model.pos_embed.shape[1] == (56 if name == "rev_mvit_b" else 14) ** 2
    published = {"rev_vit_s": 79.9, "rev_vit_b": 81.8, "rev_mvit_b": 82.9}
    assert named.top1 == published.get(name, 0.0)
    address = f"https://dl.fbaipublicfiles.com/pyslowfast/rev/{name.upper()}.pyth"
    assert named.url == (address if name in published else "")


@pytest.mark.parametrize("name, seed", [("rev_vit_s", 101), ("rev_mvit_b", 103)])
def test_the_logits_are_the_official_models(name, seed, tmp_path):
    vectors = Vectors(f"parity_{name}.npz")
    state = {key: value.float() for key, value in vectors.state().items()}
    torch.save({"model_state": state}, tmp_path / "file.pyth")
    classifier, model, result = load_classifier(tmp_path / "file.pyth")
    assert (model, result.dropped) == (name, [])
    assert not classifier.training
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


@pytest.mark.parametrize(
    "changes, words",
    [
        ({HEAD["bias"]: None}, "1 missing in the file: head.bias"),
        ({HEAD["bias"]: torch.zeros(9)}, r"head.bias \(9,\) in the file, \(10,\) in the model"),
        ({HEAD["weight"]: torch.zeros(10, 32)}, r"\(10, 32\) in the file, \(10, 64\) in the model"),
        ({HEAD["bias"]: torch.full((10,), torch.nan)}, "NaN.* head.bias"),
        ({HEAD["bias"]: torch.zeros(10, dtype=torch.int64)}, "head.bias is int64, allowed .* floating-point"),
        ({"norm.bias": torch.zeros(9)}, r"norm.bias \(9,\) in the file, \(64,\) in the model"),
    ],
)
def test_a_damaged_head_or_backbone_is_an_error(tmp_path, changes, words):
    path = save_tiny(tmp_path / "tiny.pyth", **changes)
    with pytest.raises(ValueError, match=words) as info:
        load_classifier(path)
    assert str(info.value).startswith(path)


def test_a_file_for_none_or_another_of_the_named_models_is_an_error(tmp_path):
    path = save_tiny(tmp_path / "tiny.pyth")
    with pytest.raises(ValueError, match="Another size: the file holds a Rev-ViT-TINY .* is a Rev-ViT-S"):
        load_classifier(path, "rev_vit_s")
    with pytest.raises(ValueError, match="no model 'rev_vit_xl'.*rev_vit_s, rev_vit_b, rev_vit_l"):
        load_classifier(path, "rev_vit_xl")
    other = {key: value for key, value in tiny_state().items() if ".layers.3." not in key}
    with pytest.raises(ValueError, match=r"the state holds a Rev-ViT \(width 32, depth 3\), .* none of the"):
        load_classifier(other)


# ---- images ----


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


@pytest.mark.parametrize("workers", [0, 2])
def test_predictions_are_in_the_files_order_whatever_the_batches_and_colours(classifier, tmp_path, workers):
    paths = save_images(tmp_path / "images", 4)
    pictures = [make_image(seed) for seed in range(4)]
    for mode in ("L", "RGBA", "CMYK", "P"):
        pictures.append(make_image(5).convert(mode))
        paths.append(str(tmp_path / f"{mode}.tif"))
        pictures[-1].save(paths[-1])
    (tmp_path / "text.JPEG").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "images/0.png").read_bytes()[:2000])
    bad = [str(tmp_path / name) for name in ("text.JPEG", "cut.png", "absent.jpg")]
    found = list(predict(classifier, [*bad, *paths], FLOAT32, batch_size=2, workers=workers))
    assert [path for path, _, _ in found] == [*bad, *paths]
    for (_, absent, problem), words in zip(
        found, ("cannot identify", "truncated", "No such file"), strict=False
    ):
        assert words in problem and absent is None
    expected = tiny_logits(torch.stack([preprocessing()(p.convert("RGB")) for p in pictures])).softmax(1)
    assert torch.allclose(
        torch.stack([probabilities for _, probabilities, _ in found[3:]]), expected, atol=1e-6
    )
    assert (expected.max(0).values - expected.min(0).values).max() > 1e-3  # the images do differ


def test_logits_that_are_not_finite_are_an_error_not_a_class(classifier, tmp_path):
    with torch.no_grad():
        classifier.head.weight.mul_(torch.inf)
    with pytest.raises(ValueError, match=r"0\.png .* not finite: .* float32 on cpu"):
        list(predict(classifier, save_images(tmp_path / "images", 1), FLOAT32))


def test_a_batch_that_does_not_fit_into_memory_is_an_error_that_says_so(classifier, tmp_path):
    def fail(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    classifier.forward = fail
    with pytest.raises(ValueError, match="2 images at a time do not fit .* lower --batch-size"):
        list(predict(classifier, save_images(tmp_path / "images", 2), FLOAT32))


@pytest.mark.parametrize("folders, words", [(9, "val has 9 folders, .* 10 classes"), (10, "no images in")])
def test_a_folder_that_is_not_imagenets_is_an_error(folders, words, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*val"):
        find_validation_images(tmp_path / "val", CLASSES)
    for i in range(folders):
        (tmp_path / "val" / f"n{i}").mkdir(parents=True)
    with pytest.raises(ValueError, match=words):
        find_validation_images(tmp_path / "val", CLASSES)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_labels_are_one_on_each_line(tmp_path, encoding):
    (tmp_path / "labels.txt").write_text("tench, Tinca\r\n goldfish\n", encoding=encoding)
    assert read_labels(tmp_path / "labels.txt", 2) == ["tench, Tinca", "goldfish"]
    with pytest.raises(ValueError, match=r"labels\.txt has 2 lines, but the classifier has 3"):
        read_labels(tmp_path / "labels.txt", 3)
    with pytest.raises(FileNotFoundError, match="absent"):
        read_labels(tmp_path / "absent.txt", 3)
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        read_labels(tmp_path / "labels.txt", 1)
