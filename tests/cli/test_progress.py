"""Long work is not silent: a bar where somebody looks, lines elsewhere, nothing for a library's
user; rows are kept as they come.
"""

import dataclasses
import gc
import json
import logging
import sys
import threading
import time
import types

import pytest
import torch
from ovseg_benchmarks import run as bench
from PIL import Image

from ovseg import progress
from ovseg.cli.main import main, told
from ovseg.data.scenes import Scenes
from ovseg.errors import DataError
from ovseg.evaluation import scenes
from ovseg.progress import Lines, bar, duration, waiting
from ovseg.systems import base, create_model
from ovseg.training import demo, trainer

trial = pytest.mark.third_trial(16)


@pytest.fixture
def soon(monkeypatch):
    """The first line at once, and the others often."""
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.02)


@trial
def test_what_a_line_says(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "ovseg")
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def line(passed, **options):
        now[0] = 0.0
        done = options.pop("done", 0)
        postfix = options.pop("postfix", {})
        found = Lines(**options, speak=False)
        found.update(done)
        found.set_postfix(**postfix)
        now[0] = passed
        found.speak()
        return caplog.messages[-1]

    about = {"total": 300, "unit": "picture", "desc": "evaluate pacl_tiny"}
    assert line(29.3, **about, done=120) == "evaluate pacl_tiny: 120/300 pictures, 4.1/s, 44 s left"
    assert line(20, **about) == "evaluate pacl_tiny: 0/300 pictures, 20 s so far"
    assert (
        line(100, **about, initial=200, done=10)
        == "evaluate pacl_tiny: 210/300 pictures, 10 s each, 15 min left"
    )
    assert (
        line(10, total=50, unit="step", desc="t", done=20, postfix={"loss": "1.234"})
        == "t: 20/50 steps, 2.0/s, 15 s left, loss 1.234"
    )
    assert (
        line(10, total=3 * 10**9, unit="B", desc="checking x", done=10**9)
        == "checking x: 1000/3000 MB, 100.0 MB/s, 20 s left"
    )
    assert line(10, unit="batch", done=40) == "40 batches, 4.0/s, 10 s so far"
    assert line(31, desc="loading x") == "loading x: 31 s so far"
    assert [duration(x) for x in (0.04, 44, 100, 12 * 60, 12000, 190000)] == [
        "0.0 s",
        "44 s",
        "2 min",
        "12 min",
        "3 h 20 min",
        "2 d 4 h",
    ]


@trial
def test_a_step_that_blocks_is_not_silent_and_a_short_one_is(monkeypatch, caplog):
    assert progress.FIRST <= 10 and progress.EVERY <= 30
    caplog.set_level(logging.INFO, "ovseg")
    with waiting("loading"):
        pass
    assert list(bar(range(3), unit="picture")) == [0, 1, 2] and caplog.messages == []
    monkeypatch.setattr(progress, "FIRST", 0.02)
    monkeypatch.setattr(progress, "EVERY", 0.02)
    with waiting("loading"):
        time.sleep(0.3)
    assert len(caplog.messages) > 3 and caplog.messages[0].startswith("loading: 0.0 s so far")
    assert caplog.messages[-1].startswith("loading: ended after 0.")
    caplog.clear()
    for _ in bar(range(2), unit="picture", desc="evaluate"):  # the first is slow
        time.sleep(0.15)
    assert (
        "evaluate: 0/2 pictures, 0." in caplog.messages[0]
        and "evaluate: 1/2 pictures, " in caplog.text
    )
    assert caplog.messages[-1].startswith("evaluate: 2/2 pictures, ended after 0.")
    said = len(caplog.messages)
    time.sleep(0.1)
    assert len(caplog.messages) == said


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "progress"]


@trial
def test_nobody_listens_and_nobody_ends_it(soon, caplog):
    before = set(threads())  # of other tests, whose owners are not collected yet

    def new():
        return set(threads()) - before

    caplog.set_level(logging.WARNING, "ovseg")
    with bar(total=3), waiting("x"):
        assert not new()  # a library's user, who has not set up a log
    caplog.set_level(logging.INFO, "ovseg")
    with bar(total=3, show=False):
        assert not new()
    left = bar(total=3)
    assert len(new()) == 1
    del left  # by an exception, say
    gc.collect()
    until = time.monotonic() + 10
    while new() and time.monotonic() < until:
        time.sleep(0.01)
    assert not new()


@trial
@pytest.mark.parametrize("where", ["terminal", "notebook", "IPython in a terminal that is a pipe"])
def test_bars_where_they_are_seen(where, monkeypatch):
    tqdm = pytest.importorskip("tqdm.auto")
    shown = []
    monkeypatch.setattr(tqdm, "tqdm", lambda items, **options: shown.append(options) or items)
    if where == "terminal":
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    else:
        config = {"IPKernelApp": {}} if where == "notebook" else {}
        shell = types.SimpleNamespace(config=config)
        monkeypatch.setitem(
            sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell)
        )
    found = bar(range(3), unit="picture", desc="evaluate")
    if where.startswith("IPython"):
        assert isinstance(found, Lines) and shown == []
    else:
        assert (
            found == range(3)
            and shown[0]["desc"] == "evaluate"
            and isinstance(bar(range(3), show=False), Lines)
        )


@trial
def test_the_command_line_sets_up_one_log(monkeypatch, capsys):
    ours, theirs = logging.getLogger("ovseg.somewhere"), logging.getLogger("elsewhere")

    def say():
        for log in (ours, theirs):
            log.info("info of %s", log.name)
        ours.warning("warning")
        ours.error("error")
        return capsys.readouterr().err.splitlines()

    with told():
        assert say() == ["info of ovseg.somewhere", "warning", "error"]
    with told(quiet=True):
        assert say() == ["warning", "error"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with told():
        assert say() == ["error"]
    assert (
        logging.getLogger("ovseg").handlers == []
        and logging.getLogger("ovseg").level == logging.NOTSET
    )


def test_commands_at_the_same_time_leave_the_log_as_it_was():
    """Whichever ends first."""
    log = logging.getLogger("ovseg")
    first, second = told(), told(quiet=True)
    first.__enter__()
    second.__enter__()
    assert log.level == logging.WARNING and len(log.handlers) == 2
    first.__exit__(None, None, None)
    assert log.level == logging.WARNING and len(log.handlers) == 1
    second.__exit__(None, None, None)
    assert log.level == logging.NOTSET and log.handlers == []
    with pytest.raises(KeyboardInterrupt), told(), told(quiet=True):
        raise KeyboardInterrupt
    assert log.level == logging.NOTSET and log.handlers == []


LINES = {
    "segment": (["segment", "p", "-m", "pacl_tiny", "--labels", "grass", "-o", "o"], "segment: "),
    "segment, one picture": (
        ["segment", "p/0.png", "-m", "pacl_tiny", "--labels", "grass", "-o", "o"],
        "segment: ",
    ),
    "loading": (["eval", "pacl_tiny", "--scenes", "1"], "loading pacl_tiny: "),
    "eval": (["eval", "pacl_tiny", "--scenes", "4"], "evaluate pacl_tiny on digits: "),
    "eval --sweep": (
        ["eval", "pacl_tiny", "--scenes", "4", "--data", "digits_things", "--sweep"],
        "evaluate pacl_tiny on digits_things: ",
    ),
    "classification": (
        ["eval", "pacl_tiny", "--data", "imagefolder", "--root", "."],
        "classify by pacl_tiny: ",
    ),
    "train": (
        [
            "train",
            "clip_scenes",
            "data.train_size=8",
            "train.batch_size=4",
            "train.steps=2",
            "run=r",
        ],
        "/2 steps, ",
    ),
    "data superpixels": (
        ["data", "superpixels", "p", "--out", "s.safetensors", "--min-size", "4"],
        "superpixels: ",
    ),
    "data entities": (["data", "entities", "c.tsv", "--out", "d.tsv"], "captions: "),
    "data cross-pairs": (["data", "cross-pairs", "p", "--out", "x.safetensors"], "entities: "),
}


@trial
@pytest.mark.parametrize("verb", LINES)
def test_every_long_verb_speaks(verb, soon, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    for i, scene in enumerate(Scenes("digits", "val", 3)[:]):
        Image.fromarray(scene.image).save(tmp_path / "p" / f"{i}.png")
        (tmp_path / "p" / f"{i}.txt").write_text("a dog on grass")
    (tmp_path / "c.tsv").write_text("address\ta dog on grass\n" * 3000)
    line, said = LINES[verb]
    assert main(line) == 0
    err = capsys.readouterr().err
    assert said in err
    assert verb != "train" or ", loss " in err


@trial
def test_texts_are_encoded_with_lines(soon, caplog):
    caplog.set_level(logging.INFO, "ovseg")
    model = create_model("clip_dense_tiny")
    model.encode_checked(
        ["grass", "sand"], ["{} " + str(i) for i in range(3 * base._TEXTS_AT_ONCE)]
    )
    assert "encoding labels: " in caplog.text and "/6 batches" in caplog.text


def light_cases(monkeypatch, number):
    cases = [bench.Case("patch_text_similarity", f"light_{i}", {"B": 2}) for i in range(number)]
    monkeypatch.setattr(bench, "CASES", cases)
    monkeypatch.setattr(bench.registry, "inputs", lambda case: {})
    monkeypatch.setattr(
        bench.registry, "implementations", lambda case: {bench.FUSED: torch.mul, "eager": torch.mul}
    )
    monkeypatch.setattr(
        bench, "step", lambda function, tensors: time.sleep(0.002) or (torch.ones(2), [])
    )


@trial
@pytest.mark.parametrize("where", ["in the second case", "in the memory of the first"])
def test_a_bench_that_is_stopped_leaves_its_rows(where, soon, tmp_path, monkeypatch, capsys):
    light_cases(monkeypatch, 2)
    calls = []

    def memory(case, name):
        calls.append(name)
        if len(calls) == (3 if where == "in the second case" else 2):
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(bench, "_memory_in_subprocess", memory)
    assert main(["bench", "--repeats", "2", "--json", str(tmp_path / "b.json")]) == 130
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    printed = capsys.readouterr()
    if where == "in the second case":
        assert [(row["case"], "extra_mib" in row) for row in rows] == [("light_0", True)] * 2 + [
            ("light_1", False)
        ] * 2
        assert printed.out.count("| light_0 |") == 2  # on the screen too, as it came
    else:
        assert [(row["case"], "extra_mib" in row) for row in rows] == [
            ("light_0", True),
            ("light_0", False),
        ]
    assert all(row["ms"] >= 0 and row["repeats"] == 2 for row in rows)
    assert "bench patch_text_similarity light_0: " in printed.err and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["b.json"]


@trial
def test_an_evaluation_that_is_stopped_leaves_its_rows(tmp_path, monkeypatch, capsys):
    real, calls = scenes.evaluate_scene_set, []

    def once(*values, **options):
        calls.append(values)
        if len(calls) == 2:
            raise DataError("stopped")
        return real(*values, **options)

    monkeypatch.setattr(scenes, "evaluate_scene_set", once)
    assert (
        main(
            ["eval", "pacl_tiny", "clip_dense_tiny", "--scenes", "2", "--out", str(tmp_path / "o")]
        )
        == 1
    )
    found = json.loads((tmp_path / "o" / "results.json").read_text())["results"]
    assert [row["summary"]["model"] for row in found] == ["pacl_tiny"] and "pacl_tiny" in (
        tmp_path / "o" / "table.md"
    ).read_text()
    assert "pacl_tiny on digits: mIoU " in capsys.readouterr().err


@trial
def test_a_demo_that_is_stopped_leaves_its_rows_and_goes_on(tmp_path, monkeypatch, capsys):
    real, calls = trainer.train, []

    def once(*values, **options):
        calls.append(values)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*values, **options)

    monkeypatch.setattr(trainer, "train", once)
    systems = demo.demo_systems()
    one = dataclasses.replace(systems["pacl"], stages=systems["pacl"].stages[:1])
    monkeypatch.setattr(demo, "demo_systems", lambda: {**systems, "pacl": one})
    command = [
        "demo",
        "--steps",
        "1",
        "1",
        "--train-scenes",
        "64",
        "--scenes",
        "2",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(command) == 130
    found = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [row["model"] for row in found["rows"]] == ["CLIP, image level"] and (
        tmp_path / "o" / "gallery.png"
    ).exists()
    assert "CLIP, image level: seen mIoU " in capsys.readouterr().err
    assert main([*command, "--quiet"]) == 0
    assert len(json.loads((tmp_path / "o" / "results.json").read_text())["rows"]) == 2
    assert "seen mIoU 0" not in capsys.readouterr().err  # quiet still means quiet
