"""A contact sheet of annotated images: what training will see."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .images import read_rgb

_TILE = 448  # longer side of an image on the sheet, in pixels
_COLUMNS = 4


def draw_annotations(
    dataset_name: str, path: str, num_images: int = 16, seed: int = 0, classes: Sequence[str] = ()
) -> int:
    """Draw a sheet of annotated images, chosen by chance.

    Args:
        dataset_name: a registered data set.
        path: the picture to write; its extension is the format.
        num_images: at most this many, at least 1.
        seed: another one chooses others.
        classes: names; only images with an instance of one of them. All if empty.

    Returns:
        how many images are on the sheet.

    Raises:
        ValueError: there are no such images or classes, or one cannot be decoded; the format is unknown.
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
    columns = min(_COLUMNS, len(records))
    rows = math.ceil(len(records) / columns)
    figure = Figure((4 * columns, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    if Path(path).suffix.removeprefix(".").lower() not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"--output {path} must end in .png or .jpg")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, record in zip(grid, records, strict=False):
        axes.imshow(_draw(record, metadata))
        # A name, to find the image by; not as a formula.
        count = len(record["annotations"])
        name = f"{Path(record['file_name']).name}: {count} instance{'s' * (count != 1)}"
        axes.set_title(name, fontsize=9, parse_math=False)
    figure.savefig(path, dpi=_TILE // 4)
    return len(records)


def _with_classes(records: list[dict], known: Sequence[str], classes: Sequence[str]) -> list[dict]:
    """The records with an instance of the classes, or any instance."""
    unknown = [name for name in classes if name not in known]
    if unknown:
        listed = ", ".join(known[:10]) + (", …" if len(known) > 10 else "")
        raise ValueError(f"--classes: there is no class {unknown[0]!r}; there are {listed}")
    wanted = {known.index(name) for name in classes} or set(range(len(known)))
    return [r for r in records if any(a["category_id"] in wanted for a in r["annotations"])]


def _draw(record: dict[str, Any], metadata: Any) -> Any:
    """(H, W, 3), RGB."""
    try:
        image = read_rgb(record["file_name"])
    except ValueError as error:
        raise ValueError(
            f"image {record['file_name']} cannot be decoded ({error}); "
            "`rev-det data check` names all such images"
        ) from error
    # Beyond 4 times, Detectron2 rounds the size of labels to zero.
    scale = min(4.0, _TILE / max(image.shape[:2]))
    return Visualizer(image, metadata, scale=scale, font_size_scale=1.5).draw_dataset_dict(record).get_image()
