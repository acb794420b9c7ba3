"""Lists, journals and logs: named where they cannot be read, gone on with where a line is damaged."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg.cli.main import main
from ovseg.data.scenes import Scenes
from ovseg.errors import CheckpointError, ConfigError, DataError
from ovseg.inference.jobs import Journal
from ovseg.inference.sources import find_pictures
from ovseg.text_files import lines_of, records_of, text_of, tree_of
from ovseg.training.hooks import plot_loss
from ovseg.training.recipe import load_recipe
from ovseg.training.stages import _forget_after
from ovseg.weights.files import load_tensors
from ovseg.weights.pickles import read_published
from ovseg.weights.saving import is_saved, read_config

DAMAGE = {
    "not UTF-8": b"\xff\xfe{caf\xe9}",
    "cut off": b'{"step": 3, "lo',
    "no object": b"[1, 2]",
    "zeros": bytes(40),
    "nested too deeply": b"[" * 100_000,
}


def case(place):
    return [
        pytest.param(
            DAMAGE[what],
            marks=pytest.mark.bad_input("data", f"a line of a {place}: {what}"),
            id=what,
        )
        for what in DAMAGE
    ]


@pytest.mark.parametrize("line", case("journal"))
def test_a_damaged_line_of_the_journal_costs_its_picture_alone(tmp_path, line, capsys):
    for i in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(np.full((12, 16, 3), 40 * i, np.uint8)).save(tmp_path / "in" / f"{i}.png")
    out = tmp_path / "out"
    command = [
        "segment",
        str(tmp_path / "in"),
        "-m",
        "pacl_tiny",
        "--labels",
        "gravel,grass",
        "--format",
        "json",
        "-o",
        str(out),
    ]
    assert main(command) == 0
    journal = out / "ovseg_segment.jsonl"
    lines = [text for text in journal.read_bytes().split(b"\n") if text]
    journal.write_bytes(b"\n".join([lines[0], line, lines[2]]))
    capsys.readouterr()
    assert (
        main(command) == 0
        and "1 pictures into" in (said := capsys.readouterr().out)
        and "2 done before" in said
    )
    assert main(command) == 0 and "3 done before" in capsys.readouterr().out


@pytest.mark.parametrize("line", case("log"))
def test_a_damaged_line_of_a_log_is_dropped(tmp_path, line, caplog):
    log = tmp_path / "log.jsonl"
    good = [json.dumps({"step": i, "loss": 0.1 * i}).encode() for i in range(6)]
    log.write_bytes(b"\n".join([*good[:2], line, *good[2:], b"\n", line]) + b"\n")
    assert plot_loss(log, tmp_path / "loss.png") is not None
    _forget_after(log, 4)
    assert [json.loads(text) for text in log.read_text().splitlines()] == [
        {"step": i, "loss": 0.1 * i} for i in range(4)
    ]
    assert f"{log}: 2 lines are damaged and are dropped" in caplog.text
    assert records_of(log)[1] == 0 and records_of(tmp_path / "no.jsonl") == ([], 0)


@pytest.mark.parametrize("line", case("log of validation"))
def test_validation_goes_on_past_a_damaged_line(tmp_path, line):
    from types import SimpleNamespace

    from torch import nn

    from ovseg.training.hooks import Validation

    (tmp_path / "validation.jsonl").write_bytes(
        json.dumps({"step": 1, "miou": 9.0}).encode() + b"\n" + line + b"\n"
    )
    trainer = SimpleNamespace(model_to_use=lambda: nn.Identity(), state=SimpleNamespace(done=0))
    step = SimpleNamespace(number=1, stopping=False, last=True)
    Validation(tmp_path, 1, lambda model, done, folder: {"miou": 3.0}).after_step(trainer, step)
    found, damaged = records_of(tmp_path / "validation.jsonl")
    assert [entry["step"] for entry in found] == [1, 2] and damaged == 0


def test_lines_are_ended_by_line_breaks_alone(tmp_path):
    """Not by what Python's splitlines takes for one: names of files may hold it."""
    (tmp_path / "a.txt").write_text("a\u2028b\r\n\x0cc \n\n d\re", "utf-8", newline="")
    assert lines_of(tmp_path / "a.txt", "list", "lines", DataError) == ["a\u2028b", "c", "d", "e"]
    strange = "1\u2028\x1d2.png"
    Image.new("RGB", (4, 4)).save(tmp_path / strange)
    (tmp_path / "list.txt").write_text(strange + "\n", "utf-8")
    assert [source.path.is_file() for source in find_pictures([str(tmp_path / "list.txt")])[0]] == [
        True
    ]


@pytest.mark.bad_input("data", "a text file that cannot be opened")
def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(
        DataError, match=r"list .*a\.txt' cannot be read: Permission denied; expected lines"
    ):
        text_of(tmp_path / "a.txt", "list", "lines", DataError)


def test_trees():
    assert tree_of("a: &x [1, 2]\nb: *x\nc: {<<: {d: 1}, e: 2}\n") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": 1, "e": 2},
    }
    assert tree_of('{"a": {"b": 1}, "c": {"b": 1}}', is_json=True) == {"a": {"b": 1}, "c": {"b": 1}}
    for text in ("!!python/object/apply:os.system ['true']", "? [1, 2]\n: 3\n", "a: {b: 1, b: 2}"):
        with pytest.raises(ValueError, match="no YAML"):
            tree_of(text)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(place, marks=pytest.mark.bad_input("data", f"deep brackets as {place}"))
        for place in ("a recipe", "an override of a recipe", "config.json of a model")
    ],
)
def test_what_is_nested_too_deeply(tmp_path, place):
    deep = "[" * 100_000
    if place == "config.json of a model":
        (tmp_path / "config.json").write_text(deep)
        assert is_saved(tmp_path)
        with pytest.raises(Exception, match=r"config\.json is damaged"):
            read_config(tmp_path)
        return
    (tmp_path / "mine.yaml").write_text(deep)
    with pytest.raises(ConfigError, match=r"recipe .* (cannot be read|is no YAML)") as found:
        load_recipe(
            *(
                (tmp_path / "mine.yaml",)
                if place == "a recipe"
                else ("clip_scenes", [f"model.options={deep}"])
            )
        )
    assert len(str(found.value)) < 1000


def test_a_journal_of_a_name_that_is_too_long(tmp_path):
    """A list of captions given as a list of pictures: each is named as missing, the good one is
    done.
    """
    Image.fromarray(Scenes("digits", "val", 1)[0].image).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\n" + "a very long caption " * 20 + ".png\nb.png\n")
    found, problems = find_pictures([str(tmp_path / "list.txt")])
    assert (
        len(found) == 3
        and problems == []
        and [Journal(tmp_path, {}).has(source, []) for source in found] == [False] * 3
    )


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=pytest.mark.bad_input("data", f"in place of a file: {what}"))
        for what in ("a folder", "a FIFO", "a device", "a link to nothing")
    ],
)
def test_whatever_wants_a_file_says_what_is_there(tmp_path, what, capsys):
    """Checkpoints, models, recipes, lists and tables alike; never that it does not exist, and never
    a hang.
    """
    path = tmp_path / "x.pt"
    {
        "a folder": path.mkdir,
        "a FIFO": lambda: os.mkfifo(path),
        "a link to nothing": lambda: path.symlink_to("gone"),
        "a device": lambda: None,
    }[what]()
    path = Path("/dev/zero") if what == "a device" else path
    for read in (load_tensors, read_published):
        with pytest.raises(CheckpointError, match=f"is {what}; expected"):
            read(path)
    with pytest.raises(ConfigError, match=f"recipe is .*, which is {what}; expected a YAML file"):
        load_recipe(path)
    if what in ("a FIFO", "a device"):
        assert main(["segment", "--demo", "-m", str(path), "-o", str(tmp_path / "out")]) in (1, 2)
        assert f"is {what}; expected" in capsys.readouterr().err
    with pytest.raises(DataError, match=f"list .* is {what}"):
        lines_of(path, "list", "lines", DataError)
    if what != "a folder":  # a folder of pictures may be called x.png
        picture = tmp_path / "x.png"
        picture.symlink_to(path)
        assert main(
            [
                "segment",
                str(picture),
                "--labels",
                "gravel",
                "-m",
                "pacl_tiny",
                "-o",
                str(tmp_path / "out"),
            ]
        ) in (1, 2, 3)
        assert f"x.png' is {what}" in capsys.readouterr().err
