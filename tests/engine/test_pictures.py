"""The curves and the sheet of predictions."""

import json

import matplotlib.image
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from rev_det import add_rev_det_config
from rev_det.engine import draw_curves, draw_predictions, pictures
from rev_det.engine.metrics import end_last_line, read_metrics


def write_metrics(path, iterations, **values):
    lines = [json.dumps({"iteration": iteration, **values}) for iteration in iterations]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_records_of_a_run_that_was_given_up_are_left_out(tmp_path):
    path = write_metrics(tmp_path / "metrics.json", [19, 39, 59, 39, 59, 79], lr=1.0)
    assert [record["iteration"] for record in read_metrics(path)] == [19, 39, 59, 79]
    path = write_metrics(tmp_path / "metrics.json", [19, 39, 59, 19, 39], lr=1.0)
    assert [record["iteration"] for record in read_metrics(path)] == [19, 39]


def test_what_is_measured_now_and_then_joins_the_progress_around_it(tmp_path):
    path = tmp_path / "metrics.json"
    # As Detectron2 writes it: progress, then what is older; and a line that a killed run did not finish.
    lines = [
        '{"iteration": 19, "lr": 1}',
        '{"iteration": 39, "lr": 1}',
        '{"iteration": 29, "x": 5}',
        '{"iterat',
    ]
    path.write_text("\n".join(lines))
    end_last_line(str(path))
    with open(path, "a") as file:
        file.write('{"iteration": 59, "lr": 1}\n{"iteration": 59, "bbox/AP": 7}\n')
    assert read_metrics(str(path)) == [
        {"iteration": 19, "lr": 1},
        {"iteration": 29, "x": 5},
        {"iteration": 39, "lr": 1},
        {"iteration": 59, "lr": 1, "bbox/AP": 7},
    ]
    before = path.read_bytes()
    end_last_line(str(path))
    end_last_line(str(tmp_path / "absent.json"))
    assert path.read_bytes() == before


def test_curves_show_whatever_metrics_there_are(tmp_path):
    picture = tmp_path / "curves.png"
    several_sets = {"a/bbox/AP": 40.0, "b/bbox/AP": 20.0, "b/segm/AP": float("nan")}
    draw_curves(
        write_metrics(
            tmp_path / "metrics.json", [19, 39], total_loss=1.0, loss_cls=0.5, lr=0.1, **several_sets
        ),
        str(picture),
    )
    with_metrics = matplotlib.image.imread(picture)
    draw_curves(write_metrics(tmp_path / "metrics.json", [1], lr=0.1), str(picture))
    assert with_metrics.shape == matplotlib.image.imread(picture).shape == (480, 1500, 4)
    assert not np.array_equal(with_metrics, matplotlib.image.imread(picture))


def test_points_at_the_ends_and_legends_hide_nothing(tmp_path, monkeypatch):
    figures = []
    real = pictures.Figure
    monkeypatch.setattr(pictures, "Figure", lambda *a, **kw: figures.append(real(*a, **kw)) or figures[-1])
    values = {"loss_cls": 0.5, "total_loss": 1.0, "lr": 0.1, "bbox/AP": 0.0, "segm/AP": 100.0}
    draw_curves(write_metrics(tmp_path / "metrics.json", [0, 100], **values), str(tmp_path / "curves.png"))
    for axes in figures[0].axes:
        frame = axes.get_window_extent()
        assert not frame.overlaps(axes.get_legend().get_window_extent())
    _, _, precision = figures[0].axes
    frame = precision.get_window_extent()
    for line in precision.lines:
        assert (
            np.abs(precision.transData.transform(line.get_xydata())[:, None] - frame.get_points()) > 3
        ).all()


def test_curves_of_nothing_are_an_error(tmp_path):
    (tmp_path / "metrics.json").write_text("")
    with pytest.raises(ValueError, match="metrics.json holds no records"):
        draw_curves(str(tmp_path / "metrics.json"), str(tmp_path / "curves.png"))


class OneBox(torch.nn.Module):
    """Predicts the box (4, 4, 28, 28) with one score, whatever it sees."""

    def __init__(self, score: float):
        super().__init__()
        self.score = score

    def forward(self, inputs):
        assert not self.training
        result = Instances((inputs[0]["height"], inputs[0]["width"]))
        result.pred_boxes = Boxes(torch.tensor([[4.0, 4.0, 28.0, 28.0]]))
        result.scores = torch.tensor([self.score])
        result.pred_classes = torch.tensor([0])
        return [{"instances": result}]


@pytest.fixture
def grey_images(tmp_path):
    """Three plain grey images; the last alone has an annotation."""
    records = []
    for index in range(3):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (32, 32), (128, 128, 128)).save(path)
        box = {"bbox": [4, 4, 28, 28], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        annotations = [box] if index == 2 else []
        records.append(
            {"file_name": str(path), "image_id": index, "height": 32, "width": 32, "annotations": annotations}
        )
    DatasetCatalog.register("grey", lambda: records)
    MetadataCatalog.get("grey").thing_classes = ["box"]
    yield "grey"
    DatasetCatalog.remove("grey")
    MetadataCatalog.remove("grey")


def is_grey(picture: np.ndarray) -> bool:
    """Whether the middle of a tile, away from its title and borders, is plain."""
    height, width = picture.shape[:2]
    middle = picture[height // 4 : -height // 8, width // 8 : -width // 8, :3]
    return bool((np.abs(middle - middle[0, 0]) < 0.05).all())


def sheet(dataset: str, path, score: float, **options) -> list[np.ndarray]:
    """The columns of the sheet for a model that predicts one box."""
    cfg = get_cfg()
    add_rev_det_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    model = OneBox(score).train()
    draw_predictions(cfg, model, dataset, str(path), **options)
    assert model.training
    picture = matplotlib.image.imread(path)
    return np.array_split(picture, picture.shape[1] // 448, axis=1)


def test_the_truth_is_to_the_left_of_predictions_that_are_certain_enough(grey_images, tmp_path):
    truth, predictions = sheet(grey_images, tmp_path / "sheet.png", score=0.9, num_images=1)
    assert not is_grey(truth)
    assert not is_grey(predictions)
    truth, predictions = sheet(grey_images, tmp_path / "sheet.png", score=0.3, num_images=1)
    assert not is_grey(truth)
    assert is_grey(predictions)


def test_annotated_images_come_first_and_the_others_are_not_refused(grey_images, tmp_path):
    columns = sheet(grey_images, tmp_path / "sheet.png", score=0.3)
    assert len(columns) == 4
    first_rows = [column[: len(column) // 2] for column in columns]
    assert [is_grey(tile) for tile in first_rows] == [False, True, True, True]


def test_images_that_cannot_be_drawn_are_left_out_by_name(grey_images, tmp_path, caplog):
    Image.new("RGB", (900, 1)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_text("no image")
    assert len(sheet(grey_images, tmp_path / "sheet.png", score=0.3)) == 2
    assert "0.png is left out of" in caplog.text and "1.png is left out of" in caplog.text
    assert "it has 900 x 1 pixels; reduced to 448, nothing is left" in caplog.text


def test_a_model_without_instances_has_no_picture(grey_images, tmp_path):
    cfg = get_cfg()
    add_rev_det_config(cfg)
    cfg.MODEL.DEVICE = "cpu"

    class Proposals(torch.nn.Module):
        def forward(self, inputs):
            return [{"proposals": None}]

    assert not draw_predictions(cfg, Proposals(), grey_images, str(tmp_path / "sheet.png"))
    assert not (tmp_path / "sheet.png").exists()


def test_lines_that_are_no_records_are_left_out_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.json"
    damaged = [b"[1]", b'{"lr": 1}', b'{"iteration": "x"}', b'{"iteration": true}', b"\xff\x00", b"[" * 9999]
    good = b'{"iteration": 3, "lr": 1, "loss": "text", "total_loss": null}'
    path.write_bytes(b"\n".join([*damaged, good, b'{"iteration": 4, "x": %s}' % (b"9" * 5000)]))
    assert read_metrics(str(path)) == [{"iteration": 3, "lr": 1}]
    assert "metrics.json: 7 lines are damaged or incomplete" in caplog.text
