"""Pictures of a training run: its curves, and predictions beside the ground truth."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_context
from detectron2.utils.visualizer import Visualizer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from ..data import RevDatasetMapper
from ..data.contact_sheet import draw_tile, write_sheet
from ..data.images import read_rgb
from ..files import printable, write_whole
from .amp import Precision
from .metrics import read_metrics

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

# Detectron2's names of the metrics that are drawn.
_AP = {"bbox/AP": "box AP", "segm/AP": "mask AP"}


def draw_curves(metrics_path: str, path: str) -> None:
    """Draw losses, learning rate, AP and, if it was checked, the inversion error over iterations as a PNG.

    Args:
        metrics_path: a ``metrics.json``.
        path: the picture to write.

    Raises:
        ValueError: the file holds no records.
    """
    records = read_metrics(metrics_path)
    if not records:
        raise ValueError(f"{metrics_path} holds no records to draw")
    names = sorted({name for record in records for name in record})
    inversion = [name for name in names if name.startswith("inversion_error/")]
    panels = 4 if inversion else 3
    # Outside pyplot's global state, which other code may be using.
    figure = Figure((5 * panels, 4.8), layout="constrained")
    losses, rate, precision, *rest = figure.subplots(1, panels)

    for name in (name for name in names if name.startswith("loss")):
        _plot(losses, records, name, linewidth=1)
    _plot(losses, records, "total_loss", color="black", linewidth=2)
    losses.set(title="training losses", yscale="log")
    _plot(rate, records, "lr", color="black")
    rate.set(title="learning rate", ylim=(0, None))
    for name in names:
        task = next((task for task in _AP if name == task or name.endswith(f"/{task}")), None)
        if task:
            # With several test sets the name starts with that of the set.
            _plot(precision, records, name, label=name.replace(task, _AP[task]), marker="o")
    # A first or last point lies whole within the frame.
    precision.set(title="COCO AP", ylim=(-3, 103))
    for name in inversion:
        _plot(rest[0], records, name, label=name.partition("/")[2], marker="o")
    for axes in rest:
        axes.set(title="relative error of rebuilt inputs", yscale="log")

    for axes in (losses, rate, precision, *rest):
        last = max(1, *(record["iteration"] for record in records))
        axes.set(xlabel="iteration", xlim=(-0.03 * last, 1.03 * last))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            # Below the frame, where there is no curve to cover.
            axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    write_whole(path, lambda part: figure.savefig(part, dpi=100))


def draw_predictions(
    cfg: CfgNode, model: nn.Module, dataset_name: str, path: str, num_images: int = 8, min_score: float = 0.5
) -> bool:
    """Draw a sheet of images, each with its ground truth to the left and its predictions to the right.

    Args:
        cfg: the config the model was built from.
        model: a detector; its mode is kept.
        dataset_name: a registered dataset; its first annotated images are shown.
        path: the PNG to write.
        num_images: at most this many images, in two columns of pairs.
        min_score: predictions below it are left out.

    Returns:
        whether there is anything to draw: not for a model without instances, such as a proposal network.
    """
    # Annotated images first; sorting keeps the order otherwise.
    records = sorted(DatasetCatalog.get(dataset_name), key=lambda record: not record.get("annotations"))
    metadata = MetadataCatalog.get(dataset_name)
    mapper = RevDatasetMapper(cfg, is_train=False)
    tiles = []
    for record in records[:num_images]:
        try:
            image = read_rgb(record["file_name"])
            truth = draw_tile(image, metadata, Visualizer.draw_dataset_dict, record)
            inputs = mapper(record)
        except ValueError as error:
            logger.warning("%s is left out of %s: %s", printable(record["file_name"]), path, error)
            continue
        with inference_context(model), torch.inference_mode(), Precision.from_config(cfg).autocast():
            results = model([inputs])[0]
        if "instances" not in results:
            logger.info("A %s finds no instances to draw", cfg.MODEL.META_ARCHITECTURE)
            return False
        found = results["instances"].to("cpu")
        predicted = draw_tile(
            image, metadata, Visualizer.draw_instance_predictions, found[found.scores >= min_score]
        )
        tiles += [truth, predicted]
    if tiles:
        titles = ["ground truth", f"predictions, score >= {min_score:g}"] * min(2, len(tiles) // 2)
        write_whole(path, lambda part: write_sheet(part, tiles, titles))
    return bool(tiles)


def _plot(axes: Axes, records: Sequence[dict[str, float]], name: str, label: str = "", **style: Any) -> None:
    points = [(record["iteration"], record[name]) for record in records if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), label=label or name, **style)
