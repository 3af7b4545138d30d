"""The Python examples of the README and the docs run as they stand."""

import re
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
