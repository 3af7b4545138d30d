"""Small generated images, in files and in folders as ImageNet's."""

import numpy as np
from PIL import Image

from rev_det.classify import preprocessing


def make_image(seed, width=300, height=260):
    """Coarse coloured blocks, different for every seed."""
    blocks = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR)


def save_images(folder, number):
    folder.mkdir(exist_ok=True)
    paths = [str(folder / f"{seed}.png") for seed in range(number)]
    for seed, path in enumerate(paths):
        make_image(seed).save(path)
    return paths


def save_by_rank(folder, logits_of, ranks):
    """One JPEG for each rank, in the folder of the class that has this rank (0 is the best) for it.

    Folders are named so that their order is not that of creation; every class has one.
    """
    classes = logits_of(preprocessing()(make_image(0))[None]).shape[1]
    names = [f"n{100 + i}" for i in range(classes)]
    for name in reversed(names):
        (folder / name).mkdir(parents=True)
    for seed, rank in enumerate(ranks):
        path = folder / f"{seed}.JPEG"
        make_image(seed).save(path, quality=95)
        with Image.open(path) as image:
            order = logits_of(preprocessing()(image.convert("RGB"))[None])[0].argsort(descending=True)
        path.rename(folder / names[int(order[rank])] / path.name)
    return folder
