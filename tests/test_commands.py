"""The commands of the README and the docs: each one runs as it stands, or it is said what it needs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from detectron2.config import get_cfg

import rev_det_cli
from rev_det import add_rev_det_config
from rev_det.data import generate_shapes
from rev_det.engine import argument_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "MODEL_ZOO.md", "CONTRIBUTING.md")), *ROOT.glob("docs/*.md")]
PROGRAMS = ("make", "python", "rev-det", "pip", "torchrun", "srun", "source", "export", "g++")
# What cannot run in a test, by what tells it from the others.
NEEDS = {
    r"^make ": "is what runs the tests, or trains for minutes",
    r"^(pip|source|export|g\+\+) ": "changes the environment",
    r"^srun |--num-gpus 8": "several GPUs",
    r"--device cuda|pytest -m gpu": "a GPU",
    r"REV_(VIT|MVIT)_\w+\.pyth|--imagenet": "the published weights, or ImageNet",
    r"^python train_net.py (?!.*--dataset).*configs/COCO-Detection": "COCO",
    r"_fpn_3x.yaml SOLVER.IMS_PER_BATCH 16 SOLVER.ACCUMULATE 2$": "minutes; tests/engine has it in short",
}
# Behind all others, so that they count: small images, a small network, no download, a single step.
QUICK = (
    "MODEL.WEIGHTS '' MODEL.DEVICE cpu SOLVER.MAX_ITER 1 SOLVER.STEPS '()' DATALOADER.NUM_WORKERS 0 "
    "INPUT.MIN_SIZE_TRAIN '(64,)' INPUT.MIN_SIZE_TEST 64 INPUT.AUGMENTATION default MODEL.REV_MVIT.DEPTH 9 "
    "MODEL.REV_MVIT.EMBED_DIM 32 MODEL.REV_MVIT.LAST_BLOCK_INDEXES '(0,2,6,8)'"
)


def commands():
    """(page, command) of all fenced blocks that are not in another language, and of cells of tables."""
    for page in sorted(PAGES):
        text = page.read_text(encoding="utf-8")
        # Those within lists are indented.
        blocks = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
        shell = [block for _, language, block in blocks if language in ("", "sh", "bash")]
        for block in [*shell, *re.findall(r"\| `([^`|…]+)`", text)]:
            # What begins with no program is output.
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s+", " ", re.sub(r"\s# .*", "", line)).strip().removeprefix("$ ")
                if line.partition(" ")[0] in PROGRAMS:
                    yield page, line


def inline_commands():
    """Commands of rev-det that stand in the text, with words such as CONFIG for what the reader has."""
    for page in sorted(PAGES):
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
        # Not the mere name of a command.
        for command in re.findall(r"`(rev-det (?!(?:data|weights) [a-z]+`)[a-z]+ [^`…]+)`", text):
            yield re.sub(r"\s+", " ", command)


COMMANDS = list(dict.fromkeys(line for _, line in commands()))
NEEDED = {line: [why for mark, why in NEEDS.items() if re.search(mark, line)] for line in COMMANDS}
RUNNABLE = [line for line in COMMANDS if not NEEDED[line]]


def test_commands_are_found_and_most_that_need_nothing_run():
    assert len(COMMANDS) >= 25
    assert len(RUNNABLE) >= 12
    for mark in NEEDS:
        assert any(re.search(mark, line) for line in COMMANDS), f"{mark} excuses nothing any more"


OF_REV_DET = [line for line in COMMANDS if line.startswith("rev-det ")]


@pytest.mark.parametrize("line", dict.fromkeys([*OF_REV_DET, *inline_commands()]))
def test_arguments_of_rev_det_exist(line, monkeypatch):
    words = shlex.split(re.sub(r"\$\(.*?\)", "0" * 64, line))[1:]
    called = []
    for name in rev_det_cli.COMMANDS:
        monkeypatch.setattr(f"rev_det.cli.{name}.run", lambda args: called.append(args) or 0)
    if words == ["--help"]:
        with pytest.raises(SystemExit) as done:
            rev_det_cli.main(words)
        assert done.value.code == 0
    else:
        assert rev_det_cli.main(words) == 0 and called


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python train_net.py ")])
def test_arguments_and_keys_of_train_net_exist(line):
    args = argument_parser().parse_args(shlex.split(line)[2:])
    cfg = get_cfg()
    add_rev_det_config(cfg)
    cfg.merge_from_file(str(ROOT / args.config_file))
    cfg.merge_from_list(args.opts)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with what the commands name: a checkout, two datasets, photos, a video and a finished run."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("configs", "train_net.py", "benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    annotations, images = generate_shapes(str(folder / "datasets/shapes"), "val", num_images=4, size=64)
    (folder / "images").symlink_to(images)
    (folder / "photos").symlink_to(images)
    dataset = json.loads(Path(annotations).read_text())
    for category, name in zip(dataset["categories"], ("person", "dog", "cat"), strict=True):
        category["name"] = name
    for name in ("train.json", "val.json", "annotations.json"):
        (folder / name).write_text(json.dumps(dataset))
    first = cv2.imread(str(sorted((folder / "images").iterdir())[0]))
    video = cv2.VideoWriter(
        str(folder / "street.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, first.shape[1::-1]
    )
    for _ in range(3):
        video.write(first)
    video.release()
    for output in ("output/demo", "output"):
        nano = str(ROOT / "configs/Quickstart/mask_rcnn_rev_mvit_nano_fpn.yaml")
        data = f"few={folder / 'annotations.json'}:{folder / 'images'}"
        words = ["--config-file", nano, "--dataset", data, "DATASETS.TRAIN", "('few',)"]
        words += ["DATASETS.TEST", "('few',)", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
        words += ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"]
        command = [sys.executable, str(ROOT / "train_net.py"), *words, "OUTPUT_DIR", str(folder / output)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", RUNNABLE)
def test_commands_run_as_they_stand(line, workplace):
    if line.startswith("python train_net.py"):
        line += f" {QUICK}"
    bin_folder = os.path.dirname(sys.executable)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        ["bash", "-c", line], cwd=workplace, env=environment, capture_output=True, text=True, timeout=900
    )
    # Two sets of the same images are what `data check` is there to find.
    expected = 1 if "data check" in line else 0
    assert done.returncode == expected, done.stdout[-2000:] + done.stderr[-2000:]
