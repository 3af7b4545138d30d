"""The report command: what it prints and writes, and its errors."""

import pytest
from detectron2.config import get_cfg

from rev_det import add_rev_det_config
from rev_det_cli import main


@pytest.fixture
def run(tmp_path):
    cfg = get_cfg()
    add_rev_det_config(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return tmp_path


def test_the_page_is_written_where_it_is_said_to_be(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert main(["report", str(run), "--output", str(run / "other.html")]) == 0
    assert (run / "other.html").read_bytes()[:15] == b"<!DOCTYPE html>"


def test_errors_are_one_line(run, capsys):
    for arguments in (["gone"], [str(run), "--output", "page.pdf"]):
        assert main(["report", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
