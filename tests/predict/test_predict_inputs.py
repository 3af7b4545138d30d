"""What words of a command line mean, and reading images and videos."""

import cv2
import numpy as np
import pytest
from nano_detector import save_image
from PIL import Image

from rev_det.predict import Source, find_sources, read_frames


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


def test_a_folder_means_its_images_and_videos_in_order(folder):
    sources = find_sources([str(folder)])
    assert [(s.path, s.is_video) for s in sources] == [
        (str(folder / "a.png"), False),
        (str(folder / "b.JPG"), False),
        (str(folder / "clip.mp4"), True),
    ]


def test_patterns_reach_folders_below_and_names_stay_apart(folder):
    assert names(folder / "**" / "*.png") == ["a", "a_2"]


def test_names_differ_in_more_than_their_case(tmp_path):
    save_image(tmp_path / "A.png", 0)
    save_image(tmp_path / "a.jpg", 0)
    assert names(tmp_path / "a.jpg", tmp_path / "A.png") == ["a", "A_2"]


def test_a_file_is_taken_once_where_it_is_named_first(folder):
    assert names(folder / "b.JPG", folder, folder / "below" / ".." / "a.png") == ["b", "a", "clip"]


def test_a_file_named_itself_may_have_any_extension(folder):
    assert [s.path for s in find_sources([str(folder / "notes.txt")])] == [str(folder / "notes.txt")]


@pytest.mark.parametrize(
    "word, message",
    [
        ("nowhere.jpg", "nowhere.jpg does not exist"),
        ("*.webp", "no file matches .*webp"),
        ("empty", "empty has no images or videos in it .*jpg"),
    ],
)
def test_words_that_mean_nothing_are_named(folder, word, message):
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        find_sources([str(folder / word)])


def test_a_folder_whose_images_are_below_says_where(folder):
    (folder / "out").mkdir()
    (folder / "below").rename(folder / "out" / "in")
    pattern = folder / "out" / "**" / "*.png"
    with pytest.raises(FileNotFoundError, match=f"but {folder / 'out' / 'in'} has: .*") as info:
        find_sources([str(folder / "out")])
    assert f'"{pattern}"' in str(info.value) and names(pattern) == ["a"]


def test_a_file_with_the_characters_of_a_pattern_is_itself(tmp_path):
    path = save_image(tmp_path / "a[1].png", 0)
    assert [s.path for s in find_sources([path])] == [path]


def test_images_are_upright_rgb_whatever_they_are_stored_as(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3] = (255, 0, 0)  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "grey.png")
    turned, grey = (
        next(read_frames(Source(str(tmp_path / f"{n}.png"), n, False))) for n in ("turned", "grey")
    )
    assert turned.image.shape == (6, 4, 3)
    assert (turned.image[:3] == (255, 0, 0)).all() and not turned.image[3:].any()
    assert (grey.image[:, :3] == 255).all() and grey.image.shape == (4, 6, 3)
    assert turned.index is None and turned.rate is None


def test_a_video_is_its_frames_in_rgb_with_their_rate(tmp_path):
    path = str(tmp_path / "clip.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 12.0, (64, 48))
    for value in (40, 120, 200):
        writer.write(np.full((48, 64, 3), (0, 0, value), np.uint8))  # BGR: red
    writer.release()
    (source,) = find_sources([path])
    assert source.num_frames() == 3
    frames = list(read_frames(source))
    assert [f.index for f in frames] == [0, 1, 2] and {f.rate for f in frames} == {12.0}
    for frame, value in zip(frames, (40, 120, 200), strict=True):
        assert frame.image.shape == (48, 64, 3)
        assert np.abs(frame.image.mean((0, 1)) - (value, 0, 0)).max() < 8  # JPEG


def test_a_video_that_is_cut_off_gives_its_frames_and_then_an_error(tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12.0, (64, 48))
    for seed in range(12):
        writer.write(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    writer.release()
    (source,) = find_sources([str(path)])
    assert len(list(read_frames(source))) == 12
    content = path.read_bytes()
    for share, least in ((0.9, 9), (0.5, 4)):
        path.write_bytes(content[: int(share * len(content))])
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
        ("bad.mp4", b"no video", "cannot open it as a video"),
        ("empty.mp4", b"", "the file is empty"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    (source,) = find_sources([str(tmp_path / name)])
    with pytest.raises(ValueError, match=message):
        list(read_frames(source))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_grey_of_more_than_eight_bits_is_not_read_as_white(tmp_path, dtype):
    Image.fromarray(np.full((8, 8), 1000, dtype)).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match="more than 8 bits"):
        list(read_frames(Source(str(tmp_path / "deep.tiff"), "deep", False)))


def test_a_truncated_image_is_an_error(tmp_path):
    path = save_image(tmp_path / "cut.png", 0)
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated|broken"):
        list(read_frames(Source(path, "cut", False)))
