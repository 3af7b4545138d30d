"""What words of a command line mean, and reading images and videos."""

import os

import numpy as np
import pytest
from nano_detector import save_image, save_video
from PIL import Image

from rev_det.predict import find_sources, read_frames


@pytest.fixture
def folder(tmp_path):
    """Images, a video, other files, and a folder below."""
    (tmp_path / "below").mkdir()
    for name in ("b.JPG", "a.png", "below/a.png"):
        save_image(tmp_path / name, 0)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "clip.mp4").write_bytes(b"")
    return tmp_path


def names(*words):
    return [source.name for source in find_sources([str(word) for word in words])]


def frames(path):
    (source,) = find_sources([str(path)])
    return list(read_frames(source))


def test_a_folder_means_its_images_and_videos_in_order(folder):
    os.mkfifo(folder / "pipe.png")
    sources = find_sources([str(folder)])
    assert [(s.path, s.is_video) for s in sources] == [
        (str(folder / "a.png"), False),
        (str(folder / "b.JPG"), False),
        (str(folder / "clip.mp4"), True),
    ]


def test_a_file_is_taken_once_where_it_is_named_first_and_may_have_any_extension(folder):
    assert names(folder / "b.JPG", folder, folder / "below" / ".." / "a.png") == ["b", "a", "clip"]
    assert names(folder / "notes.txt") == ["notes"]
    save_image(folder / "a[1].png", 0)  # not a pattern
    assert names(folder / "a[1].png") == ["a[1]"]


def test_names_stay_apart_and_differ_in_more_than_their_case(folder):
    save_image(folder / "A.jpg", 0)
    assert names(folder / "**" / "*.png", folder / "A.jpg") == ["a", "a_2", "A_3"]


def test_names_leave_room_for_an_ending(tmp_path):
    stems = ["x" * 251, "y" * 255, "ä" * 126 + "z"]
    for stem, extension in zip(stems, (".png", "", ""), strict=True):
        (tmp_path / f"{stem}{extension}").touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / f"{stems[0]}.jpg").touch()
    found = names(*sorted(tmp_path.glob("?*[xyz]*")), tmp_path / "below")
    assert found == [stems[0], "y" * 251, "ä" * 125, "x" * 249 + "_2"]


@pytest.mark.parametrize(
    "word, message",
    [
        ("nowhere.jpg", "nowhere.jpg does not exist"),
        ("*.webp", "no file matches .*webp"),
        ("empty", r"empty has no images or videos in it .*\.jpg.* a pattern, such as .*empty/\*\*/\*\.jpg"),
    ],
)
def test_words_that_mean_nothing_are_named(folder, word, message):
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        find_sources([str(folder / word)])


def test_images_are_upright_rgb_whatever_they_are_stored_as(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3] = (255, 0, 0)  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "grey.png")
    (turned,), (grey,) = (frames(tmp_path / name) for name in ("turned.png", "grey.png"))
    assert turned.image.shape == (6, 4, 3)
    assert (turned.image[:3] == (255, 0, 0)).all() and not turned.image[3:].any()
    assert (grey.image[:, :3] == 255).all() and grey.image.shape == (4, 6, 3)
    assert turned.index is None and turned.rate is None


# OpenCV ends the program with a name that is not UTF-8.
@pytest.mark.parametrize("name", ["clip.avi", os.fsdecode(b"cl\xffip.avi"), "a\nb.avi"])
def test_a_video_is_its_frames_in_rgb_with_their_rate(tmp_path, name):
    colours = (40, 120, 200)
    path = save_video(tmp_path / name, [np.full((48, 64, 3), (red, 0, 0), np.uint8) for red in colours])
    (source,) = find_sources([path])
    assert source.num_frames() == 3
    found = frames(path)
    assert [f.index for f in found] == [0, 1, 2] and {f.rate for f in found} == {12.0}
    for frame, red in zip(found, colours, strict=True):
        assert frame.image.shape == (48, 64, 3)
        assert np.abs(frame.image.mean((0, 1)) - (red, 0, 0)).max() < 8  # JPEG


def test_a_video_that_is_cut_off_gives_its_frames_and_then_an_error(tmp_path):
    generator = np.random.default_rng(0)
    path = save_video(tmp_path / "clip.avi", generator.integers(0, 256, (12, 48, 64, 3), dtype=np.uint8))
    assert len(frames(path)) == 12
    content = (tmp_path / "clip.avi").read_bytes()
    (source,) = find_sources([path])
    for share, least in ((0.9, 9), (0.5, 4)):
        (tmp_path / "clip.avi").write_bytes(content[: int(share * len(content))])
        found = []
        with pytest.raises(ValueError, match="cut off or damaged") as error:
            for frame in read_frames(source):
                found.append(frame)
        assert least <= len(found) < 12
        assert f"{len(found)} of the 12 frames that the video announces could be read" in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("bad.jpg", b"no image", "cannot identify image file"),
        ("empty.png", b"", "cannot identify image file"),
        ("deep.pgm", b"P5 1 1 65535\n\x00\x00", "more than 8 bits"),
        ("bad.mp4", b"no video", "cannot open it as a video"),
        ("empty.mp4", b"", "the file is empty"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        frames(tmp_path / name)


@pytest.mark.parametrize("name", ["pipe.png", "pipe.mp4"])
def test_pipes_are_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (source,) = find_sources([str(tmp_path / name)])
    assert source.num_frames() == 1
    with pytest.raises(ValueError, match="is a pipe or a device, not a file"):
        list(read_frames(source))
