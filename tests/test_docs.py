"""The Python examples of the README and the docs run as they stand, and what the pages point to exists."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_backbone, build_model

from rev_det import add_rev_det_config

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = [
    pytest.param(match.group(1), id=f"{page.name}:{page.read_text()[: match.start()].count(chr(10)) + 1}")
    for page in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
    for match in re.finditer(
        r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_examples_run(code, capsys):
    # What a reader has before: some stock Detectron2 config.
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    names = {"cfg": cfg}
    exec(compile(code, "example", "exec"), names)
    if "cfg.MODEL.BACKBONE.NAME" in code:
        assert list(build_backbone(cfg).output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    # Comments after `print` show what is printed, shortened by dots.
    shown = re.findall(r"print\(.*\)\s+# (.*)", code)
    printed = capsys.readouterr().out
    for comment in shown:
        for piece in comment.split(" ... "):
            assert piece in printed


def example(page, mark, language="python"):
    """The one example of a page that has a mark in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if mark in block]
    return found


def test_own_blocks_made_reversible_have_the_gradients_of_ordinary_training():
    names = {}
    exec(compile(example("docs/method.md", "class Block"), "example", "exec"), names)
    sequence = names["sequence"].double()
    assert len(sequence.blocks) == 24
    x = torch.rand(2, 5, 64, dtype=torch.double, requires_grad=True)
    wanted = [x, *sequence.parameters()]
    y1 = y2 = x
    for block in sequence.blocks:  # the equations of the page
        y1 = y1 + block.F(y2)
        y2 = y2 + block.G(y1)
    expected = torch.autograd.grad((y1 * y2).sum(), wanted)
    y1, y2 = sequence(x, x)
    for found, value in zip(torch.autograd.grad((y1 * y2).sum(), wanted), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)


def test_another_head_on_a_config_of_the_zoo_is_built(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "keypoints.yaml").write_text(example("docs/own-detector.md", "KEYPOINT_ON", "yaml"))
    cfg = get_cfg()
    add_rev_det_config(cfg)
    cfg.merge_from_file(str(tmp_path / "keypoints.yaml"))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        heads = build_model(cfg).roi_heads
    assert heads.keypoint_on and not heads.mask_on
    assert (cfg.INPUT.FORMAT, cfg.SOLVER.OPTIMIZER) == ("RGB", "AdamW")


def test_the_lazy_backbone_is_that_of_the_lazy_config():
    names = {}
    exec(compile(example("docs/own-detector.md", "LazyCall"), "example", "exec"), names)
    whole = LazyConfig.load(str(ROOT / "configs/Lazy/mask_rcnn_rev_vit_b.py")).model
    with torch.device("meta"):
        ours, theirs = (instantiate(model.backbone) for model in (names["model"], whole))
    assert repr(ours) == repr(theirs)
    assert ours.padding_constraints == theirs.padding_constraints


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


PAGES = [ROOT / "README.md", ROOT / "MODEL_ZOO.md", *sorted(ROOT.glob("docs/**/*.md"))]
NAMES_OF_PAGES = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = "configs|rev_det|tests|tools|benchmarks|docs"


def anchors(page):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def without_braces(name):
    """a{b,c}d is abd and acd."""
    pieces = [piece.split(",") for piece in re.split(r"[{}]", name)]
    return ["".join(choice) for choice in itertools.product(*pieces)]


def broken_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"", page.read_text(encoding="utf-8")):
        path, _, anchor = "".join(target).partition("#")
        if re.match(r"[a-z]+:", path):  # https:, mailto:
            continue
        goal = page.parent / path if path else page
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            yield "".join(target)


def missing_files(page):
    text = page.read_text(encoding="utf-8")
    # With their folder, and configs also without it.
    named = re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./{{}},-]*[\w/}}]", text)
    named += re.findall(r"`([\w{},-]+\.yaml)`", text)
    for name in itertools.chain.from_iterable(map(without_braces, named)):
        found = [ROOT / name] if "/" in name else ROOT.glob(f"configs/**/{name}")
        if not any(path.exists() for path in found):
            yield name


@pytest.mark.parametrize("page", PAGES, ids=NAMES_OF_PAGES)
def test_links_lead_to_files_and_headings(page):
    assert not list(broken_links(page))


@pytest.mark.parametrize("page", PAGES, ids=NAMES_OF_PAGES)
def test_files_that_are_named_exist(page):
    assert not list(missing_files(page))


def test_the_site_builds_without_warnings_and_needs_no_other_host(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = list((tmp_path / "site").glob("**/index.html"))
    assert len(pages) >= 10
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]+)\"", page.read_text())
        assert not [address for address in loaded if "canonical" not in address], page
    assert "ReversibleSequence" in (tmp_path / "site/api/index.html").read_text()
