"""`rev-det classify`: images, and accuracy on a folder like ImageNet's."""

import re

import pytest
import torch
from image_folder import make_image, save_by_rank, save_images
from tiny_named import add_tiny_model, save_tiny, tiny_logits

from rev_det.classify import preprocessing
from rev_det.cli.classify import compare_with_published
from rev_det.engine.amp import Precision
from rev_det_cli import main


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    add_tiny_model(monkeypatch)
    return save_tiny(tmp_path / "tiny.pyth")


def classify(tiny, *arguments):
    return main(["classify", "--weights", tiny, "--device", "cpu", *map(str, arguments)])


def test_the_best_classes_of_each_image_with_their_names(tiny, tmp_path, capsys):
    paths = save_images(tmp_path / "images", 2)
    (tmp_path / "bad.jpg").write_text("no image")
    labels = [f"class {i}" for i in range(10)]
    (tmp_path / "labels.txt").write_text("\n".join(labels))
    arguments = (tmp_path / "bad.jpg", *paths, "--top", 3, "--labels", tmp_path / "labels.txt")
    assert classify(tiny, *arguments) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    lines = lines[lines.index(paths[0]) :]
    assert [lines[0], lines[4]] == paths
    assert len(lines) == 8
    for seed, found in enumerate((lines[1:4], lines[5:8])):
        expected = tiny_logits(preprocessing()(make_image(seed))[None])[0].softmax(0).topk(3)
        for line, value, index in zip(found, *expected, strict=True):
            shown, number, name = re.fullmatch(r" +(\d+\.\d\d) % +(\d+)  (.+)", line).groups()
            assert (int(number), name) == (int(index), labels[int(index)])
            assert float(shown) == pytest.approx(100 * float(value), abs=0.0051)
    assert err.startswith(f"1 of 3 images could not be read:\n  {tmp_path}/bad.jpg: ")


def test_without_names_there_are_numbers(tiny, tmp_path, capsys):
    assert classify(tiny, *save_images(tmp_path / "images", 1)) == 0
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert all(re.fullmatch(r" +\d+\.\d\d % +\d", line) for line in lines)


def test_accuracy_beside_the_published_one(tiny, tmp_path, capsys):
    folder = save_by_rank(tmp_path / "val", tiny_logits, [0, 4, 0, 5, 1, 9, 0, 0])
    (folder / "n103" / "bad.JPEG").write_text("no image")
    assert classify(tiny, "--imagenet", folder, "--batch-size", 3) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-3:] == [
        "measured here: top-1 50.00 %, top-5 75.00 % (8 images, float32 on cpu)",
        "published:     top-1 12.3 % (by the authors' model table)",
        "not to be compared: the published figure is for ImageNet's 50,000 validation images",
    ]
    assert "classify: 100%" in err and " 9/9 " in err
    assert f"1 of 9 images could not be read:\n  {folder}/n103/bad.JPEG: " in err


def test_nothing_is_measured_where_nothing_can_be_read(tiny, tmp_path, capsys):
    for i in range(10):
        (tmp_path / "val" / f"n{i}").mkdir(parents=True)
    (tmp_path / "val" / "n3" / "bad.JPEG").write_text("no image")
    assert classify(tiny, "--imagenet", tmp_path / "val") == 1
    out, err = capsys.readouterr()
    assert "measured here" not in out
    assert "1 of 1 images could not be read" in err


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mixed_precision_is_said_and_finds_the_same(tiny, tmp_path, capsys, device):
    folder = save_by_rank(tmp_path / "val", tiny_logits, [0] * 4 + [9] * 4)
    assert main(["classify", "--weights", tiny, "--imagenet", str(folder), "--amp", "--device", device]) == 0
    # The first place may be close.
    line = rf"^measured here: .* top-5 50\.00 % \(8 images, b?float16 on {device}\)$"
    assert re.search(line, capsys.readouterr().out, re.MULTILINE)


def test_classes_that_are_equally_probable_are_no_hits(tmp_path, monkeypatch, capsys):
    add_tiny_model(monkeypatch)
    zeros = {"head.projection.weight": torch.zeros(10, 64), "head.projection.bias": torch.zeros(10)}
    folder = save_by_rank(tmp_path / "val", tiny_logits, [0, 1, 2, 3])
    for i, name in enumerate(sorted(folder.glob("*/*.JPEG"))):
        name.rename(folder / "n109" / f"{i}.JPEG")
    assert classify(save_tiny(tmp_path / "zeros.pyth", **zeros), "--imagenet", folder) == 0
    assert "top-1 0.00 %, top-5 0.00 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    "model, published",
    [
        ("rev_vit_s", "top-1 79.9 % (by the authors' model table)"),
        ("rev_mvit_b", "top-1 82.9 % (by the authors' model table; the paper says 82.5)"),
        ("rev_vit_l", "none for rev_vit_l"),
    ],
)
def test_the_published_figures_on_the_whole_set(model, published):
    ranks = [0] * 40_905 + [4] * 6_875 + [5] * 2_220
    assert compare_with_published(ranks, model, Precision("cuda", torch.float16)).splitlines() == [
        "measured here: top-1 81.81 %, top-5 95.56 % (50,000 images, float16 on cuda)",
        f"published:     {published}",
    ]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "either IMAGE files .* or --imagenet"),
        (["a.jpg", "--imagenet", "val"], "either IMAGE files .* or --imagenet"),
        (["--imagenet", "nowhere"], "there is no folder nowhere"),
        (["a.jpg", "--top", "11"], "--top must be 1 to 10, .*; got 11"),
        (["a.jpg", "--top", "0"], "--top must be 1 to 10"),
        (["a.jpg", "--device", "cuda:99"], "--device is 'cuda:99'; allowed on this machine are .*cpu"),
        (["a.jpg", "--batch-size", "0"], "--batch-size must be .* at least 1, got 0"),
        (["a.jpg", "--workers", "-1"], "--workers must be .* at least 0, got -1"),
        (["a.jpg", "--labels", "absent.txt"], "no file absent.txt"),
    ],
)
def test_arguments_that_do_not_go(tiny, arguments, words, capsys):
    assert main(["classify", "--weights", tiny, *arguments]) == 2
    assert re.fullmatch(rf"error: .*{words}.*\n", capsys.readouterr().err)


def test_a_file_without_a_head_is_an_error_that_names_the_published_one(tiny, tmp_path, capsys):
    path = save_tiny(tmp_path / "t.pyth", **{"head.projection.weight": None, "head.projection.bias": None})
    assert classify(path, "a.jpg") == 2
    words = r"error: .*t\.pyth holds no classifier .* https://example.org/t\.pyth\n"
    assert re.fullmatch(words, capsys.readouterr().err)
