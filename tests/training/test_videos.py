"""Video files, pictures of their frames, and files that are written completely or not at all."""

from __future__ import annotations

import os
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastunlearn.files import writable, write_json
from fastunlearn.training.data import comparison, fonts, videos
from fastunlearn.training.data.comparison import side_by_side, write_strip
from fastunlearn.training.data.videos import check_ffmpeg, enlarged, read_first_frames, read_video, write_video


def moving(frames: int = 5, height: int = 32, width: int = 48, colour: tuple[float, ...] = (0.9, 0.2, 0.1)) -> Tensor:
    """A coloured square that moves across a grey background."""
    video = torch.full((frames, 3, height, width), 0.3)
    for index in range(frames):
        video[index, :, 8:20, 4 + 4 * index : 16 + 4 * index] = torch.tensor(colour)[:, None, None]
    return video


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_a_video_survives_being_written_and_read(tmp_path: Path, ending: str) -> None:
    video = moving()
    write_video(tmp_path / f"a.{ending}", video, 8)
    again = read_video(tmp_path / f"a.{ending}")
    assert again.shape == video.shape
    assert again.dtype == torch.float32
    assert (again - video).abs().mean() < 0.01
    # The right frames in the right order: no other frame is nearer.
    distances = (again[:, None] - video[None]).abs().mean((2, 3, 4))
    assert distances.argmin(1).tolist() == list(range(5))
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{ending}"]


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_frames_that_repeat_are_kept(tmp_path: Path, ending: str) -> None:
    write_video(tmp_path / f"a.{ending}", moving(1).repeat(6, 1, 1, 1), 8)
    assert len(read_video(tmp_path / f"a.{ending}")) == 6


def test_mp4_doubles_the_last_row_and_column_of_odd_sizes(tmp_path: Path) -> None:
    video = moving(3, 21, 33)
    write_video(tmp_path / "a.mp4", video, 8)
    again = read_video(tmp_path / "a.mp4")
    assert again.shape == (3, 3, 22, 34)
    assert (again[:, :, :21, :33] - video).abs().mean() < 0.02
    write_video(tmp_path / "a.gif", video, 8)
    assert read_video(tmp_path / "a.gif").shape == video.shape


def test_values_beyond_the_range_are_clamped(tmp_path: Path) -> None:
    video = torch.cat([torch.full((1, 3, 16, 16), 1.7), torch.full((1, 3, 16, 16), -0.5)])
    write_video(tmp_path / "a.gif", video.to(torch.bfloat16), 4)
    assert read_video(tmp_path / "a.gif").flatten(1).unique(dim=1).tolist() == [[1.0], [0.0]]


def test_the_frame_rate_is_in_the_file(tmp_path: Path) -> None:
    import imageio_ffmpeg

    write_video(tmp_path / "a.mp4", moving(8), 16)
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(tmp_path / "a.mp4")
    assert (frames, seconds) == (8, pytest.approx(0.5, abs=0.02))


def test_errors_name_the_file_that_is_not_a_video(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.mp4"):
        read_video(tmp_path / "none.mp4")
    for ending in ("mp4", "gif"):
        path = tmp_path / f"text.{ending}"
        path.write_text("not a video")
        with pytest.raises(ValueError, match=f"text.{ending}: expected .* cannot be read as one"):
            read_video(path)


@pytest.mark.parametrize("name", ["10:30.mp4", "-y.mp4", "100%d.mp4", "a b 'c'.gif"])
def test_unusual_file_names_work(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(name, moving(2), 8)
    assert read_video(name).shape == (2, 3, 32, 48)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failed_write_keeps_the_existing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving(), 8)
    before = path.read_bytes()
    monkeypatch.setattr(videos, "_MP4", ("-c:v", "no-such-encoder", "-f", "mp4"))
    with pytest.raises(OSError, match=r"a\.mp4: cannot be written: .*no-such-encoder|a\.mp4: cannot be written"):
        write_video(path, moving(2), 8)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_video(tmp_path / "no folder" / "a.gif", moving(), 8)


@pytest.mark.parametrize(
    ("frames", "fps", "name", "error", "message"),
    [
        (torch.zeros(2, 4, 8, 8), 8, "a.mp4", ValueError, r"expected shape \(F, 3, H, W\)"),
        (torch.zeros(0, 3, 8, 8), 8, "a.mp4", ValueError, r"expected shape \(F, 3, H, W\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 8, "a.mp4", TypeError, "floating-point"),
        (torch.zeros(2, 3, 8, 8), 0, "a.mp4", ValueError, "fps"),
        (torch.zeros(2, 3, 8, 8), 8, "a.avi", ValueError, "ends in"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, frames: Tensor, fps: float, name: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_video(tmp_path / name, frames, fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "factor"), [((16, 24), 8), ((20, 95), 3), ((100, 191), 2), ((10, 192), 1)])
def test_small_frames_are_enlarged_by_a_whole_factor(size: tuple[int, int], factor: int) -> None:
    frames = torch.rand(2, 3, *size)
    larger = enlarged(frames)
    assert larger.shape == (2, 3, factor * size[0], factor * size[1])
    for row in (0, factor - 1):
        assert torch.equal(larger[:, :, row::factor, factor - 1 - row :: factor], frames)


def test_side_by_side_keeps_the_pixels_below_the_labels() -> None:
    before, after = moving(), moving(colour=(0.1, 0.2, 0.9))
    joined = side_by_side([before, after], ["before", "after"])
    assert torch.equal(joined[:, :, -32:, :48], before)
    assert torch.equal(joined[:, :, -32:, -48:], after)
    top = joined[0, :, :-32]
    assert (top[..., :48].min() < 0.6) and (top[..., -48:].min() < 0.6)  # ink over both
    with pytest.raises(ValueError, match="as the first video has"):
        side_by_side([before, after[:2]], ["before", "after"])
    with pytest.raises(ValueError, match="one per video"):
        side_by_side([before, after], ["before"])


def test_a_strip_shows_frames_from_first_to_last(tmp_path: Path) -> None:
    before, after = moving(9), moving(9, colour=(0.1, 0.2, 0.9))
    write_strip(tmp_path / "a.png", [before, after], ["before", "after"], "a red square", frames=3)
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).float() / 255
    scale = 180 // 48
    rows = [
        torch.cat([video[index].permute(1, 2, 0).repeat_interleave(scale, 0).repeat_interleave(scale, 1)], 0)
        for video in (before, after)
        for index in (0, 4, 8)
    ]
    height, width = 32 * scale, 48 * scale
    bottom, right = picture.shape[0] - 14, picture.shape[1] - 14
    for number, image in enumerate(rows):
        row, column = divmod(number, 3)
        y = bottom - (2 - row) * height - (1 - row) * 4
        x = right - (3 - column) * width - (2 - column) * 4
        torch.testing.assert_close(picture[y : y + height, x : x + width], image, atol=1 / 255, rtol=0)
    assert picture[: bottom - 2 * height - 4].min() < 0.5  # the title
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_large_frames_are_reduced_and_long_titles_wrap(tmp_path: Path) -> None:
    video = torch.rand(2, 3, 96, 480)
    write_strip(tmp_path / "a.png", [video], ["before"], "a word " * 400)
    width, height = Image.open(tmp_path / "a.png").size
    assert 480 < width < 700
    assert height < 48 + 3 * 22 + 60


def test_a_failed_write_of_json_keeps_the_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_into_is_refused(tmp_path: Path) -> None:
    assert writable(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        writable(tmp_path / "file")


@pytest.mark.parametrize("text", ["a red circle " * 40, "красныйкруг" * 60, "w" * 700])
def test_a_title_of_any_script_stays_inside_its_lines(text: str) -> None:
    font = comparison._font(16, text)
    lines = comparison._wrapped(text, font, 500)
    assert len(lines) == 3
    assert all(0 < font.getlength(line) <= 500 for line in lines)
    assert lines[-1].endswith(" …")
    assert text.startswith(lines[0])
    assert comparison._wrapped("short", font, 500) == ["short"]
    assert comparison._wrapped("", font, 500) == []


@pytest.fixture
def matplotlib_s_fonts_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """They have no Chinese letters, whatever this machine has installed."""
    entries = [font for font in fonts.fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(fonts.fontManager, "ttflist", entries)
    fonts.font_for.cache_clear()
    yield
    fonts.font_for.cache_clear()


@pytest.mark.parametrize("text", ["狗", "a dog 狗", "강아지", "कुत्ता", "หมา"])
def test_letters_that_no_font_has_are_never_drawn(text: str, tmp_path: Path, matplotlib_s_fonts_alone: None) -> None:
    assert fonts.font_for(text) is None

    def strip(label: str, title: str) -> bytes:
        write_strip(tmp_path / "a.png", [moving(2)], [label], title)
        return (tmp_path / "a.png").read_bytes()

    with pytest.warns(UserWarning, match=f"^title: expected letters that an installed font has, got '{text}'; nothing"):
        assert strip("before", text) == strip("before", "")
    with pytest.warns(UserWarning, match=r"^labels: expected .*; numbers are shown in their place. Install a font"):
        assert strip(text, "a dog") == strip("1", "a dog")
    with pytest.warns(UserWarning, match="^labels: expected"):
        assert torch.equal(side_by_side([moving(2)], [text]), side_by_side([moving(2)], ["1"]))


def test_a_font_has_every_letter_of_a_text(matplotlib_s_fonts_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("", "a dog\u200b", "“é” → Ω", "собака", "😀"):
        assert fonts.font_for(text).name == "DejaVu Sans"
    assert fonts.font_for("\U0001d538").name != "Last Resort High-Efficiency"
    letters = fonts._letters
    monkeypatch.setattr(fonts, "_letters", lambda font: letters(font) | ({0x72D7} if "Serif" in font.name else set()))
    assert fonts.font_for("狗 dog").name == "DejaVu Serif"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made(name, options of ffmpeg)`: a test pattern of 320 x 240 pixels, 25 frames per second, as a video file."""
    import imageio_ffmpeg

    folder = tmp_path_factory.mktemp("videos")

    def make(name: str, *arguments: str, seconds: float = 1) -> Path:
        source = ["-f", "lavfi", "-i", f"testsrc2=size=320x240:rate=25:duration={seconds}"]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *source, *arguments, str(folder / name)]
        subprocess.run(command, check=True)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.mp4", ["-pix_fmt", "yuv420p"]),
        ("A.MOV", []),
        ("a.webm", ["-c:v", "libvpx", "-deadline", "realtime"]),
        ("a.mkv", []),
        ("a.avi", []),
        ("a.m4v", ["-pix_fmt", "yuv420p", "-f", "mp4"]),
        ("a.gif", []),
        ("slow.mp4", ["-vf", "setpts='if(lt(N,5),N,3*N)/25/TB'", "-fps_mode", "vfr", "-pix_fmt", "yuv420p"]),
    ],
)
def test_the_first_frames_are_those_of_the_whole_video(
    made: Callable[..., Path], name: str, arguments: Sequence[str]
) -> None:
    path = made(name, *arguments)
    video = read_video(path)
    assert video.shape[0] >= 25 and video.shape[1:] == (3, 240, 320)
    frames = list(read_first_frames(path, 9))
    assert len(frames) == 9
    assert torch.equal(torch.cat(frames), video[:9])
    assert torch.equal(torch.cat(list(read_first_frames(path, 1000))), video)


def test_a_turned_video_is_read_upright(made: Callable[..., Path], tmp_path: Path) -> None:
    import imageio_ffmpeg

    flat, turned = made("flat.mp4", "-pix_fmt", "yuv420p"), tmp_path / "turned.mp4"
    arguments = ["-display_rotation", "90", "-i", str(flat), "-c", "copy", str(turned)]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *arguments], check=True)
    frames = torch.cat(list(read_first_frames(turned, 3)))
    assert frames.shape == (3, 3, 320, 240)
    assert (frames - read_video(flat)[:3].rot90(1, (2, 3))).abs().mean() < 0.02


def test_a_long_video_is_not_decoded_whole(made: Callable[..., Path]) -> None:
    path = made("long.mp4", "-pix_fmt", "yuv420p", "-preset", "ultrafast", seconds=30)
    one_frame = 240 * 320 * 3
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_first_frames(path, 9)) == 9
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * one_frame  # of 750


def test_ffmpeg_ends_when_no_more_frames_are_asked_for(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made("a.mp4", "-pix_fmt", "yuv420p", seconds=5)
    processes: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen
    monkeypatch.setattr(
        videos.subprocess, "Popen", lambda *args, **kwargs: processes.append(start(*args, **kwargs)) or processes[-1]
    )
    frames = read_first_frames(path, 125)
    next(frames)
    frames.close()  # type: ignore[attr-defined]
    assert len(processes) == 1
    assert processes[0].returncode is not None


def test_files_without_a_video_are_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    import imageio_ffmpeg

    sound = tmp_path / "sound.mp4"
    source = ["-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, str(sound)], check=True)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(made("a.mp4", "-pix_fmt", "yuv420p").read_bytes()[:2000])
    playlist = tmp_path / "playlist.mp4"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    for path in (sound, cut, playlist):
        with pytest.raises(ValueError, match=f"{path.name}: expected a video, got a file that cannot be read as one"):
            list(read_first_frames(path, 9))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["pipe.mp4", "pipe.gif", "device.mp4", "folder.mp4"])
def test_what_is_no_file_is_not_read_as_a_video(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.startswith("pipe"):
        os.mkfifo(path)
        got = "a named pipe"
    elif name.startswith("device"):
        path.symlink_to("/dev/zero")
        got = "a device"
    else:
        path.mkdir()
        got = "a folder"
    for read in (read_video, lambda path: next(read_first_frames(path, 3))):
        with pytest.raises(ValueError, match=f"{name}: expected a file, got {got}$"):
            read(path)


def test_a_gif_may_have_one_frame_and_transparent_parts(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 255, 0))
    picture.save(tmp_path / "one.gif")
    frame = read_video(tmp_path / "one.gif")
    assert frame.shape == (1, 3, 2, 4)
    assert frame[0, :, 0, :2].T.tolist() == [[1, 0, 0], [1, 1, 1]]  # as a browser shows it
    picture.save(tmp_path / "two.gif", save_all=True, append_images=[Image.new("RGBA", (4, 2), (0, 255, 0, 255))])
    assert len(list(read_first_frames(tmp_path / "two.gif", 9))) == 2
    (tmp_path / "cut.gif").write_bytes((tmp_path / "two.gif").read_bytes()[:30])
    with pytest.raises(ValueError, match="cut.gif: expected a gif, got a file that cannot be read as one"):
        read_video(tmp_path / "cut.gif")


def test_a_missing_ffmpeg_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", missing)
    message = "^ffmpeg: expected a program to read and write videos with, got none .No ffmpeg exe could be found.*"
    for check in (None, "mp4", "gif"):
        with pytest.raises(OSError, match=message):
            check_ffmpeg(check)
    with pytest.raises(OSError, match=message):
        write_video(tmp_path / "a.mp4", torch.zeros(2, 3, 8, 8), 8)
    assert not any(tmp_path.iterdir())
