"""Files are written whole or not at all, errors name them, and JSON is read with suspicion."""

import os
from pathlib import Path

import pytest

from rev_det.files import check_output, naming, read_json, whole_file, write_json, write_text, write_whole


@pytest.mark.parametrize("write", [write_text, lambda path, text: write_json(path, {"a": text})])
def test_what_does_not_fit_leaves_the_file_as_it_was_and_is_named(tmp_path, full_disk, write):
    path = tmp_path / "a.json"
    write(str(path), "before")
    content = path.read_text()
    words = rf"{path} cannot be written: File too large; \d+ MiB are free in"
    with full_disk(4096), pytest.raises(OSError, match=words):
        write(str(path), "x" * 5000)
    assert path.read_text() == content
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_error_that_torch_makes_of_a_full_disk_is_one_of_the_disk(tmp_path):
    def write(part):
        with open(part, "wb") as file:
            file.write(b"half")
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(OSError, match=r"a\.pth cannot be written: No space left on device"):
        write_whole(str(tmp_path / "a.pth"), write)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a mistake"),
        OSError("in words already"),
        FileNotFoundError(2, "No such file", "of another"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
)
def test_errors_of_other_things_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as info, naming(str(tmp_path / "a.json")):
        raise error
    assert info.value is error


def test_the_part_keeps_the_ending_and_appears_only_when_complete(tmp_path):
    path = tmp_path / "a.png"
    with whole_file(str(path)) as part:
        assert Path(part).suffix == ".png" and Path(part).parent == tmp_path
        Path(part).write_text("all")
        assert not path.exists()
    assert path.read_text() == "all" and not Path(part).exists()


@pytest.mark.parametrize("name", ["x" * 255, "x" * 251 + ".png", "." + "x" * 254, "\udcff.json"])
def test_names_as_long_as_the_file_system_allows_and_bytes_that_are_no_text(tmp_path, name):
    path = str(tmp_path / name)
    write_json(path, {"a": name})
    assert os.listdir(tmp_path) == [name] and read_json(path) == {"a": name}


def test_a_place_that_takes_no_files_is_found_before_the_work(tmp_path, monkeypatch):
    check_output(None)
    check_output(tmp_path / "a.ts", [".ts"], "--output")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"--output .*a\.txt cannot be written: its name must end with \.ts"):
        check_output(tmp_path / "a.txt", [".ts"], "--output")
    with pytest.raises(ValueError, match="cannot be written: it is a folder"):
        check_output(tmp_path)

    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"a\.ts cannot be written to the folder .*: Read-only file system"):
        check_output(tmp_path / "a.ts")


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{\n"a": ', "is not valid JSON: Expecting value in line 2, column 6; is the file complete"),
        (b"\xff\x00", "is not a text file in UTF-8"),
        (b"[" * 100_000, "is not JSON that can be read: maximum recursion depth"),
        (b"9" * 5000, "is not JSON that can be read: Exceeds the limit"),
    ],
)
def test_what_is_no_json_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json {message}"):
        read_json(tmp_path / "a.json")


def test_json_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "é"}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": "é"}
