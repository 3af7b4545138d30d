"""Files are read whole and unchanged, or not at all; reading never runs code."""

import hashlib
import os
import pickle
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import safetensors.torch
import torch

from rev_det.checkpoint import read_checkpoint

STATE = {"a": torch.arange(600.0).view(20, 30), "b": torch.ones(3)}


def save(path, data=STATE, **options):
    torch.save(data, path, **options)
    return path


def refuse(path, words, error=ValueError):
    """The error names the file and says the words."""
    with pytest.raises(error, match=words) as info:
        read_checkpoint(path)
    assert os.path.basename(str(path)).partition("#")[0] in str(info.value)


def test_torch_legacy_and_safetensors_files_are_told_by_their_content(tmp_path):
    save(tmp_path / "zip.any")
    save(tmp_path / "legacy.safetensors", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(STATE, tmp_path / "safe.pyth")
    for name in ("zip.any", "legacy.safetensors", "safe.pyth"):
        read = read_checkpoint(tmp_path / name)
        assert all(torch.equal(read[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\n  <html>login</html>", "web page"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"404: Not Found", "not a checkpoint.*404: Not Found"),
        (pickle.dumps({"model": 1}), "plain pickle.*run code"),
        (b"\x1f\x8b\x08" + bytes(40), "not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_told(tmp_path, content, words):
    path = tmp_path / "REV_VIT_S.pyth"
    path.write_bytes(content)
    refuse(path, words)


def test_a_flipped_byte_is_found_that_torch_load_accepts(tmp_path):
    path = save(tmp_path / "weights.pth")
    content = bytearray(path.read_bytes())
    start = content.find(STATE["a"].numpy().tobytes())
    content[start + 1000] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["a"], STATE["a"])
    refuse(path, "checksum.*weights/data/0")


@pytest.mark.parametrize("name", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_damaged(tmp_path, name, share):
    path = tmp_path / "weights"
    if name == "safetensors":
        safetensors.torch.save_file(STATE, path)
    else:
        save(path, _use_new_zipfile_serialization=name == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refuse(path, "damaged")


@pytest.mark.filterwarnings("ignore:.*torch.jit.save:FutureWarning")
def test_other_archives_are_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.pth", "w") as archive:
        archive.writestr("holiday.jpg", b"...")
    refuse(tmp_path / "photos.pth", "not of torch.save: it holds holiday.jpg")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pth")
    refuse(tmp_path / "script.pth", "TorchScript")


def test_what_is_no_file_of_plain_weights(tmp_path):
    refuse(tmp_path / "gone.pth", "does not exist", FileNotFoundError)
    refuse(tmp_path, "is a directory")
    refuse(save(tmp_path / "list.pth", [torch.zeros(2)]), "holds a list")
    refuse(save(tmp_path / "module.pth", {"model": torch.nn.Linear(2, 2)}), r"refused.*Linear")


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["zip", "legacy", "plain"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, how):
    data, path = {"model": STATE, "more": Attack(tmp_path / "owned")}, tmp_path / "weights.pth"
    if how == "plain":
        path.write_bytes(pickle.dumps(data))
    else:
        save(path, data, _use_new_zipfile_serialization=how == "zip")
    refuse(path, "refused" if how == "plain" else r"refused.*run code.*mkdir")
    assert not (tmp_path / "owned").exists()
    # The attack itself works: an unguarded reader runs it.
    if how == "plain":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert (tmp_path / "owned").exists()


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_digest_is_verified(tmp_path):
    path = save(tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    good = digest(path)
    assert torch.equal(read_checkpoint(f"{path}#sha256={good.upper()}")["a"], STATE["a"])
    content = bytearray(path.read_bytes())
    content[-30] ^= 1  # in a tensor; this format has no checksum of its own
    path.write_bytes(content)
    read_checkpoint(path)
    refuse(f"{path}#sha256={good}", f"sha256 is {digest(path)}, expected {good}")


@pytest.mark.parametrize("text", ["", "abc", "g" * 64, "0" * 63])
def test_what_is_no_digest_is_an_error(tmp_path, text):
    refuse(f"{save(tmp_path / 'weights.pth')}#sha256={text}", "64 hexadecimal digits")


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """serve(content, length): address of a server that sends a file, and the requests it gets.

    Detectron2's cache is tmp_path/cache.
    """
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(content, length=None, status=200):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                self.send_response(status)
                if length is not None:
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/rev/REV_VIT_S.pyth", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock")


def test_a_url_is_downloaded_once_and_verified(serve, tmp_path):
    path = save(tmp_path / "weights.pth")
    url, requests = serve(path.read_bytes(), path.stat().st_size)
    for _ in range(2):
        read = read_checkpoint(f"{url}#sha256={digest(path)}")
        assert all(torch.equal(read[key], STATE[key]) for key in STATE)
    assert requests == ["/rev/REV_VIT_S.pyth"]
    assert cached(tmp_path) == ["REV_VIT_S.pyth"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_dropped_download_leaves_no_half_file(serve, tmp_path, announced):
    path = save(tmp_path / "weights.pth")
    content = path.read_bytes()
    url, requests = serve(content[: len(content) // 2], len(content) if announced else None)
    error, words = (FileNotFoundError, "could not be downloaded") if announced else (ValueError, "truncated")
    for attempt in (1, 2):
        refuse(url, words, error)
        assert len(requests) == attempt
        assert cached(tmp_path) == []


def test_a_download_that_fails_a_check_does_not_stay(serve, tmp_path):
    path = save(tmp_path / "weights.pth")
    url, _ = serve(path.read_bytes(), path.stat().st_size)
    refuse(f"{url}#sha256={'0' * 64}", "expected 0000.*will be downloaded again")
    assert cached(tmp_path) == []
    refuse(serve(b"<html>moved</html>", 18)[0], "web page.*will be downloaded again")
    assert cached(tmp_path) == []


@pytest.mark.parametrize(
    "address, words",
    [
        ("s3://bucket/weights.pth", "addresses start with http://, https://"),
        ("catalog://no/such/weights.pth", "could not be downloaded: .*not present"),
    ],
)
def test_an_address_of_another_kind(address, words):
    refuse(address, words, FileNotFoundError)


def test_an_address_that_does_not_answer(serve, tmp_path):
    url, _ = serve(b"", 0, status=404)
    refuse(url, "could not be downloaded.*404", FileNotFoundError)
    assert cached(tmp_path) == []
