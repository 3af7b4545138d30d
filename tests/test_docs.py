"""The Python examples of the README and the docs run as they stand, and what the pages point to exists."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.modeling import build_backbone

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


def test_broken_links_and_missing_files_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# What it is, and `how`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#what-it-is-and-how) [c](https://x.org/y) [d](#here) [e](gone.md#here)\n"
        "[f](other.md#gone) `rev_det/config.py` `rev_det/gone.py` tests/modeling, docs/method.md.\n"
        "## Here\n`mask_rcnn_baseline_vit_{s,xx}_fpn_3x.yaml` --config-file configs/gone.yaml\n"
    )
    assert list(broken_links(page)) == ["gone.md#here", "other.md#gone"]
    missing = ["rev_det/gone.py", "configs/gone.yaml", "mask_rcnn_baseline_vit_xx_fpn_3x.yaml"]
    assert list(missing_files(page)) == missing


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
