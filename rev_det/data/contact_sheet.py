"""A contact sheet: several images, with what is annotated or found in them, as one picture."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.utils.visualizer import VisImage, Visualizer
from matplotlib.figure import Figure

from ..files import printable
from .findings import first
from .images import check_extent, read_rgb

_TILE = 448  # longer side of an image on the sheet, in pixels
_COLUMNS = 4


def write_sheet(path: str, tiles: Sequence[np.ndarray], titles: Sequence[str]) -> None:
    """Write tiles in rows of four.

    Args:
        path: the picture to write; its extension is the format.
        tiles: each (H, W, 3), at least one.
        titles: of the first tiles, or of all.
    """
    columns = min(_COLUMNS, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    # Outside pyplot's global state, which other code may be using.
    figure = Figure((4 * columns, 4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, tile, title in itertools.zip_longest(grid, tiles, titles):
        axes.axis("off")
        if tile is not None:
            axes.imshow(tile)
            axes.set_title(printable(title or ""), fontsize=9, parse_math=False)
    figure.savefig(path, dpi=_TILE // 4)


def draw_tile(
    image: np.ndarray, metadata: Metadata, draw: Callable[[Visualizer, Any], VisImage], what: Any
) -> np.ndarray:
    """Draw on an image as large as it will be on a sheet.

    Args:
        image: (H, W, 3), RGB.
        metadata: of its data set.
        draw: a method of ``Visualizer``.
        what: its argument.

    Raises:
        ValueError: nothing would be left of the image's shorter side.
    """
    check_extent(*image.shape[:2], min(image.shape[:2]), _TILE)
    # Small images are enlarged to keep labels legible; beyond 4 times, Detectron2 rounds their size to zero.
    scale = min(4.0, _TILE / max(image.shape[:2]))
    if names := metadata.get("thing_classes"):
        metadata = Metadata(**vars(metadata) | {"thing_classes": list(map(printable, names))})
    with matplotlib.rc_context({"text.parse_math": False}):  # names of classes may have dollar signs
        return draw(Visualizer(image, metadata, scale, font_size_scale=1.5), what).get_image()


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
        ValueError: there are no such images or classes, or none can be drawn.
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
    tiles, titles, failures = [], [], []
    for record in records:
        try:
            image = read_rgb(record["file_name"])
            tiles.append(draw_tile(image, metadata, Visualizer.draw_dataset_dict, record))
        except ValueError as error:
            failures.append((record["file_name"], str(error)))
        else:
            # A name, to find the image by.
            count = len(record["annotations"])
            titles.append(f"{Path(record['file_name']).name}: {count} instance{'s' * (count != 1)}")
    if not tiles:
        raise ValueError(
            "no image of dataset '{}' can be drawn, the first is {}: {}".format(dataset_name, *failures[0])
        )
    write_sheet(path, tiles, titles)
    return len(tiles), failures


def _with_classes(records: list[dict], known: Sequence[str], classes: Sequence[str]) -> list[dict]:
    """The records with an instance of the classes, or any instance."""
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise ValueError(f"--classes: there is no class {unknown[0]!r}; there are {first(known)}")
    wanted = {known.index(name) for name in classes} or set(range(len(known)))
    return [r for r in records if any(a["category_id"] in wanted for a in r["annotations"])]
