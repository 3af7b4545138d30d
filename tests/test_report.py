"""The page of a training run: what it shows of complete, killed and damaged runs, without needing more."""

import base64
import json
import os
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from rev_det.config_files import default_config
from rev_det.engine.pictures import draw_curves
from rev_det.report import write_report
from rev_det_cli import main

# Text that would be markup if it were not escaped.
NASTY = r'<b onclick="x()">R&D</b>'
RESULTS = "inference/things/results.json"
ENVIRONMENT = "Environment info:\n-----  -----\nPython   {}\n-----  -----\nPyTorch built with:\n  - GCC\n\n"


class Page(HTMLParser):
    """The elements of a page; fails where tags are not balanced."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], [], []
        self.feed(text)
        assert not self._open
        self.words = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def killed(tmp_path):
    """A run that was killed before its first evaluation, while it wrote a record."""
    folder = tmp_path / "a <run> & more"
    cfg = default_config()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.TEST.EVAL_PERIOD = 100, 0.0123, 50
    cfg.DATASETS.TEST = (NASTY,)
    save(folder / "config.yaml", cfg.dump())
    records = [
        {"iteration": 19, "lr": 0.01, "total_loss": 3.0, "loss_cls": 2.0, "[metric]images_per_s": 4.0},
        {"iteration": 39, "lr": 0.02, "total_loss": 1.5, "loss_cls": 1.0},
        {"iteration": 59, "lr": 0.01, "total_loss": 1.25, "loss_cls": float("nan")},
    ]
    save(folder / "metrics.json", "\n".join(map(json.dumps, records)) + '\n{"iteration": 7')
    return folder


@pytest.fixture
def complete(killed):
    """The same, resumed, with all that a complete run leaves."""
    with open(killed / "metrics.json", "a") as file:
        file.write('\n{"iteration": 99, "lr": 0.0, "total_loss": 1.0, "bbox/AP": 37.44, "segm/AP": 30.0}\n')
        file.write('{"iteration": 100, "bbox/AP": 36.0}\n')
    save(
        killed / "summary.json",
        {
            "iterations": 100,
            "precision": "bfloat16 on cuda",
            "peak_memory_mib_by_process": [1024.0, 2048.5],
            "best": {"value": 37.44, "iteration": 99},
            "metrics": {"bbox/AP": 36.0},
        },
    )
    tables = {
        "metrics": {"bbox": {"AP": 36.0, "AP50": 55.5}, "segm": {"AP": 30.0, "AP50": None}},
        "per_class": {"cat": {"instances": 12, "bbox": 61.25}, NASTY: {"instances": 0, "bbox": None}},
    }
    save(killed / RESULTS, {"dataset": NASTY, **tables})
    Image.new("RGB", (30, 20), (255, 0, 0)).save(killed / "predictions.png")
    log = f"[1] INFO: {ENVIRONMENT.format('2.7')}[1] INFO: {ENVIRONMENT.format('3.12 <new>')}"
    save(killed / "log.txt", f"{log}\x1b[32m[1]\x1b[0m Command line arguments: Namespace(a='a&b.yaml')\n")
    return killed


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_complete_run_is_shown_with_all_its_tables(complete):
    words = page_of(complete).words
    assert ": complete." in words and "MAX_ITER: 100" in words
    for shown in (
        f"{NASTY} task AP AP50 bbox 36 55.5 segm 30 – class instances bbox cat 12 61.25",
        "iterations 100 precision bfloat16 on cuda peak memory mib by process [1024.0, 2048.5]",
        "best.value 37.44",
        "[metric]images_per_s 4 19",
        "bbox/AP 36 100",
        "Python 3.12 <new>",
        "Namespace(a='a&b.yaml')",
        "SOLVER.BASE_LR 0.0123 0.001",
    ):
        assert shown in words, shown
    # A tuple in the defaults is a list in the file, and no difference.
    assert not any(key in words for key in ("Python 2.7", "SOLVER.STEPS", "SOLVER.BETAS", "SOLVER.GAMMA"))


def test_the_page_needs_nothing_else_and_text_of_the_run_is_no_markup(complete):
    text = write_report(complete).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("b") and page.words.count(NASTY) >= 3 and "a <run> & more" in page.words
    assert "://" not in text and "@import" not in text and "url(" not in text
    assert not any(page.all(tag) for tag in ("script", "link", "iframe", "object", "base"))
    for _, attributes in page.elements:
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert not attributes.keys() & {"href", "srcset", "data", "action", "onclick"}
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in policy


def test_the_page_can_be_used_without_seeing_it_and_in_the_dark(complete):
    page = page_of(complete)
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.all("img"))
    regions = [division for division in page.all("div") if division.get("role") == "region"]
    assert len(regions) == 8 and all(r["aria-label"] and r["tabindex"] == "0" for r in regions)
    assert "prefers-color-scheme: dark" in (complete / "report.html").read_text()


def test_the_pictures_are_the_run_s_own(complete):
    contents = [base64.b64decode(image["src"].partition(",")[2]) for image in page_of(complete).all("img")]
    draw_curves(str(complete / "metrics.json"), str(complete / "curves.png"))
    assert contents == [(complete / f"{name}.png").read_bytes() for name in ("curves", "predictions")]


def test_a_killed_run_is_shown_with_what_is_missing(killed):
    page = page_of(killed)
    for shown in (
        ": not complete.",
        "60 of 100 iterations are recorded",
        "--resume continues it",
        "There is no evaluation yet: TEST.EVAL_PERIOD is 50.",
        "There is no predictions.png yet.",
        "There is no log.txt yet.",
        "Lines of metrics.json that are damaged or incomplete, and left out: 1.",
    ):
        assert shown in page.words, shown
    assert len(page.all("img")) == 1
    (killed / "metrics.json").unlink()
    page = page_of(killed)
    assert "0 of 100 iterations" in page.words and "There is no metrics.json yet." in page.words
    assert not page.all("img")


def test_a_summary_of_an_earlier_run_does_not_count(complete):
    save(complete / "metrics.json", '{"iteration": 19, "lr": 0.01, "total_loss": 3.0}\n')
    words = page_of(complete).words
    assert "not complete" in words and "20 of 100 iterations" in words and "bfloat16" not in words


def test_test_time_augmentation_and_a_step_that_was_not_finite_are_said(complete):
    save(complete / "TTA" / RESULTS, {"dataset": "x", "metrics": {"bbox": {"AP": 40.0}}})
    save(complete / "non_finite.json", {})
    words = page_of(complete).words
    assert "x, test-time augmentation task AP bbox 40" in words
    assert "A step was not finite" in words


DAMAGE = {
    "metrics.json": ("\0", "[1]", '{"a": 1}', '{"iteration": 5, "lr": 1e999, "a": ' + "[" * 10**5),
    "summary.json": ('{"iterations": ', "[]", "5", '{"a": ' + "[" * 900 + "]" * 900 + "}"),
    RESULTS: ("[]", '{"metrics": 5}', '{"metrics": {"bbox": null}}', '{"per_class": [1]}', "[" * 10**5),
    "predictions.png": ("", "text", "\x89PNG\r\n\x1a\n"),
    "config.yaml": ("a: [", "words", "!!python/object/apply:os.getcwd []", "&a [*a]", "{a: &a [*a]}"),
}


@pytest.mark.parametrize("name, content", [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_a_damaged_file_is_named_on_the_page(complete, name, content):
    (complete / name).write_bytes(content.encode("latin-1"))
    words = page_of(complete).words
    assert f"{name} cannot be used" in words or f"Lines of {name} that are damaged" in words


@pytest.mark.parametrize("name", ["metrics.json", "summary.json", RESULTS, "predictions.png", "log.txt"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_named_and_not_waited_for(complete, name, make):
    (complete / name).unlink()
    make(complete / name)
    assert f"{name} cannot be used: it is not a file" in page_of(complete).words


def test_a_picture_that_is_cut_off_is_left_out(complete):
    content = (complete / "predictions.png").read_bytes()
    (complete / "predictions.png").write_bytes(content[:-20])
    assert "predictions.png cannot be used" in page_of(complete).words


def test_odd_values_in_the_config_do_no_harm(killed):
    with open(killed / "config.yaml", "a") as file:
        file.write("OWN: {KEY: [1, {A: 2}]}\n5: 6\n")
    text = (killed / "config.yaml").read_text().replace("MAX_ITER: 100", "MAX_ITER: x")
    save(killed / "config.yaml", re.sub(r"^TEST:\n(  .*\n)+", "TEST: null\n", text, flags=re.MULTILINE))
    words = page_of(killed).words
    assert "OWN.KEY [1, {'A': 2}] none" in words and "60 of x iterations" in words


def test_names_that_are_not_unicode_are_shown_as_far_as_they_can_be(killed, capsys):
    folder = killed.rename(os.fsdecode(bytes(killed) + b"\xe9"))
    save(folder / "inference" / os.fsdecode(b"\xff") / "results.json", "[]")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {killed}\\udce9/report.html\n"
    words = Page((folder / "report.html").read_text()).words
    assert r"more\udce9" in words and r"inference/\udcff/results.json cannot be used" in words


def test_a_folder_that_is_no_run_is_an_error(killed):
    for folder in (killed / "gone", killed / "config.yaml"):
        with pytest.raises(FileNotFoundError, match="is not a folder; name the OUTPUT_DIR"):
            write_report(folder)
    with pytest.raises(FileNotFoundError, match="is not the folder of a training run: it has no config.yaml"):
        write_report(killed.parent)


def test_the_page_can_be_written_elsewhere_but_not_over_a_file_of_the_run(killed, tmp_path, capsys):
    before = {path: path.read_bytes() for path in killed.iterdir()}
    assert main(["report", str(killed), "--output", str(tmp_path / "page.htm")]) == 0
    assert (tmp_path / "page.htm").read_bytes()[:15] == b"<!DOCTYPE html>"
    for name, words in (("config.yaml", "must end with .html or .htm"), ("gone/page.html", "does not exist")):
        assert main(["report", str(killed), "--output", str(killed / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("error: ") and words in line
    assert {path: path.read_bytes() for path in killed.iterdir()} == before


def test_a_full_disk_is_told_and_leaves_nothing(killed, full_disk):
    before = sorted(killed.iterdir())
    with full_disk(1000), pytest.raises(OSError, match=r"report\.html cannot be written: File too large"):
        write_report(killed)
    assert sorted(killed.iterdir()) == before
