"""The page of a training run: what it shows of complete and broken runs, and that it needs nothing else."""

import base64
import functools
import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from detectron2.config import get_cfg
from PIL import Image

from rev_det import add_rev_det_config
from rev_det.report import Run, write_report

# Text that would be markup, mathematics or a back-reference if it were not escaped.
NASTY = r'<b onclick="x()">R&D</b> $x_1$ \1'
VOID = {"meta", "img", "path", "use", "br"}


class Page(HTMLParser):
    """The elements of a page; fails where tags are not balanced."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def killed(tmp_path):
    """A run that was killed before its first evaluation."""
    folder = tmp_path / "a <run> & more"
    folder.mkdir()
    cfg = get_cfg()
    add_rev_det_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_rev_vit_fpn_backbone"
    cfg.MODEL.DEVICE = "cpu"
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 100, 2, 0.0123
    cfg.DATASETS.TEST = (NASTY,)
    cfg.TEST.EVAL_PERIOD = 50
    save(folder / "config.yaml", cfg.dump())
    lines = [
        {"iteration": 19, "lr": 0.01, "total_loss": 3.0, "loss_cls": 2.0, "[metric]images_per_s": 4.0},
        {"iteration": 39, "lr": 0.02, "total_loss": 1.5, "loss_cls": 1.0, "[metric]images_per_s": 8.0},
        {"iteration": 59, "lr": 0.01, "total_loss": 1.25, "loss_cls": float("nan")},
    ]
    lines[0]["[metric]max_rss_mib"] = 1536.0
    save(folder / "metrics.json", "\n".join(map(json.dumps, lines)) + '\n{"iteration": 7')
    return folder


@pytest.fixture
def complete(killed):
    """The same, with all that a complete run leaves."""
    with open(killed / "metrics.json", "a") as file:
        file.write('\n{"iteration": 99, "lr": 0.0, "total_loss": 1.0, "bbox/AP": 37.44, "segm/AP": 30.0}\n')
        file.write('{"iteration": 100, "bbox/AP": 36.0}\n')
    summary = {
        "iterations": 100,
        "activations": "reversible",
        "precision": "bfloat16 on cuda",
        "seconds_since_start_or_resume": 3725.0,
        "resumed_at_iteration": 0,
        "processes": 2,
        "peak_memory_mib_by_process": [1024.0, 2048.0],
        "peak_memory_is": "allocated on CUDA",
        "best": {"value": 37.44, "iteration": 99, "file": "model_best.pth"},
        "datasets": {"train": ["things"], "test": [NASTY]},
        "versions": {"rev_det": "9.8.7"},
        "device": "Some GPU",
    }
    save(killed / "summary.json", summary)
    results = {
        "dataset": NASTY,
        "metrics": {"bbox": {"AP": 36.0, "AP50": 55.5}, "segm": {"AP": 30.0, "AP50": None}},
        "per_class": {
            "cat": {"instances": 12, "bbox": 61.25, "segm": 50.0},
            NASTY: {"instances": 0, "bbox": None, "segm": None},
        },
    }
    save(killed / "inference" / "things" / "results.json", results)
    Image.new("RGB", (30, 20), (255, 0, 0)).save(killed / "predictions.png")
    rule = f"{'-' * 20}  {'-' * 30}"
    table = f"{rule}\nPython                3.12 <new>\nGPU 0                 Some GPU (arch=8.0)\n{rule}\n"
    save(
        killed / "log.txt",
        f"[01/01] detectron2 INFO: Environment info:\n{rule}\nPython                2.7\n{rule}\n"
        f"[01/01] detectron2 INFO: Environment info:\n{table}PyTorch built with:\n"
        "[01/01] detectron2 INFO: Command line arguments: Namespace(config_file='a&b.yaml')\n"
        "\x1b[32m[01/01]\x1b[0m eta: 0:01  max_mem: 3072M\n[01/01] eta: 0:00  max_mem: 512M\n",
    )
    return killed


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_complete_run_is_shown_with_all_its_figures(complete):
    words = page_of(complete).words
    assert "complete" in words and "not complete" not in words and "What is missing" not in words
    for shown in (
        f"box AP 36.0 {NASTY}",
        "best box AP 37.4 after iteration 100",
        "images/s 8 median",
        "peak memory 2.00 GiB allocated on CUDA",
        "precision bfloat16 on cuda",
        "activations reversible rev_vit_fpn",
        "time 1 h 2 min",
        "box 36.0 55.5",
        "mask 30.0 –",
        "cat 12 61.2 50.0",
        "process 1 2.00 GiB",
        "Python 3.12 <new>",
        "GPU 0 Some GPU (arch=8.0)",
        "rev_det 9.8.7",
        "config_file='a&b.yaml'",
        "SOLVER.BASE_LR 0.0123 0.001",
        "metrics.json",
    ):
        assert shown in words, shown
    assert "Python 2.7" not in words


def test_only_what_differs_from_the_defaults_is_in_front(complete):
    words = page_of(complete).words
    changed, _, whole = words.partition("Whole config")
    assert "keys that are not at their defaults" in changed and "MAX_ITER: 100" in whole
    # A tuple in the defaults is a list in the file, and no difference.
    assert "SOLVER.MAX_ITER" in changed
    assert "SOLVER.STEPS" not in changed and "SOLVER.BETAS" not in changed and "SOLVER.GAMMA" not in changed


def test_text_of_the_run_is_text_and_not_markup(complete):
    page = page_of(complete)
    assert not page.all("b") and not any("onclick" in attributes for _, attributes in page.elements)
    assert page.words.count(NASTY) >= 4
    assert "a <run> & more" in page.words


def test_the_page_asks_for_nothing_else(complete):
    text = write_report(complete).read_text(encoding="utf-8")
    page = Page(text)
    assert "://" not in text and "@import" not in text
    assert not any(page.all(tag) for tag in ("script", "link", "iframe", "object", "base"))
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert "default-src 'none'" in policy


def test_the_page_can_be_used_without_seeing_it(complete):
    page = page_of(complete)
    assert page.all("html")[0]["lang"] == "en"
    assert all(len(image["alt"]) > 20 for image in page.all("img"))
    assert page.all("th") and all(header.get("scope") in ("row", "col") for header in page.all("th"))
    charts = page.all("svg")
    assert len(charts) >= 5 and all(chart["role"] == "img" for chart in charts)
    labels = " ".join(chart["aria-label"] for chart in charts)
    assert "total loss from 3 at iteration 19 to 1 at 99" in labels
    assert "resident 1.5 at iteration 19" in labels
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
    used += [a["xlink:href"][1:] for _, a in page.elements if "xlink:href" in a]
    assert used and set(used) <= set(ids)


def test_charts_take_their_colours_from_the_page(complete):
    text = write_report(complete).read_text(encoding="utf-8")
    for chart in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert "var(--series-1)" in chart and "currentColor" in chart
        assert not re.search(r"#[0-9a-f]{6}\b", chart)


def test_the_picture_is_embedded_as_it_is(complete):
    (image,) = page_of(complete).all("img")
    assert base64.b64decode(image["src"].partition(",")[2]) == (complete / "predictions.png").read_bytes()
    assert (image["width"], image["height"]) == ("30", "20")


def test_a_killed_run_is_shown_with_what_is_missing(killed):
    words = page_of(killed).words
    for shown in (
        "not complete",
        "60 of 100 iterations are recorded",
        "--resume continues it",
        "No evaluation yet: it comes every 50 iterations.",
        "No picture of predictions: predictions.png, drawn at each evaluation, is not there.",
        "No environment: log.txt",
        "images/s 8 median",
        "peak memory 1.50 GiB resident",
        "precision float32 on cpu",
    ):
        assert shown in words, shown
    assert "Average precision" not in words


def test_a_run_that_has_only_begun_is_shown(killed):
    (killed / "metrics.json").unlink()
    words = page_of(killed).words
    assert "0 of 100 iterations are recorded" in words and "No metrics.json with records" in words
    assert "Curves" not in words


def test_a_summary_of_an_earlier_run_does_not_count(complete):
    save(complete / "metrics.json", '{"iteration": 19, "lr": 0.01, "total_loss": 3.0}\n')
    words = page_of(complete).words
    assert "not complete" in words and "20 of 100 iterations" in words and "bfloat16" not in words


def test_ap_is_taken_from_the_records_where_there_are_no_results(complete):
    (complete / "inference" / "things" / "results.json").unlink()
    line = {"iteration": 101, "one/bbox/AP": 11.0, "one/bbox/AP-cat": 12.5, f"{NASTY}/segm/AP": 13.0}
    save(complete / "metrics.json", '{"iteration": 99, "lr": 0, "one/bbox/AP": 1.0}\n' + json.dumps(line))
    words = page_of(complete).words
    assert "box AP 11.0 one" in words and f"mask AP 13.0 {NASTY}" in words and "cat 12.5" in words
    assert "one: box AP" in words and f"{NASTY}: mask AP" in words  # in the legend


def test_the_best_evaluation_is_known_before_there_is_a_summary(complete):
    (complete / "summary.json").unlink()
    save(
        complete / "metrics.json", '{"iteration": 49, "lr": 0, "bbox/AP": 5.0}\n{"iteration": 99, "lr": 0}\n'
    )
    assert "best box AP 5.0 after iteration 50" in page_of(complete).words
    with open(complete / "metrics.json", "a") as file:
        file.write('{"iteration": 100, "bbox/AP": 6.0}\n')
    (complete / "model_best.pth").touch()
    assert "best box AP 6.0 after iteration 100, model_best.pth" in page_of(complete).words


def test_test_time_augmentation_is_shown_as_such(complete):
    save(
        complete / "TTA" / "inference" / "x" / "results.json",
        {"dataset": "x", "metrics": {"bbox": {"AP": 40.0}}},
    )
    assert "box AP 40.0 x, test-time augmentation" in page_of(complete).words


def test_many_classes_are_folded_away(complete):
    per_class = {f"class {i}": {"instances": 1, "bbox": 1.0} for i in range(80)}
    content = {"dataset": "many", "metrics": {"bbox": {"AP": 1.0}}, "per_class": per_class}
    save(complete / "inference" / "things" / "results.json", content)
    assert "80 classes of many" in page_of(complete).words


def test_memory_that_only_the_log_knows_is_shown(complete):
    (complete / "summary.json").unlink()
    assert "peak memory 3.00 GiB allocated on CUDA" in page_of(complete).words


def test_a_step_that_was_not_finite_is_shown_first(killed):
    save(killed / "non_finite.json", {"iteration": 61})
    words = page_of(killed).words
    assert words.index("A step was not finite") < words.index("What is missing")


def test_a_picture_that_is_cut_off_is_said_to_be(complete):
    content = (complete / "predictions.png").read_bytes()
    (complete / "predictions.png").write_bytes(content[:-20])
    page = page_of(complete)
    assert not page.all("img") and "drawn at each evaluation, cannot be read" in page.words


def test_the_same_run_gives_the_same_page_and_leaves_itself_out(complete):
    first = write_report(complete).read_bytes()
    assert write_report(complete).read_bytes() == first
    assert sorted(p.name for p in complete.iterdir() if p.suffix == ".tmp") == []


@pytest.mark.parametrize("name", ["summary.json", "inference/things/results.json"])
@pytest.mark.parametrize("content", ['{"iterations": ', "[]"])
def test_a_damaged_file_is_named(complete, name, content):
    save(complete / name, content)
    with pytest.raises(ValueError, match=f"{name}.*damaged.*remove it"):
        write_report(complete)
    assert not (complete / "report.html").exists()


@pytest.mark.parametrize("content", ["a: [", "just words", "MODEL: 1"])
def test_a_config_that_is_none_is_named(killed, content):
    save(killed / "config.yaml", content)
    with pytest.raises(ValueError, match="config.yaml"):
        Run.read(killed)


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        write_report(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="is not the folder of a training run: it has no config.yaml"):
        write_report(tmp_path)


def test_the_page_can_be_written_elsewhere(killed, tmp_path):
    assert write_report(killed, tmp_path / "page.htm") == tmp_path / "page.htm"
    assert not (killed / "report.html").exists()
    with pytest.raises(ValueError, match="must end with .html or .htm"):
        write_report(killed, killed / "config.yaml")
    with pytest.raises(FileNotFoundError, match="the folder .*gone does not exist"):
        write_report(killed, tmp_path / "gone" / "page.html")


@pytest.mark.parametrize(
    "name, content",
    [
        *(("inference/things/results.json", text) for text in (
            '{"metrics": 5}', '{"metrics": {"bbox": null}}', '{"metrics": {"bbox": {"AP": "x"}}}',
            '{"per_class": [1]}', '{"per_class": {"a": 5}}', "[" * 100_000,
        )),
        *(("summary.json", json.dumps(content)) for content in (
            {"peak_memory_mib_by_process": 5}, {"peak_memory_mib_by_process": ["a"]}, {"versions": None},
            {"datasets": {"train": 5}}, {"best": 5}, {"seconds_since_start_or_resume": "x"},
        )),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_named(complete, name, content):
    save(complete / name, content)
    with pytest.raises(ValueError, match=f"{name} is not .*it is damaged; remove it to make a report"):
        write_report(complete)
    (complete / name).unlink()
    write_report(complete)


@pytest.mark.parametrize(
    "key, value",
    [
        ("SOLVER.MAX_ITER", "x"),
        ("TEST", 5),
        ("DATASETS.TEST", 7),
        ("MODEL.BACKBONE.NAME", 5),
        ("MODEL.REV", [1]),
    ],
)
def test_a_config_with_a_value_of_another_type_is_named_with_its_key(killed, key, value):
    config = yaml.safe_load((killed / "config.yaml").read_text())
    *parents, last = key.split(".")
    functools.reduce(dict.__getitem__, parents, config)[last] = value
    save(killed / "config.yaml", yaml.safe_dump(config))
    with pytest.raises(ValueError, match=f"(?s)config.yaml is not the config .* for config key: {key}"):
        Run.read(killed)


def test_keys_of_other_projects_and_of_none_do_no_harm(killed):
    config = yaml.safe_load((killed / "config.yaml").read_text())
    config |= {"OWN": {"KEY": [1, {"A": 2}]}, "TEST": None, 5: 6}
    save(killed / "config.yaml", yaml.safe_dump(config))
    assert "OWN.KEY" in page_of(killed).words


def test_a_picture_that_claims_to_be_gigantic_is_left_out(complete, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    page = page_of(complete)
    assert not page.all("img") and "cannot be read" in page.words


def test_a_full_disk_is_told_and_leaves_nothing(killed, full_disk):
    before = sorted(killed.iterdir())
    with full_disk(1000), pytest.raises(OSError, match=r"report\.html cannot be written: File too large"):
        write_report(killed)
    assert sorted(killed.iterdir()) == before
