"""A contact sheet of annotated images: what training will see."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .images import check_extent, read_rgb

TILE = 448  # longer side of an image on the sheet, in pixels
_COLUMNS = 4


def draw_annotations(
    dataset_name: str, path: str, num_images: int = 16, seed: int = 0, classes: Sequence[str] = ()
) -> tuple[int, list[tuple[str, str]]]:
    """Draw a sheet of annotated images, chosen by chance.

    Args:
        dataset_name: a registered data set.
        path: the picture to write; its extension is the format.
        num_images: at most this many, at least 1.
        seed: another one chooses others.
        classes: names; only images with an instance of one of them. All if empty.

    Returns:
        how many images are on the sheet; path and reason of those that cannot be drawn.

    Raises:
        ValueError: there are no such images or classes, or none can be drawn; the format is unknown.
    """
    if num_images < 1:
        raise ValueError(f"--num must be at least 1, got {num_images}")
    metadata = MetadataCatalog.get(dataset_name)
    records = _with_classes(DatasetCatalog.get(dataset_name), metadata.thing_classes, classes)
    if not records:
        wanted = f" of {', '.join(classes)}" if classes else ""
        raise ValueError(f"no image of dataset '{dataset_name}' has an instance{wanted}")
    if len(records) > num_images:
        chosen = sorted(random.Random(seed).sample(range(len(records)), num_images))
        records = [records[index] for index in chosen]
    tiles, failures = [], []
    for record in records:
        try:
            tiles.append((record, _draw(record, metadata)))
        except ValueError as error:
            failures.append((record["file_name"], str(error)))
    if not tiles:
        raise ValueError(
            "no image of dataset '{}' can be drawn, the first is {}: {}".format(dataset_name, *failures[0])
        )
    columns = min(_COLUMNS, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    figure = Figure((4 * columns, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    if Path(path).suffix.removeprefix(".").lower() not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"--output {path} must end in .png or .jpg")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, (record, tile) in zip(grid, tiles, strict=False):
        axes.imshow(tile)
        # A name, to find the image by; not as a formula.
        count = len(record["annotations"])
        name = f"{Path(record['file_name']).name}: {count} instance{'s' * (count != 1)}"
        axes.set_title(name, fontsize=9, parse_math=False)
    figure.savefig(path, dpi=TILE // 4)
    return len(tiles), failures


def _with_classes(records: list[dict], known: Sequence[str], classes: Sequence[str]) -> list[dict]:
    """The records with an instance of the classes, or any instance."""
    unknown = [name for name in classes if name not in known]
    if unknown:
        listed = ", ".join(known[:10]) + (", …" if len(known) > 10 else "")
        raise ValueError(f"--classes: there is no class {unknown[0]!r}; there are {listed}")
    wanted = {known.index(name) for name in classes} or set(range(len(known)))
    return [r for r in records if any(a["category_id"] in wanted for a in r["annotations"])]


@matplotlib.rc_context({"text.parse_math": False})  # names of classes may have dollar signs
def _draw(record: dict[str, Any], metadata: Any) -> Any:
    """(H, W, 3), RGB."""
    visualizer = tile_visualizer(read_rgb(record["file_name"]), metadata)
    return visualizer.draw_dataset_dict(record).get_image()


def tile_visualizer(image: np.ndarray, metadata: Any) -> Visualizer:
    """What draws on an image as large as it will be on a sheet.

    Raises:
        ValueError: nothing would be left of its shorter side.
    """
    check_extent(*image.shape[:2], min(image.shape[:2]), TILE)
    # Small images are enlarged to keep labels legible; beyond 4 times, Detectron2 rounds their size to zero.
    scale = min(4.0, TILE / max(image.shape[:2]))
    return Visualizer(image, metadata, scale=scale, font_size_scale=1.5)
