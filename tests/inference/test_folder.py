"""Many pictures: names of results, bad files counted and named, killed and started again, stale
results done again.
"""

import json
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

import ovseg
from ovseg.cli.main import main
from ovseg.errors import InputError
from ovseg.inference.jobs import Journal, fingerprint
from ovseg.inference.sources import find_pictures
from ovseg.replacing import replacing

LABELS = ["--labels", "gravel,grass", "--format", "json"]


def draw(path, size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.random.default_rng(len(path.name)).integers(0, 255, (*size, 3), np.uint8)
    ).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    for name in ("a.png", "b.jpg", "deep/a.png", "deep/c.PNG", "d.png", "d.jpg"):
        draw(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    return tmp_path / "in"


def test_names_mirror_the_folder(photos):
    found = {source.name: source for source in find_pictures([str(photos)])[0]}
    assert (
        sorted(found) == ["a", "b", "d_jpg", "d_png", "deep/a", "deep/c"]
        and found["deep/a"].path == photos / "deep" / "a.png"
    )
    assert sorted(source.name for source in find_pictures([str(photos / "*.jpg")])[0]) == ["b", "d"]
    assert (
        find_pictures(["nowhere.png"])[0][0].name == "nowhere"
    )  # which is named when it cannot be read
    assert len(find_pictures([str(photos), str(photos)])[0]) == 6


@pytest.mark.bad_input("inference", "two pictures of one result name")
def test_names_that_cannot_be(photos, tmp_path):
    draw(tmp_path / "other" / "a.png")
    with pytest.raises(
        InputError, match="would both be written as 'a_png'; expected one folder at a time"
    ):
        find_pictures([str(photos), str(tmp_path / "other")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no picture"):
        find_pictures([str(tmp_path / "empty")])
    with pytest.raises(InputError, match=r"no picture or shard matches .*\*\.webp"):
        find_pictures([str(photos / "*.webp")])


def test_a_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "x.json") as part:
        part.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with replacing(tmp_path / "x.json") as part:
        part.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_done_pictures_are_skipped_until_something_changes(photos, tmp_path, capsys):
    out, command = (
        tmp_path / "out",
        ["segment", str(photos), "-m", "pacl_tiny", *LABELS, "-o", str(tmp_path / "out")],
    )

    def run(*more):
        assert main([*command, *more]) == 0
        return capsys.readouterr().out

    assert (
        "6 pictures into" in run() and "0 pictures" in (again := run()) and "6 done before" in again
    )
    (out / "a.json").unlink()
    assert "1 pictures" in run()  # its file is gone
    draw(photos / "b.jpg", (50, 50))
    assert "1 pictures" in run()  # another picture
    assert "6 pictures" in run("--background-threshold", "0.1")  # another setting
    assert "6 pictures" in run()  # whose results lie there now
    assert "6 pictures" in run("--overwrite")
    with open(out / "ovseg_segment.jsonl", "a") as file:
        file.write('\n{"name": "a", "set')  # cut off by a kill
    assert "6 done before" in run()


@pytest.mark.bad_input("inference", "pictures that cannot be read")
def test_bad_pictures_are_named_and_the_rest_is_done(photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff junk")
    whole = (photos / "b.jpg").read_bytes()
    (photos / "half.jpg").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):  # they are tried again
        assert (
            main(["segment", str(photos), "-m", "pacl_tiny", *LABELS, "-o", str(tmp_path / "out")])
            == 3
        )
        printed = capsys.readouterr()
        assert "2 skipped" in printed.out
        assert all(
            printed.err.count(str(photos / name)) == 1 for name in ("broken.jpg", "half.jpg")
        )  # with its reason
    assert len(list((tmp_path / "out").rglob("*.json"))) == 6


@pytest.mark.third_trial(15)
def test_every_skipped_picture_is_told_once_with_its_reason(photos, tmp_path, capsys):
    """Given twice, of a shard, or of a format that is not read."""
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff junk")
    (photos / "c.nef").write_bytes(b"x")
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        shard.add(photos / "broken.jpg", "inside.jpg")
    command = [
        "segment",
        str(photos),
        str(photos / "*.*"),
        str(tmp_path / "s.tar"),
        "-m",
        "pacl_tiny",
        *LABELS,
    ]
    assert main([*command, "-o", str(tmp_path / "out")]) == 3
    printed = capsys.readouterr()
    told = [line for line in printed.err.splitlines() if line.startswith("skipped: ")]
    assert len(told) == 3 and "3 skipped" in printed.out
    for name, reason in (
        ("broken.jpg", "cannot decode"),
        ("inside.jpg", "cannot decode"),
        ("c.nef", "are not read"),
    ):
        assert printed.err.count(name) == 1 and any(
            name in line and reason in line for line in told
        )


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(tmp_path, capsys):
    """200 pictures of mixed kinds, 20 of them bad."""
    for i in range(180):
        draw(
            tmp_path / "in" / f"{i:03d}.{('png', 'jpg', 'webp', 'bmp')[i % 4]}",
            (20 + i % 50, 30 + i % 37),
        )
    for i in range(20):
        (tmp_path / "in" / f"bad{i}.png").write_bytes(b"\x89PNG\r\n" + bytes(i))
    out, command = (
        tmp_path / "out",
        ["segment", str(tmp_path / "in"), "-m", "pacl_tiny", *LABELS, "-o", str(tmp_path / "out")],
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "ovseg", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    began = time.time()
    while (
        len(list(out.glob("[0-9]*.json"))) < 25
        and time.time() - began < 60
        and child.poll() is None
    ):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = len(list(out.glob("[0-9]*.json")))
    assert 25 <= done < 180, "it was not killed in the middle"
    assert main(command) == 3
    printed = capsys.readouterr()
    assert (
        "20 skipped" in printed.out
        and printed.err.count("skipped: ") == printed.err.count("/bad") == 20
    )
    before = int(printed.out.split(" done before")[0].split()[-1])
    assert done - 1 <= before <= done and f"{180 - before} pictures into" in printed.out
    found = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert len(found) == 180 and all(
        sum(row["area"] for row in one["labels"]) == pytest.approx(1, abs=1e-4) for one in found
    )


def test_fingerprint_changes_with_a_weight(tmp_path):
    torch.manual_seed(0)
    model = ovseg.create_model("pacl_tiny")
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(model) != before
    assert (
        Journal(tmp_path, {"model": before}).key
        != Journal(tmp_path, {"model": fingerprint(model)}).key
    )
