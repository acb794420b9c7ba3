"""What lies in folders besides pictures: hidden, linked, of other kinds; the same for every command
that is given a folder.
"""

import os
import shutil

import numpy as np
import pytest
from loading import INPUTS
from PIL import Image

from ovseg.cli.main import main
from ovseg.data.folders import UNREAD, Folder, hidden, look
from ovseg.data.images import SUFFIXES
from ovseg.data.sources.folder import FolderPairs
from ovseg.data.sources.folder import Options as FolderOptions
from ovseg.data.superpixels import SuperpixelFile
from ovseg.errors import DataError, InputError
from ovseg.evaluation.classification import ClassFolders
from ovseg.inference.sources import find_pictures


def picture(path, size=(12, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.random.default_rng(len(path.name)).integers(0, 255, (*size, 3), np.uint8)
    ).save(path, "PNG")
    return path


def socket_at(path):
    import socket

    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))  # a path of at most 108 bytes


def loop(path):
    (path.parent / "other.png").symlink_to("x.png")
    path.symlink_to("other.png")


BAD = {  # what is put at x.png, or at a name of its own -> what is said
    "a link to nothing": (lambda path: path.symlink_to("gone.png"), "x.png is a link to nothing"),
    "links that lead to each other": (loop, "x.png is a link that leads back to itself"),
    "a FIFO": (os.mkfifo, "x.png is a FIFO"),
    "a socket": (socket_at, "x.png is a socket"),
    "a folder named like a picture": (
        lambda path: path.mkdir(),
        "x.png: a folder that is named like a picture",
    ),
    "a link to a folder": (
        lambda path: (path.parent / "sub").symlink_to(".."),
        "sub: a link to a folder, which is not followed",
    ),
    "a link to no folder": (
        lambda path: (path.parent / "sub").symlink_to("gone"),
        "sub is a link to nothing",
    ),
    "a format that is not read (.heic)": (
        lambda path: path.with_suffix(".HEIC").write_bytes(b"x"),
        "pictures that end in .heic are not",
    ),
    "a raw picture of a camera (.nef)": (
        lambda path: path.with_suffix(".nef").write_bytes(b"x"),
        "pictures that end in .nef are not",
    ),
}


@pytest.fixture(
    params=[
        pytest.param(what, marks=pytest.mark.bad_input("pictures", f"in a folder: {what}"), id=what)
        for what in BAD
    ]
)
def strange(request, tmp_path, monkeypatch):
    """(folder with two good pictures and something else, what must be said)."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "deep/b.png"):
        picture(tmp_path / "classes" / "one" / name).with_suffix(".txt").write_text("gravel")
    make, message = BAD[request.param]
    make(tmp_path / "classes" / "one" / "x.png")
    return tmp_path / "classes" / "one", message


def test_strange_files_are_named_and_counted_everywhere(strange, tmp_path, capsys, caplog):
    root, message = strange
    seen = look(root)
    assert seen.pictures == ["a.png", "deep/b.png"] and message in "\n".join(seen.bad)
    found, problems = find_pictures([str(root)])
    assert [source.name for source in found] == ["a", "deep/b"] and problems == seen.bad
    capsys.readouterr()
    out = tmp_path / "s.safetensors"
    assert main(["data", "superpixels", str(root), "--out", str(out), "--min-size", "4"]) == 3
    printed = capsys.readouterr()
    assert (
        f"2 pictures cut up into {out}" in printed.out
        and f"{len(seen.bad)} skipped" in printed.out
        and message in printed.err
    )
    assert len(SuperpixelFile(out)) == 2
    assert len(FolderPairs(root, INPUTS)) == 2 and seen.bad[0] in caplog.text
    (root / "x.txt").write_text("gravel")  # captions do not make a picture of it
    assert len(FolderPairs(root, INPUTS)) == 2
    data = ClassFolders(root.parent)
    assert len(data.items) == 2 and data.bad == seen.bad


def test_the_command_counts_them_and_goes_on(strange, tmp_path, capsys):
    root, message = strange
    command = [
        "segment",
        str(root),
        "-m",
        "pacl_tiny",
        "--labels",
        "gravel,grass",
        "--format",
        "json",
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(command) == 3
    printed = capsys.readouterr()
    assert "2 pictures into" in printed.out and printed.err.count(message) == 1


HIDDEN = (
    ".ipynb_checkpoints/a-checkpoint.png",
    "._a.png",
    ".hidden.png",
    ".part.a.png",
    "__MACOSX/a.png",
    "@eaDir/a.png",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.bad_input("pictures", f"hidden: {name}"), id=name)
        for name in HIDDEN
    ],
)
def test_hidden_ones_are_left_out_everywhere_and_it_is_said_once(
    name, tmp_path, monkeypatch, capsys, caplog
):
    for good in ("a.png", "deep/b.png"):
        picture(tmp_path / "in" / "one" / good).with_suffix(".txt").write_text("gravel")
    picture(tmp_path / "in" / "two" / "c.png").with_suffix(".txt").write_text("grass")
    picture(tmp_path / "in" / name).with_suffix(".txt").write_text("gravel")
    picture(tmp_path / "in" / "one" / "deep" / name)
    assert (
        look(tmp_path / "in").pictures == ["one/a.png", "one/deep/b.png", "two/c.png"]
        and look(tmp_path / "in").bad == []
    )
    found, problems = find_pictures([str(tmp_path / "in")])
    said = capsys.readouterr().err
    assert (
        len(found) == 3
        and problems == []
        and said.count("hidden files and folders are left out") == 1
        and name.split("/")[0] in said
    )
    assert len(find_pictures([str(tmp_path / "in" / "**" / "*.png")])[0]) == 3
    assert len(FolderPairs(tmp_path / "in", INPUTS)) == 3 and caplog.text.count("are left out") == 1
    caplog.clear()
    data = ClassFolders(tmp_path / "in")
    assert data.labels.names == ("one", "two") and len(data.items) == 3 and data.bad == []
    assert caplog.text.count("hidden files and folders are left out") == 1
    # A folder that is itself hidden may be given, and a file by its name.
    assert len(find_pictures([str(tmp_path / "in" / name)])[0]) == 1
    shutil.move(tmp_path / "in", tmp_path / ".in")
    assert len(look(tmp_path / ".in").pictures) == 3


def test_other_files_are_counted_and_said(tmp_path, capsys):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name).with_suffix(".txt").write_text("x")
    (tmp_path / "README").write_text("x")
    found, problems = find_pictures([str(tmp_path)])
    assert len(found) == 2 and problems == []
    assert (
        "3 files are no pictures and are left out: 2 .txt, 1 no suffix" in capsys.readouterr().err
    )


FOREIGN = {
    "shards": ("0.tar", "unpack them"),
    "tables": ("train.parquet", "1 .parquet"),
    "captions without pictures": ("a.txt", "1 .txt"),
    "pictures that are not read": ("a.heic", "pictures that end in .heic are not read"),
}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=pytest.mark.bad_input("data", f"data.root holds {what}"))
        for what in FOREIGN
    ],
)
def test_folders_without_pictures_say_what_they_hold(what, tmp_path, capsys):
    name, expected = FOREIGN[what]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(b"x")
    (tmp_path / "mine.yaml").write_text("model: {name: pacl_tiny}\ndata: {kind: folder}\n")
    assert main(
        [
            "train",
            str(tmp_path / "mine.yaml"),
            f"data.root={tmp_path / 'in'}",
            f"run={tmp_path / 'run'}",
        ]
    ) in (1, 2)
    assert "holds 0 pictures" in (said := capsys.readouterr().err) and expected in said
    there = look(tmp_path / "in").found()
    for verb in (
        ["segment", str(tmp_path / "in"), "--labels", "gravel"],
        ["data", "superpixels", str(tmp_path / "in"), "--out", "x"],
    ):
        assert main(verb) == 2 and there in capsys.readouterr().err
    with pytest.raises(DataError, match="sub-folders and no picture in them; in the first: "):
        ClassFolders(tmp_path)


@pytest.mark.bad_input("data", "a folder that cannot be opened")
def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    picture(tmp_path / "locked" / "b.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    seen = look(tmp_path)
    assert seen.pictures == ["a.png"] and seen.bad == [
        f"{tmp_path}/locked: the folder cannot be looked through: Permission denied"
    ]


@pytest.mark.bad_input("pictures", "a name that is not UTF-8")
def test_names_that_are_not_utf_8(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    picture(tmp_path / "in" / name).with_suffix(".txt").write_text("gravel")
    picture(tmp_path / "in" / "a.png").with_suffix(".txt").write_text("gravel")
    assert (
        main(
            [
                "data",
                "superpixels",
                str(tmp_path / "in"),
                "--out",
                str(tmp_path / "s.safetensors"),
                "--min-size",
                "4",
            ]
        )
        == 0
    )
    file = SuperpixelFile(tmp_path / "s.safetensors")
    assert len(file) == 2 and name in file and file[name].shape == (12, 16)
    source = FolderPairs(
        tmp_path / "in", INPUTS, FolderOptions(superpixels=tmp_path / "s.safetensors")
    )
    assert list(source.names) == ["a.png", name] and source.sample(1, 0).skipped == ()
    command = [
        "segment",
        str(tmp_path / "in"),
        "-m",
        "pacl_tiny",
        "--labels",
        "gravel",
        "--format",
        "json",
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    assert (tmp_path / "out" / os.fsdecode(b"caf\xe9.json")).is_file()


@pytest.mark.bad_input("pictures", "two names that are one in UTF-8")
def test_names_that_would_be_kept_as_one(tmp_path, capsys):
    picture(tmp_path / "in" / os.fsdecode(b"\xff.png"))
    picture(tmp_path / "in" / "\\xff.png")
    assert (
        main(
            [
                "data",
                "superpixels",
                str(tmp_path / "in"),
                "--out",
                str(tmp_path / "s.safetensors"),
                "--min-size",
                "4",
            ]
        )
        == 3
    )
    assert (
        "would both be kept as" in capsys.readouterr().err
        and len(SuperpixelFile(tmp_path / "s.safetensors")) == 1
    )


GIVEN = {"a folder that is not there": "nowhere", "a file": "file", "a FIFO": "fifo"}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=pytest.mark.bad_input("data", f"as a folder: {what}"))
        for what in GIVEN
    ],
)
def test_what_is_no_folder(what, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    path, words = (
        tmp_path / GIVEN[what],
        {"nowhere": "does not exist", "file": "is a file", "fifo": "is a FIFO"}[GIVEN[what]],
    )
    for make in (look, lambda root: FolderPairs(root, INPUTS), ClassFolders):
        with pytest.raises(DataError, match=words):
            make(path)
    assert (
        main(["data", "superpixels", str(path), "--out", str(tmp_path / "s.safetensors")]) == 2
        and words in capsys.readouterr().err
    )


def test_deep_folders_and_kinds(tmp_path):
    deep = tmp_path
    for _ in range(60):
        deep = deep / "d"
    picture(deep / "a.png")
    assert look(tmp_path).pictures == ["d/" * 60 + "a.png"]
    assert not set(SUFFIXES) & set(UNREAD) and hidden(".a") and not hidden("a.b")
    assert Folder(tmp_path).found() == "nothing"
    with pytest.raises(InputError, match="a name of pictures is empty"):
        find_pictures([""])
