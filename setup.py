"""Packaging of rev_det; all that is known of the packages it needs stands here.

Detectron2 is not among the requirements, as it has no release on PyPI: ``make setup`` or the README's command
installs it.
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Four packages provide the same cv2, and an environment should hold only one: this names the one it has.
OPENCV = os.environ.get("REV_DET_OPENCV", "opencv-python")

# The tests were run with all lower bounds at once, under Python 3.10.
REQUIRES = [
    "torch>=2.6",
    "torchvision>=0.21",
    "numpy>=1.23.5",
    "Pillow>=9.1",
    f"{OPENCV}>=4.6",
    "pycocotools>=2.0.6",
    "fvcore>=0.1.5.post20221221",
    "iopath>=0.1.9",
    "matplotlib>=3.8",
    "safetensors>=0.4",
    # with which Detectron2 crops polygons
    "shapely>=2.0",
    "rich>=13.0",
    "tqdm>=4.64",
    "PyYAML>=5.1",
    "Jinja2>=3.1",
    "tabulate>=0.9",
]
EXTRAS = {
    "dev": ["pytest>=7.4", "ruff>=0.15,<0.18", "setuptools>=64", "wheel>=0.40"],
    # What Detectron2 itself needs when it runs, for one that was installed without its dependencies. It
    # imports pkg_resources, which setuptools no longer has from release 81 on.
    "detectron2": [
        "yacs>=0.1.8",
        "termcolor>=1.1",
        "cloudpickle>=2.0",
        "tensorboard>=2.10",
        "omegaconf>=2.1.1,<2.4",
        "hydra-core>=1.1",
        "packaging>=21.0",
        "setuptools<81",
    ],
    # Detectron2's own ViT and MViT, to compare with
    "baselines": ["timm>=0.9.12"],
    # a faster COCO evaluation than pycocotools, with equal numbers
    "eval": ["faster-coco-eval>=1.6"],
    # detectors as ONNX, and the check that they compute the same
    "export": ["onnx>=1.17", "onnxruntime>=1.20"],
    # The mkdocstrings of Python 3.10 does not go with newer pymdown-extensions.
    "docs": [
        "mkdocs-material>=9.5",
        "mkdocstrings>=0.26",
        "mkdocstrings-python>=1.12",
        "pymdown-extensions<12",
    ],
}


def read_version() -> str:
    """The version in ``rev_det/__init__.py``, read without importing it: torch may not be there yet."""
    source = (ROOT / "rev_det" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE).group(1)


setup(
    name="rev_det",
    version=read_version(),
    description="Reversible vision transformers (Rev-ViT, Rev-MViT) as detection backbones for Detectron2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # In the repository configs/ is at the top, where users of Detectron2 look for it; in a wheel it is inside
    # the package.
    packages=[*find_packages(include=["rev_det", "rev_det.*"]), "rev_det.configs"],
    py_modules=["rev_det_cli"],
    package_dir={"rev_det.configs": "configs"},
    package_data={"rev_det": ["report.html"], "rev_det.configs": ["**/*.yaml"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["rev-det = rev_det_cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
