"""Text: where it comes from, and how windows walk over it."""

import errno
import hashlib
import io
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlstm.text import UserError
from fastlstm.text.data import corpus, sources


def test_the_standard_library_is_the_same_every_time():
    first, second = corpus.load(["stdlib"]), corpus.load(["stdlib"])
    assert first.sha256 == second.sha256
    assert first.data.size > 5_000_000
    text = first.data.tobytes()
    assert b"def dataclass(" in text
    assert b"class TestCase(" in text  # unittest itself, but
    assert b"class Test_TestCase(" not in text  # not its tests
    assert b"build_time_vars = {" not in text  # nor what differs between machines


def test_files_folders_and_globs_are_concatenated_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(b"one ")
    (tmp_path / "b" / "c.txt").write_bytes(b"two ")
    (tmp_path / "b" / "empty").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"never")
    assert corpus.load([str(tmp_path)]).data.tobytes() == b"one two "
    assert corpus.load([str(tmp_path / "*.txt"), str(tmp_path / "b")]).data.tobytes() == b"one two "
    deep = corpus.load([str(tmp_path / "**" / "c.txt"), str(tmp_path / "a.txt")])
    assert deep.data.tobytes() == b"two one "
    assert deep.sha256 == hashlib.sha256(b"two one ").hexdigest()
    assert corpus.load([str(tmp_path / "a.txt")]).occurring == sorted(b"one ")


def test_bytes_have_one_vocabulary_and_characters_that_of_their_text(tmp_path):
    path = tmp_path / "text"
    path.write_text("été", encoding="utf-8")
    whole = corpus.load([str(path)])
    assert whole.occurring == sorted(set("été".encode()))
    assert whole.vocabulary == list(range(256))
    assert corpus.load([str(path)], "char").vocabulary == [ord("t"), ord("é")]


@given(data=st.binary(min_size=2, max_size=60), end=st.integers(0, 70))
def test_characters_are_counted_up_to_a_place(data, end):
    text = corpus.Corpus(np.frombuffer(data, np.uint8), sorted(set(data)), "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", 7)
        assert text.counts(end).tolist() == [data[:end].count(v) for v in range(256)]
        patch.setattr(corpus, "COUNTED", 9)
        text.read_as(text.occurring)
        counted = data[: min(end, 9)]
        assert text.counts(end).tolist() == [counted.count(v) for v in text.occurring]


def test_a_large_file_is_mapped_not_read(tmp_path, monkeypatch):
    path = tmp_path / "big"
    path.write_bytes(bytes(range(256)) * 10)
    monkeypatch.setattr(corpus, "LARGE", 2560)
    monkeypatch.setattr(corpus, "spooled", None)
    data = corpus.load([str(path)]).data
    assert isinstance(data, np.memmap)
    assert data.tobytes() == path.read_bytes()


def test_a_file_may_change_while_it_is_read(tmp_path):
    """An editor that saves cuts it to nothing first, which a mapped file would not survive."""
    path = tmp_path / "notes"
    path.write_bytes(b"a note\n" * 900)
    text = corpus.load([str(path)])
    path.write_bytes(b"")
    assert text.indices(np.arange(6300))[-7:].tolist() == list(b"a note\n")


def test_a_full_temporary_folder_is_named(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(corpus.tempfile, "TemporaryFile", Full)
    monkeypatch.setattr(corpus.tempfile, "gettempdir", lambda: "/full")
    path = tmp_path / "text"
    path.write_bytes(b"some text\n")
    with pytest.raises(UserError, match="--data: cannot write to /full: No space left on device"):
        corpus.load([str(path)])


def test_standard_input(monkeypatch):
    stdin = SimpleNamespace(buffer=io.BytesIO(b"from a \xff pipe"))
    monkeypatch.setattr(sys, "stdin", stdin)
    text = corpus.load(["-"])
    assert text.data.tobytes() == b"from a \xff pipe"
    assert text.summary == "read standard input, 13 bytes"


def test_downloads_are_fetched_and_checked(tmp_path, monkeypatch, capsys):
    """And whoever trains learns where the text is kept, and how to have it downloaded again."""
    pooch = pytest.importorskip("pooch")
    path = tmp_path / "page"
    path.write_bytes(b"from the network")
    asked, bars = [], []

    def retrieve(url, known_hash, path, downloader):
        asked.append((url, known_hash))
        if "nowhere" in url:
            raise OSError("no route\nto host")
        if "new" in url:
            downloader(url, "a file", None)
        return tmp_path / "page"

    class HTTPDownloader:
        def __init__(self, progressbar):
            bars.append(progressbar)

        def __call__(self, url, output_file, pooch):
            assert output_file == "a file"

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.setattr(pooch, "HTTPDownloader", HTTPDownloader)
    assert corpus.load(["https://example.org/x"]).data.tobytes() == b"from the network"
    corpus.load(["shakespeare"])
    assert asked == [
        ("https://example.org/x", None),
        (sources.SHAKESPEARE_URL, f"sha256:{sources.SHAKESPEARE_SHA256}"),
    ]
    said = capsys.readouterr().out
    assert "downloading" not in said
    assert f"kept in {path}; delete that file to download it again" in said
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        corpus.load(["https://example.org/new"])
        assert "downloading https://example.org/new\n" in capsys.readouterr().out
    assert bars == [False, True]  # a bar on a terminal
    with pytest.raises(UserError, match=r"cannot fetch https://nowhere/: no route$"):
        corpus.load(["https://nowhere/"])


def binary_and_run(folder):
    """A folder of two texts, and of what is no text: an image, a run, a hidden folder."""
    (folder / "a.txt").write_bytes(b"one ")
    (folder / "b").mkdir()
    (folder / "b" / "c.md").write_bytes("zwö ".encode("latin-1"))  # no UTF-8, and text
    (folder / "b" / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("never")
    run = folder / "runs" / "x"
    (run / "checkpoints" / "best").mkdir(parents=True)
    (run / "checkpoints" / "best" / "meta.json").write_text("{}")
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("12")
    return folder


def test_a_folder_is_read_without_what_is_no_text(tmp_path):
    """And says how much it read and left out; naming a thing has it read."""
    binary_and_run(tmp_path)
    text = corpus.load([str(tmp_path)])
    assert text.data.tobytes() == b"one zw\xf6 "
    assert text.summary == (
        "read 2 files, 8 bytes; left out 1 binary file, 1 hidden path, 1 run folder "
        "(--data reads each of them by its name)"
    )
    globbed = corpus.load([str(tmp_path / "**" / "*")])
    assert globbed.data.tobytes() == text.data.tobytes()
    assert "read 2 files, 8 bytes; left out 1 binary file, 1 run folder (" in globbed.summary
    image = tmp_path / "b" / "image.png"
    named = corpus.load([str(image), str(tmp_path / "runs" / "x")])
    assert named.data.tobytes() == image.read_bytes() + b"{}" + b"{}" + b"12"
    assert named.summary == f"read 4 files, {image.stat().st_size + 6} bytes"
    deep = corpus.load([str(tmp_path / "runs" / "x" / "*.jsonl")])
    assert (deep.data.tobytes(), deep.summary) == (b"12", "read 1 file, 2 bytes")


def test_links_have_no_file_read_twice(tmp_path):
    """In a glob `**` follows links, also into a folder above."""
    (tmp_path / "text" / "sub").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    (tmp_path / "text" / "sub" / "a.txt").write_bytes(b"one ")
    (tmp_path / "far" / "b.txt").write_bytes(b"two ")
    (tmp_path / "text" / "sub" / "link.txt").symlink_to(tmp_path / "text" / "sub" / "a.txt")
    (tmp_path / "text" / "loop").symlink_to(tmp_path / "text")
    (tmp_path / "text" / "far").symlink_to(tmp_path / "far")
    globbed = corpus.load([str(tmp_path / "text" / "**" / "*.txt")])
    assert globbed.data.tobytes() == b"two one "
    assert "read 2 files, 8 bytes; left out " in globbed.summary
    assert " repeated files (" in globbed.summary
    folder = corpus.load([str(tmp_path / "text")])
    assert folder.data.tobytes() == b"one "
    assert "left out 2 linked folders, 1 repeated file (" in folder.summary


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Whatever the user; root may read all."""
    (tmp_path / "a.txt").write_bytes(b"one ")
    scan = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"Permission denied: '{tmp_path / 'closed'}'"):
        corpus.load([str(tmp_path)])


def test_a_pipe_by_name_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"is a pipe, which cannot be read a second time.*--data -"):
        corpus.load([str(tmp_path / "pipe")])


def test_a_folder_without_text_is_refused_with_what_was_left_out(tmp_path):
    binary_and_run(tmp_path)
    (tmp_path / "b" / "c.md").unlink()
    for spec, what in (("b", "1 binary file"), ("runs", "1 run folder"), ("b/*", "1 binary file")):
        with pytest.raises(UserError, match=f"{spec[0]}.* holds no text: left out {what} "):
            corpus.load([str(tmp_path / spec)])


def test_what_is_no_corpus_is_refused(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "one").write_bytes(b"a")
    (tmp_path / "folder").mkdir()
    for spec, message in (
        ("empty", "is empty"),
        ("one", "is one character long"),
        ("folder", "holds no files"),
        ("missing", "is no file, folder, glob that matches, URL or name of a corpus"),
        ("*.md", "is no file, folder, glob"),
        ("x" * 5000, "cannot read|is no file"),
        ("a\0b", "cannot read|is no file"),
    ):
        with pytest.raises(UserError, match=message):
            corpus.load([str(tmp_path / spec)])


@given(
    size=st.integers(2, 300),
    begin=st.integers(0, 20),
    batch=st.integers(1, 9),
    steps=st.integers(1, 40),
    partial=st.booleans(),
)
def test_every_stream_reads_on_where_it_stopped(size, begin, batch, steps, partial):
    data = np.random.default_rng(0).integers(0, 7, begin + size, dtype=np.uint8)
    text = corpus.Corpus(data, np.unique(data).tolist(), "")
    vocabulary = text.occurring
    text.read_as(vocabulary)
    streams = corpus.Streams(text, begin, begin + size, batch, steps, partial)
    length = (size - 1) // batch
    assert streams.windows == (-(-length // steps) if partial else length // steps)
    windows = [streams.window(j) for j in range(streams.windows)]
    if not windows:
        return
    read = length if partial else streams.windows * steps
    for row in range(batch):
        x, y = (torch.cat([w[side][:, row] for w in windows]) for side in (0, 1))
        start = begin + row * length
        expected = [vocabulary.index(v) for v in data[start : start + read + 1]]
        assert x.tolist() == expected[:-1]
        assert y.tolist() == expected[1:]


def test_folders_are_named_after_the_text():
    for specs, name in (
        (["stdlib"], "stdlib"),
        (["/data/My Book.txt"], "My-Book"),
        (["books/*"], "books"),
        (["-"], "stdin"),
        (["???"], "text"),
    ):
        assert corpus.slug(specs) == name
