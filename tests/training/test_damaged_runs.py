"""What a run finds when it goes on: damaged checkpoints, another recipe, no run at all; and what
else is written and may be damaged.
"""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from test_trainer import recipe, weights

import ovseg
from ovseg.cli.main import main
from ovseg.errors import CheckpointError, ConfigError
from ovseg.replacing import write_text
from ovseg.training import state
from ovseg.training.recipe import load_recipe
from ovseg.training.stages import _forget_after, take_weights
from ovseg.training.trainer import train
from ovseg.weights.files import load_tensors, save_tensors

SMALL = [
    "data.style=shapes",
    "data.train_size=40",
    "train.batch_size=8",
    "train.steps=6",
    "checkpoint.every_steps=2",
    "train.device=cpu",
    "model.options={backbone: {width: 16, embed_dim: 16, local_depth: 1}}",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to: its folder and its weights."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, weights(train(recipe(), folder, quiet=True))


def flip(path, at=0.5):
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def copy(source, target):
    os.system(f"cp -r '{source}' '{target}'")
    return target


DAMAGES = {
    "one bit flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00" * 20),
}
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "ranks.jsonl")


@pytest.mark.parametrize(
    "file,damage",
    [
        pytest.param(
            file,
            damage,
            marks=pytest.mark.bad_input("training", f"newest checkpoint, a file: {damage}"),
        )
        for file in FILES
        for damage in ("one bit flipped", "cut", "missing")
        if (file, damage) != ("ranks.jsonl", "cut")
    ]
    + [
        pytest.param(
            "COMPLETE",
            damage,
            marks=pytest.mark.bad_input("training", f"newest checkpoint, its marker: {damage}"),
        )
        for damage in ("one bit flipped", "cut", "empty", "no text")
    ],
)
def test_the_newest_intact_checkpoint_wins(whole, tmp_path, file, damage, caplog):
    run = copy(whole[0], tmp_path / "run")
    older, newest = state.complete(run / "checkpoints")
    DAMAGES[damage](newest / file)
    with caplog.at_level(logging.WARNING):
        found = train(recipe(), run, resume=True, quiet=True)
    assert torch.equal(weights(found), whole[1])
    told = [
        record.getMessage()
        for record in caplog.records
        if "damaged, set aside" in record.getMessage()
    ]
    assert (
        len(told) == 1
        and str(newest / file if file != "COMPLETE" else newest) in told[0]
        and str(older) in told[0]
    )
    assert newest.with_name(newest.name + ".damaged").is_dir()  # for who wants to look
    assert [path.name for path in state.complete(run / "checkpoints")] == [older.name, newest.name]
    assert [
        json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()
    ] == list(range(6))


@pytest.mark.bad_input("training", "no checkpoint is intact")
def test_no_intact_checkpoint_is_an_error_that_names_each(whole, tmp_path):
    run = copy(whole[0], tmp_path / "run")
    for path in state.complete(run / "checkpoints"):
        flip(path / "model.safetensors")
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is intact: .*step_00000006.*; .*step_00000004"
    ):
        train(recipe(), run, resume=True, quiet=True)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before


def test_checkpoints_of_earlier_versions_have_an_empty_marker(whole, tmp_path):
    run = copy(whole[0], tmp_path / "run")
    for path in state.complete(run / "checkpoints"):
        facts = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**facts, "format": 2}))
        (path / "COMPLETE").write_text("")
    assert all(state.damage(path) == "" for path in state.complete(run / "checkpoints"))
    newest = state.complete(run / "checkpoints")[-1]
    DAMAGES["cut"](newest / "optimizer.safetensors")
    assert "no complete safetensors file" in state.damage(newest)
    assert torch.equal(weights(train(recipe(), run, resume=True, quiet=True)), whole[1])


@pytest.mark.parametrize(
    "key,value",
    [
        pytest.param(
            key, value, marks=pytest.mark.bad_input("training", "resume with another recipe")
        )
        for key, value in (
            ("optim.lr", "0.5"),
            ("train.seed", "3"),
            ("train.steps", "7"),
            ("data.train_size", "48"),
            ("schedule.kind", "constant"),
        )
    ],
)
def test_another_recipe_on_the_command_line(whole, tmp_path, key, value, capsys):
    run = copy(whole[0], tmp_path / "run")
    before = (run / "config.yaml").read_bytes(), (run / "log.jsonl").read_bytes()
    line = ["train", str(run / "config.yaml"), f"{key}={value}", f"run={run}", "--resume"]
    assert main(line) == 2
    assert (
        f"{key} is" in (told := capsys.readouterr().err)
        and "was begun with" in told
        and f"--allow {key}" in told
    )
    assert ((run / "config.yaml").read_bytes(), (run / "log.jsonl").read_bytes()) == before


@pytest.mark.bad_input("training", "resume of a run that is not there")
def test_resume_needs_a_run(tmp_path, capsys):
    gone, empty = tmp_path / "gone", tmp_path / "empty"
    empty.mkdir()
    for folder in (gone, empty):
        assert main(["train", "clip_scenes", *SMALL, f"run={folder}", "--resume"]) == 2
        assert "holds no run to go on with" in capsys.readouterr().err
        assert not folder.exists() or not list(folder.iterdir())
        with pytest.raises(ConfigError, match="holds no run to go on with"):
            train(recipe(), folder, resume=True, quiet=True)
    with pytest.raises(ConfigError, match="resume is 'yes'; expected True, False or 'auto'"):
        train(recipe(), gone, resume="yes", quiet=True)


def test_auto_resume_begins_and_goes_on(whole, tmp_path):
    run = tmp_path / "run"
    line = ["train", str(whole[0] / "config.yaml"), f"run={run}", "--auto-resume"]
    assert main(line) == 0 and torch.equal(weights(ovseg.from_pretrained(run)), whole[1])
    newest = state.complete(run / "checkpoints")[-1]
    os.system(f"rm -r '{newest}' '{run / 'model'}'")
    assert main(line) == 0 and torch.equal(weights(ovseg.from_pretrained(run)), whole[1])


@pytest.mark.bad_input("training", "resume of a run whose recipe is damaged")
def test_a_damaged_recipe_of_a_run_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    for text in (b"\xff\xfe", b"model: [unclosed", b"${"):
        (tmp_path / "run" / "config.yaml").write_bytes(text)
        with pytest.raises(CheckpointError, match=r"config\.yaml is damaged"):
            train(recipe(), tmp_path / "run", resume=True, quiet=True)


@pytest.mark.bad_input("training", "a log or journal with a line that is no text")
def test_a_log_with_a_damaged_line_goes_on(whole, tmp_path):
    run = copy(whole[0], tmp_path / "run")
    os.system(f"rm -r '{state.complete(run / 'checkpoints')[-1]}'")
    lines = (run / "log.jsonl").read_bytes().splitlines()
    (run / "log.jsonl").write_bytes(
        b"\n".join([*lines[:2], b"\xff\xfe\xfa", b"[1, 2]", *lines[2:5], lines[5][:9]])
    )
    (run / "validation.jsonl").write_bytes(b"\xff\n")
    assert torch.equal(weights(train(recipe(), run, resume=True, quiet=True)), whole[1])
    assert [
        json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()
    ] == list(range(6))


@pytest.mark.bad_input("weights", "one bit flipped in saved weights")
def test_a_flipped_bit_is_found_wherever_weights_are_read(whole, tmp_path):
    """The weights of a run, of a checkpoint and of ``save_pretrained`` hold a hash of their
    tensors; files of others hold none.
    """
    run = copy(whole[0], tmp_path / "run")
    checkpoint = state.complete(run / "checkpoints")[-1]
    for folder in (run / "model", checkpoint):
        flip(folder / "model.safetensors", 0.9)
        with pytest.raises(CheckpointError, match="its tensors are not those that were written"):
            load_tensors(folder / "model.safetensors")
        made = recipe(f"init.backbone={folder}")
        with pytest.raises(
            ConfigError, match=r"init\.backbone is .* its tensors are not those that were written"
        ):
            take_weights(
                ovseg.create_model("clip_dense_tiny", **made.model.options), made, tmp_path
            )
    with pytest.raises(CheckpointError, match="its tensors are not those that were written"):
        ovseg.from_pretrained(run)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    tensors = {
        "a": torch.randn(3),
        "b": torch.tensor(2.0),
        "c": torch.zeros(0, 4),
        "d": torch.ones(3, dtype=torch.bfloat16),
    }
    save_tensors(tensors, ours, {"format": "pt"})
    save_tensors(tensors, theirs, {"format": "pt"}, sealed=False)
    for path in (ours, theirs):
        assert all(torch.equal(x, tensors[name]) for name, x in load_tensors(path).items())
    once = ours.read_bytes()
    for _ in range(4):  # the same tensors are the same bytes
        save_tensors(tensors, ours, {"format": "pt"})
        assert ours.read_bytes() == once


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(
            value, marks=pytest.mark.bad_input("training", "init without a name or a path")
        )
        for value in ("''", "3", "[a]")
    ],
)
def test_init_from_nothing(tmp_path, value):
    made = recipe(f"init.backbone={value}")
    with pytest.raises(
        ConfigError, match=r"init\.backbone is .*; expected a folder, a file or a name of weights"
    ):
        take_weights(ovseg.create_model("clip_dense_tiny", **made.model.options), made, tmp_path)


def test_a_saved_recipe_loads_again(whole):
    assert load_recipe(whole[0] / "config.yaml") == recipe()


@pytest.mark.bad_input("training", "a disk that is full while a log or a table is written")
def test_text_files_are_whole_or_as_they_were(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"step": {step}}}\n' for step in range(9)))
    before, real = log.read_text(), Path.write_text

    def half(path, text, *rest):
        real(path, text[: len(text) // 2], *rest)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="No space"):
            _forget_after(log, 5)
    assert log.read_text() == before and [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    _forget_after(log, 5)
    assert len(log.read_text().splitlines()) == 5
    write_text(tmp_path / "t.md", "na\u00efve \udcff")  # of a name that is not UTF-8
    assert (tmp_path / "t.md").read_bytes() == b"na\xc3\xafve \xff"
