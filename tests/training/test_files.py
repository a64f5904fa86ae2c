"""Files are read only if they are regular, and nothing is written through a link in an output folder."""

import io
import os
import socket
import zipfile

import pytest
import torch

from fastunlearn import eraser_files, files


@pytest.mark.parametrize("kind", ["named pipe", "folder", "socket", "device"])
def test_only_regular_files_are_read(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x"
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind("x")
    else:
        path.symlink_to("/dev/zero")
    for read in (files.read_file, files.read_json, files.load_torch, files.check_file, _open_safetensors):
        with pytest.raises(ValueError, match=f"x: expected a file, got a {kind}$"):
            read(path)


def _open_safetensors(path):
    with files.open_safetensors(path):
        pass


def test_missing_files_and_links_that_lead_nowhere(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("none", "link"):
        with pytest.raises(FileNotFoundError):
            files.read_file(tmp_path / name)
    with pytest.raises(OSError, match="loop"):
        files.read_file(tmp_path / "loop")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 3}', r"the key 'a' is there twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": "' + "x" * 3000 + '"}', "expected a file of at most 2000 bytes, got 3009"),
        ('{"' + "k" * 500 + '": 1, "' + "k" * 500 + '": 2}', "is there twice"),
    ],
)
def test_json_is_refused_in_a_short_line(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        files.read_json(tmp_path / "x.json", allow_nan=False, most=2000 if "3009" in message else 1 << 20)
    assert len(str(error.value)) < 500


def test_nothing_is_written_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    output = tmp_path / "output"
    output.mkdir()
    for name in ("a.json", "a.json.partial"):
        (output / name).symlink_to(outside)
    files.write_json(output / "a.json", {"a": 1})
    assert outside.read_text() == "mine"
    assert files.read_json(output / "a.json") == {"a": 1} and not (output / "a.json").is_symlink()
    (output / "logs").symlink_to(tmp_path)
    with pytest.raises(FileExistsError, match="logs: expected a folder, got a symbolic link"):
        files.subfolder(output, "logs")
    assert files.subfolder(output, "new").is_dir() and files.subfolder(output, "new").is_dir()


def test_of_a_link_only_the_link_is_deleted(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine").write_text("mine")
    output = tmp_path / "output"
    (output / "folder").mkdir(parents=True)
    (output / "folder" / "inner").symlink_to(tmp_path / "kept")
    (output / "link").symlink_to(tmp_path / "kept")
    (output / "nowhere").symlink_to("none")
    (output / "file").write_text("")
    files.remove_folder(output / "link")
    files.remove_folder(output / "folder")
    for name in ("nowhere", "file"):
        files.delete(output / name)
    assert not list(output.iterdir()) and (tmp_path / "kept" / "mine").read_text() == "mine"


def test_a_small_file_cannot_claim_large_tensors(tmp_path):
    (tmp_path / "eraser_config.json").write_text('{"eraser_type": "adapter", "eraser_rank": 3000000}')
    huge = torch.zeros(1).expand(3_000_000, 1920)
    torch.save({"blocks.0.attn2.adapter": {"down.weight": huge}}, tmp_path / "eraser_weights.pt")
    with pytest.raises(ValueError, match=r"eraser_weights.pt: .* bytes that claim to hold 23040000000$"):
        eraser_files.read(tmp_path)

    packed = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "eraser_weights.pt") as source, zipfile.ZipFile(packed, "w", 8) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, bytes(10_000_000))
    (tmp_path / "eraser_weights.pt").write_bytes(packed.getvalue())
    with pytest.raises(ValueError, match="bytes that claim to hold"):
        eraser_files.read(tmp_path)


def test_errors_are_one_bounded_line():
    assert files.one_line("a\n  b\n\n") == "a b"
    assert files.one_line(ValueError()) == "ValueError"
    assert len(files.one_line("x" * 2_000_000)) < 620
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert files.shown(deep) == "a list of very many levels"
