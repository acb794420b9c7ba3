"""Two runs at once: names in between are of one process, a folder or file has one writer, refusals
leave nothing, the dead hold nothing.
"""

import json
import multiprocessing
import os
import queue
import signal
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg import output_lock, replacing
from ovseg.cli.main import main
from ovseg.errors import InputError
from ovseg.output_lock import locked_file, locked_folder
from ovseg.training import state

trial = pytest.mark.third_trial(4)
FORK = multiprocessing.get_context("fork")
GONE = 2**22 + 1  # above the largest number of a process


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(output_lock, "_PATIENCE", 0.0)
    monkeypatch.setattr(output_lock, "_PATIENCE_TOGETHER", 0.3)


def tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else b""
        for path in root.rglob("*")
    }


@trial
@pytest.mark.parametrize("name", ["14.mask.png", "x" * 240 + ".safetensors"])
def test_two_writers_of_one_name_do_not_meet(name, tmp_path):
    target = tmp_path / name
    with replacing.replacing(target) as first:
        with replacing.replacing(target) as second:
            assert first != second and first.suffix == second.suffix == target.suffix
            assert first.name.startswith(".") and len(os.fsencode(first.name)) <= 255
            first.write_text("first")
            second.write_text("second")
        assert target.read_text() == "second"
    assert target.read_text() == "first" and [path.name for path in tmp_path.iterdir()] == [name]


@trial
def test_what_the_dead_were_writing_is_removed(tmp_path):
    left = tmp_path / f".part.{GONE}-0123abcd.14.mask.png"
    folder = tmp_path / f".part.{GONE}-0123abcd.step_00000003"
    own = replacing.part_of(tmp_path / "x.json")
    users = tmp_path / ".part.of.mine"
    folder.mkdir()
    for path in (left, folder / "model.safetensors", own, users):
        path.write_text("half")
    assert replacing.remove_parts(tmp_path.iterdir()) == 2
    assert sorted(tmp_path.iterdir()) == sorted([own, users])
    assert state.complete(tmp_path) == []


@trial
def test_a_second_run_is_told_who_is_there_and_changes_nothing(tmp_path):
    out = tmp_path / "a" / "out"
    with locked_folder(out, "--out", "segment"):
        before = tree(tmp_path)
        with pytest.raises(InputError) as told, locked_folder(out, "--out", "eval"):
            pass
        assert tree(tmp_path) == before
    message = str(told.value)
    assert (
        f"--out {str(out)!r} is being written by `ovseg segment` (process {os.getpid()} on "
        f"{socket.gethostname()}, begun 0." in message
    )
    assert (
        message.endswith("s ago); wait until it ends, stop it, or give another folder")
        and "\n" not in message
    )
    assert tree(tmp_path) == {}  # what was made and stayed empty
    with pytest.raises(RuntimeError), locked_folder(out, "--out", "segment"):
        (out / "result").write_text("")
        raise RuntimeError
    assert tree(tmp_path).keys() == {"a", "a/out", "a/out/result"}


@trial
def test_files_have_locks_of_their_own(tmp_path):
    with (
        locked_file(tmp_path / "a.json", "--json", "bench"),
        locked_file(tmp_path / "b.json", "--json", "bench"),
    ):
        with (
            pytest.raises(InputError, match="give another file"),
            locked_file(tmp_path / "a.json", "--json", "bench"),
        ):
            pass
        with locked_file(tmp_path / ("x" * 251 + ".json"), "--json", "bench"):
            pass
    assert tree(tmp_path) == {}


def hold_until_killed(folder, ready):
    with locked_folder(folder, "--out", "segment"):
        part = replacing.part_of(folder / "deep" / "14.mask.png")
        part.parent.mkdir()
        part.write_text("half")
        ready.set()
        signal.pause()


@trial
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_the_lock_of_a_dead_process_is_taken_over(number, tmp_path, caplog):
    ready = FORK.Event()
    child = FORK.Process(target=hold_until_killed, args=(tmp_path, ready))
    child.start()
    assert ready.wait(30)
    with (
        pytest.raises(InputError, match=f"process {child.pid} on"),
        locked_folder(tmp_path, "--out", "segment"),
    ):
        pass
    os.kill(child.pid, number)
    child.join()
    os.utime(next((tmp_path / "deep").iterdir()), (1, 1))
    with locked_folder(tmp_path, "--out", "segment"):
        assert (
            f"was left by `ovseg segment` (process {child.pid} on" in caplog.text
            and "which has ended; going on" in caplog.text
        )
        assert list((tmp_path / "deep").iterdir()) == []
    assert tree(tmp_path).keys() == {"deep"}


@trial
def test_a_worker_does_not_hold_the_lock_of_its_dead_parent(tmp_path, monkeypatch):
    monkeypatch.setattr(output_lock, "_PATIENCE", 10.0)  # until the worker runs
    done = FORK.Event()
    with locked_folder(tmp_path, "--out", "train"):
        worker = FORK.Process(target=done.wait, args=(30,))
        worker.start()
        for file in output_lock._held:
            os.close(file)  # as the system does when the parent dies
        output_lock._held.clear()
        with locked_folder(tmp_path, "--out", "train"):
            assert worker.is_alive()
    done.set()
    worker.join()


@trial
def test_processes_of_one_run_hold_it_together(tmp_path, monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "MASTER_ADDR": "here",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    with locked_folder(tmp_path / "o", "--out", "segment"):  # whichever comes first
        with locked_folder(tmp_path / "o", "--out", "segment"):
            monkeypatch.setenv("MASTER_PORT", "29501")
            with (
                pytest.raises(InputError, match="is being written by `ovseg segment`"),
                locked_folder(tmp_path / "o", "--out", "segment"),
            ):
                pass
            monkeypatch.delenv("WORLD_SIZE")
            monkeypatch.delenv("RANK")
            with (
                pytest.raises(InputError, match="is being written by"),
                locked_folder(tmp_path / "o", "--out", "segment"),
            ):
                pass
            monkeypatch.setenv("WORLD_SIZE", "2")
            monkeypatch.setenv("RANK", "1")
        assert (tmp_path / "o" / output_lock.NAME).exists()
    assert tree(tmp_path) == {}


@trial
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(file, how):
        raise OSError(output_lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_lock, "_flock", refuse)
    with locked_folder(tmp_path / "o", "--out", "segment"):
        assert (
            "the file system has no locks" in caplog.text
            and "at the same time is not noticed" in caplog.text
        )
    assert not list(tmp_path.rglob(".*"))


def picture(path, side=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(path)


VERBS = {
    "segment": ["segment", "p/a.png", "-m", "pacl_tiny", "--labels", "grass", "-o", "o"],
    "segment --demo": ["segment", "--demo", "-o", "o"],
    "train": ["train", "clip_scenes", "run=o"],
    "train --auto-resume": ["train", "clip_scenes", "run=o", "--auto-resume"],
    "eval": ["eval", "pacl_tiny", "--scenes", "1", "--out", "o"],
    "demo": ["demo", "--out", "o"],
    "convert to a folder": ["convert", "p/a.png", "segclip_vit_b16", "--out", "o"],
    "data check": ["data", "check", "voc20", "--root", "p", "--out", "o"],
    "convert to a file": ["convert", "p", "--out", "f.bin"],
    "bench": ["bench", "--json", "f.json"],
    "data superpixels": ["data", "superpixels", "p", "--out", "f.safetensors"],
    "data entities": ["data", "entities", "p/a.tsv", "--out", "f.tsv"],
    "data cross-pairs": ["data", "cross-pairs", "p", "--out", "f.safetensors"],
    "data browse": ["data", "browse", "--out", "f.png"],
}


@trial
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_writes_is_refused(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "p" / "a.png")
    written = Path(
        next(
            word.removeprefix("run=")
            for word in VERBS[verb]
            if word.removeprefix("run=")[0] in "of" and len(word) != 3
        )
    )
    hold = locked_folder if written.name == "o" else locked_file
    with hold(written, "--out", "segment"):
        before = tree(tmp_path)
        assert main(VERBS[verb]) == 2
        assert tree(tmp_path) == before
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{str(written)!r} is being written by `ovseg segment` (process {os.getpid()}" in err


@trial
def test_what_writes_nothing_needs_no_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "pacl_tiny", "--scenes", "1"]) == 0
    assert main(["train", "clip_scenes", "data.train_size=4", "optim.lr=-1", "run=r"]) == 2
    assert main(["segment", "no.png", "-m", "pacl_tiny", "--labels", "grass", "-o", "a/b"]) == 2
    assert tree(tmp_path) == {}


def at_once(context, line, times=3):
    """Exit codes of ``times`` runs, in processes or threads.

    A forked process cannot compute with torch.
    """
    start, codes = (
        context.Barrier(times),
        queue.Queue() if context is threading else context.SimpleQueue(),
    )

    def call():
        start.wait()
        codes.put(main(line))

    runs = [
        (threading.Thread if context is threading else context.Process)(target=call)
        for _ in range(times)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    return [codes.get() for _ in runs]


@trial
def test_three_at_once_into_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        picture(tmp_path / "many" / f"{i}.png")
    codes = at_once(
        threading,
        [
            "segment",
            "many",
            "-m",
            "pacl_tiny",
            "--labels",
            "grass,sand",
            "--format",
            "mask",
            "-o",
            "o",
        ],
    )
    assert 0 in codes and set(codes) <= {0, 2}
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "0.mask.png",
        "1.mask.png",
        "2.mask.png",
        "ovseg_segment.jsonl",
    ]


@trial
def test_three_conversions_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set.yaml").write_text(
        json.dumps(
            {
                "title": "mine",
                "classes": ["a", "b"],
                "background": False,
                "folders": ["set"],
                "images": "images/{}.jpg",
                "splits": {"val": {"count": 4}},
                "masks": [
                    {"path": "new/{}.png", "values": {"start": 0}},
                    {"path": "masks/{}.png", "values": {"start": 1}},
                ],
            }
        )
    )
    for i in range(4):
        picture(tmp_path / "set" / "images" / f"{i}.jpg")
        (tmp_path / "set" / "masks").mkdir(exist_ok=True)
        Image.fromarray(np.ones((32, 32), np.uint8)).save(tmp_path / "set" / "masks" / f"{i}.png")
    codes = at_once(FORK, ["data", "convert", "set.yaml", "--root", "."])
    assert 0 in codes and set(codes) <= {0, 2}
    assert sorted(path.name for path in (tmp_path / "set" / "new").iterdir()) == [
        f"{i}.png" for i in range(4)
    ]
    assert not list(tmp_path.rglob(".*"))
