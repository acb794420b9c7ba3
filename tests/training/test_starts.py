"""Before the first step: refused starts leave no trace, all stages are looked at, numbers that do
not fit are said. Beside the steps: plots. After them: a run that is done.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_damaged_runs import flip
from test_trainer import SMALL, STAGES, recipe, weights

import ovseg
from ovseg.cli.main import main
from ovseg.data.loader import Loader
from ovseg.errors import CheckpointError, ConfigError, DataError, InputError
from ovseg.evaluation.scenes import save_gallery
from ovseg.evaluation.validation import validation
from ovseg.replacing import replacing
from ovseg.systems.clip_dense.objective import ClipDenseObjective
from ovseg.training import start_checks, state, trainer
from ovseg.training.demo import shorten
from ovseg.training.hooks import Log, plot_loss
from ovseg.training.recipe import list_recipes, load_recipe, stages_of, to_dict
from ovseg.training.schedule import Schedule, misfits
from ovseg.training.stages import finished
from ovseg.training.trainer import Trainer, train


def contents(folder):
    """Every file below a folder with its bytes, and every folder; nothing if it is not there."""
    if not folder.exists():
        return None
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


REFUSED = {
    "data": (["data.train_size=4"], "train.batch_size is 8"),
    "weights": (["init.backbone=nowhere"], "nowhere does not exist"),
    "objective": (["objective.options={tau: 1}"], "objective 'clip_dense' has no options"),
    "parts": (["model.options.trained=[legs]"], "trained"),
    "source": (["data.style=photos"], "form is 'photos'"),
    "validation": (["validation={every_steps: 1, protocol: nothing}"], "protocol is 'nothing'"),
    "a protocol of other models": (
        ["validation={every_steps: 1, protocol: segclip}"],
        "made for models that label groups",
    ),
}


@pytest.mark.third_trial(5)
@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("there", [False, True])
def test_a_refused_start_leaves_no_trace(tmp_path, capsys, what, there):
    overrides, message = REFUSED[what]
    run = tmp_path / "some" / "run"
    if there:
        run.mkdir(parents=True)
        (run / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    assert main(["train", "clip_scenes", *SMALL, f"run={run}", *overrides, "optim.lr=.5"]) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.third_trial(5)
def test_a_good_start_after_a_refused_one(tmp_path):
    line = ["train", "clip_scenes", *SMALL, "train.steps=1", f"run={tmp_path / 'run'}"]
    assert main([*line, "data.train_size=4", "optim.lr=.5"]) == 2 and main(line) == 0
    assert load_recipe(tmp_path / "run" / "config.yaml").optim.lr == recipe().optim.lr


@pytest.mark.third_trial(5)
@pytest.mark.parametrize(
    "failure", [InputError("batch is no batch"), RuntimeError("out of memory")]
)
def test_a_first_step_that_fails_leaves_no_trace(tmp_path, monkeypatch, failure):
    def fail(self, *_):
        raise failure

    monkeypatch.setattr(ClipDenseObjective, "loss", fail)
    with pytest.raises(type(failure)):
        train(recipe(), tmp_path / "run", quiet=True)
    assert contents(tmp_path) == {}


@pytest.mark.third_trial(5)
def test_a_first_batch_that_fails_leaves_no_trace(tmp_path, monkeypatch):
    def fail(self):
        raise DataError("the disk is gone")
        yield

    monkeypatch.setattr(Loader, "_batches", fail)
    with pytest.raises(DataError, match="the disk is gone"):
        train(recipe(), tmp_path / "run", quiet=True)
    assert contents(tmp_path) == {}


@pytest.mark.third_trial(5)
def test_another_recipe_in_the_folder_is_kept_beside(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("model: {name: pacl_tiny}  # mine\n")
    train(recipe("train.steps=1"), tmp_path, quiet=True)
    assert load_recipe(tmp_path / "config.yaml") == recipe("train.steps=1")
    assert (
        "# mine" in (tmp_path / "config.until_start.yaml").read_text()
        and "another recipe was here" in caplog.text
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of two steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("done") / "run"
    return folder, weights(
        train(recipe("train.steps=2", "checkpoint.every_steps=1"), folder, quiet=True)
    )


@pytest.fixture
def copied(done, tmp_path):
    return shutil.copytree(done[0], tmp_path / "run")


@pytest.mark.third_trial(5)
def test_a_refused_resume_leaves_the_run_as_it_was(copied):
    flip(state.complete(copied / "checkpoints")[-1] / "model.safetensors")
    before = contents(copied)
    other = recipe(
        "train.steps=4",
        "checkpoint.every_steps=1",
        "model.options={backbone: {width: 32, embed_dim: 16, local_depth: 1}}",
    )
    with pytest.raises(CheckpointError, match="does not fit the model"):
        train(other, copied, resume=True, allow=["train.steps", "model.options"], quiet=True)
    with pytest.raises(ConfigError, match=r"train\.batch_size is 8"):
        train(
            recipe("train.steps=4", "data.train_size=4"),
            copied,
            resume=True,
            allow=["train", "data", "checkpoint"],
            quiet=True,
        )
    assert contents(copied) == before  # neither the recipe nor the damaged checkpoint was moved


@pytest.mark.third_trial(5)
@pytest.mark.parametrize(
    "line",
    [
        ["data", "check", "nothing", "--root", ".", "--out"],
        ["eval", "pacl_tiny", "--data", "nothing", "--root", ".", "--out"],
        ["convert", "nothing.bin", "segclip_vit_b16", "--out"],
        ["demo", "--train-scenes", "4", "--steps", "1", "1", "1", "--out"],
        ["data", "entities", "captions.tsv", "--column", "0", "--out"],
        ["data", "superpixels", ".", "--out"],
    ],
    ids=lambda line: " ".join(line[:2]),
)
def test_other_verbs_leave_no_trace_either(tmp_path, monkeypatch, line, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.tsv").write_text("nothing\n")
    before = contents(tmp_path)
    assert main([*line, "new/out" + (".tsv" if line[1] == "entities" else "")]) in (1, 2)
    assert contents(tmp_path) == before, capsys.readouterr().err


@pytest.mark.third_trial(5)
def test_folders_made_for_a_file_that_is_not_written_go_again(tmp_path):
    with pytest.raises(DataError), replacing(tmp_path / "a" / "b" / "file.txt"):
        raise DataError("no")
    assert contents(tmp_path) == {}
    with replacing(tmp_path / "a" / "b" / "file.txt") as part:
        part.write_text("x")
    assert (tmp_path / "a" / "b" / "file.txt").read_text() == "x"


@pytest.mark.third_trial(6)
@pytest.mark.parametrize(
    "name",
    [
        "checkpoints",
        "model",
        "best",
        "validation",
        "config.yaml",
        "env.json",
        "log.jsonl",
        "loss.png",
        "validation.jsonl",
    ],
)
def test_names_of_a_run_that_are_taken(tmp_path, name, capsys):
    if "." in name:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("something else")
    before = contents(tmp_path)
    for more in ([], ["--auto-resume"]):
        assert main(["train", "clip_scenes", *SMALL, f"run={tmp_path}", *more]) == 2
        told = capsys.readouterr().err
        assert (
            name in told
            and f"expected {'the name of a file' if '.' in name else 'a folder'}" in told
        )
    assert contents(tmp_path) == before


@pytest.mark.third_trial(6)
def test_a_model_of_something_else_is_not_written_over(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model holds files and .* no run that wrote them"):
        train(recipe(), tmp_path, quiet=True)


LATER = [
    ("model.options.trained=[embedder, legs]", "legs"),
    ("objective.options.region=3", "objective pacl.region: unknown key"),
    ("init.backbone=nowhere", r"init\.backbone is 'nowhere'"),
    ("init.backbone=best", r"init\.backbone is 'best' and nothing is validated"),
    ("init.embedder=previous", "does not fit|lacks|no part"),
    ("train.batch_size=41", r"train\.batch_size is 41"),
    ("data={kind: masks, set: digits, train_size: 50}", "the data give MaskBatch"),
    ("data={kind: folder, root: nowhere}", "nowhere"),
    ("data={kind: entity_folder, gives: cross, root: .}", r"data\.index is null"),
    ("data.style=photos", "form is 'photos'"),
    ("model.name=pacl_vit", "pacl_vit"),
    ("model.options.backbone.width=32", "does not fit the model"),
]


@pytest.mark.third_trial(6)
@pytest.mark.parametrize("override,message", LATER)
def test_later_stages_are_looked_at_before_the_first_step(tmp_path, monkeypatch, override, message):
    (tmp_path / "two.yaml").write_text(
        STAGES.replace("  data: {captions: 2}\n", "")
    )  # an option that masks have not
    two = load_recipe(tmp_path / "two.yaml", [f"stages[1].{override}"])
    monkeypatch.setattr(trainer.Gradients, "__call__", lambda *_: pytest.fail("a step was made"))
    with pytest.raises((ConfigError, DataError, InputError), match=rf"^stages\[1\]: .*({message})"):
        train(two, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.third_trial(6)
def test_class_embeddings_of_a_later_stage(tmp_path):
    lines = [
        *SMALL[:2],
        "train.batch_size=2",
        "train.device=cpu",
        "stages[1].objective.options.class_embeddings=nothing.npy",
    ]
    with pytest.raises(ConfigError, match=r"^stages\[1\]: .*class embeddings.*nothing\.npy"):
        train(
            load_recipe("zegclip_transductive_scenes", [x for x in lines if "style" not in x]),
            tmp_path / "run",
            quiet=True,
        )


@pytest.mark.third_trial(6)
def test_looking_at_later_stages_changes_no_random_number(tmp_path, caplog):
    (tmp_path / "two.yaml").write_text(STAGES)
    stages = stages_of(
        load_recipe(
            tmp_path / "two.yaml",
            ["stages[1].init.backbone=best", "stages[1].schedule.warmup_steps=9"],
        )
    )
    first = Trainer(stages[0], tmp_path / "run", torch.device("cpu"), quiet=True)
    asked, before = [], state.random_state()
    run = SimpleNamespace(folder=tmp_path / "run")
    start_checks.check_later_stages(
        stages, 0, first.state, run, SimpleNamespace(check=lambda model: asked.append(model.name))
    )
    assert (
        state.random_state() == before
        and asked == ["pacl_tiny"]
        and "stages[1].schedule.warmup_steps is 9" in caplog.text
    )


@pytest.mark.third_trial(6)
@pytest.mark.parametrize(
    "override",
    ["validation.every_steps=2", "checkpoint.keep=9", "log.every_steps=1", "train.device=cpu"],
)
def test_what_is_of_the_whole_run_is_no_option_of_a_stage(override):
    key = override.partition("=")[0]
    with pytest.raises(
        ConfigError,
        match=rf"stages\[1\]\.{key}: it is of the whole run; expected {key} beside the stages",
    ):
        load_recipe("groupvit_scenes", [f"stages[1].{override}"])


@pytest.mark.third_trial(6)
def test_a_disk_without_room_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(start_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    train(recipe("train.steps=1"), tmp_path / "run", quiet=True)
    assert "GB free; checkpoints" in caplog.text and "checkpoint.keep=2" in caplog.text


MISFITS = [
    (
        Schedule(warmup_steps=60),
        2,
        r"is 60, which is 60 steps, and the stage has 2: the rate gets up to 1\.7e-05 of optim.lr 0\.001",
    ),
    (
        Schedule(warmup_steps=60),
        60,
        r"warmup_steps is 60 and the stage has 60 steps: the rate gets up to",
    ),
    (
        Schedule(warmup_steps=60, warmup_mode="before"),
        40,
        "warmup_steps is 60, which is 60 steps, and the stage has 40",
    ),
    (
        Schedule(warmup_share=0.5, steps=100),
        20,
        r"warmup_share is 0\.5, which is 50 steps, and the stage has 20",
    ),
    (
        Schedule(kind="poly", warmup_steps=0, steps=5),
        8,
        r"schedule\.steps is 5 and the stage has 8: the last 3 of them are at",
    ),
]


@pytest.mark.third_trial(9)
@pytest.mark.parametrize("schedule,steps,message", MISFITS)
def test_schedules_that_do_not_fit_are_said(schedule, steps, message):
    found = misfits(schedule, 1e-3, steps)
    assert len(found) == 1 and re.search(message, found[0]), found


@pytest.mark.third_trial(9)
@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_fit(name):
    for stage in stages_of(load_recipe(name)):
        assert misfits(stage.schedule, stage.optim.lr, stage.train.steps) == []
        assert list(start_checks._average_misfits(stage.train.ema, stage.train.steps)) == []


@pytest.mark.third_trial(9)
def test_numbers_that_do_not_fit_are_said_at_the_start(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(
            recipe("train.steps=2", "train.ema=0.9999", "checkpoint.every_steps=500"),
            tmp_path / "run",
            quiet=True,
        )
    assert "schedule.warmup_steps is 60" in caplog.text
    assert "train.ema is 0.9999 and the stage has 2 steps: 100 % of the average" in caplog.text
    assert "checkpoint.every_steps is 500 and the run has 2 steps" in caplog.text


@pytest.mark.third_trial(9)
def test_a_shortened_demo_has_a_shorter_warm_up():
    clip = load_recipe("clip_scenes")
    shorten(clip, 16)
    assert (
        clip.train.steps == 16
        and clip.schedule.warmup_steps == 0
        and misfits(clip.schedule, clip.optim.lr, 16) == []
    )
    longer = load_recipe("clip_scenes")
    shorten(longer, 3200)
    assert longer.schedule.warmup_steps == 60
    half = load_recipe("zegclip_transductive_scenes")
    shorten(half, 800)
    assert half.schedule.warmup_steps == 30 and [
        stage["train"]["steps"] for stage in half.stages
    ] == [400, 400]


@pytest.mark.third_trial(13)
def test_a_backend_that_is_not_installed(tmp_path):
    """A notebook sets MPLBACKEND for the processes that it starts; with it matplotlib does not even
    import.
    """
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n")
    code = (
        "import pathlib; from ovseg.training.hooks import plot_loss; "
        "print(plot_loss(pathlib.Path('log.jsonl'), pathlib.Path('loss.png')))"
    )
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.not_installed"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.stdout.strip() == "loss.png" and (tmp_path / "loss.png").stat().st_size > 1000, (
        ended.stderr
    )


def fail(*_, **__):
    raise OSError("No space left on device")


@pytest.mark.third_trial(13)
def test_plots_that_fail_fail_nothing_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("ovseg.training.hooks.new_figure", fail)
    train(recipe("train.steps=1"), tmp_path / "run", quiet=True)
    assert "no loss curve is drawn: OSError: No space left on device" in caplog.text
    assert (tmp_path / "run" / "model" / "config.json").exists() and not (
        tmp_path / "run" / "loss.png"
    ).exists()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert (
        plot_loss(tmp_path / "run" / "log.jsonl", tmp_path / "loss.png") is None
        and "matplotlib is not installed" in caplog.text
    )


@pytest.mark.third_trial(13)
def test_pictures_of_a_validation_that_fail_fail_nothing_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("ovseg.evaluation.scenes.contact_sheet", fail)
    measured = recipe("train.steps=1", "validation={every_steps: 1, limit: 2}")
    train(measured, tmp_path / "run", quiet=True, evaluate=validation(measured))
    assert (
        "no gallery is drawn" in caplog.text
        and len((tmp_path / "run" / "validation.jsonl").read_text().splitlines()) == 1
    )
    assert save_gallery({}, tmp_path / "gallery.png") is None


@pytest.mark.third_trial(13)
def test_a_log_that_cannot_be_written_is_said_once(tmp_path, caplog):
    log = Log(tmp_path, 1)  # a folder
    step = trainer.Step(0, {"total": 1.0}, 0.1, 1.0)
    for number in range(3):
        log.after_step(SimpleNamespace(stages=1), replace(step, number=number))
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.third_trial(15)
def test_a_message_of_several_lines_is_told_in_one(monkeypatch, capsys):
    def refuse(*_):
        raise ConfigError("a library says:\n    this\n\n  and that")

    monkeypatch.setattr("ovseg.training.recipe.load_recipe", refuse)
    assert (
        main(["train", "clip_scenes", "run=x"]) == 2
        and capsys.readouterr().err == "ovseg train: a library says:; this; and that\n"
    )


@pytest.mark.third_trial(15)
def test_a_run_that_is_done_answers_at_once(done, monkeypatch, capsys):
    """From small files alone; from Python with the model that it made."""
    folder, before = done[0], contents(done[0])
    monkeypatch.setattr(trainer, "build_model", lambda *_: pytest.fail("a model is built"))
    found = train(
        recipe("train.steps=2", "checkpoint.every_steps=1"), folder, resume=True, quiet=True
    )
    assert torch.equal(weights(found), done[1]) and not found.training
    monkeypatch.setattr(
        "ovseg.training.stages.damage", lambda *_: pytest.fail("a checkpoint is read")
    )
    for way in ("--resume", "--auto-resume"):
        assert main(["train", str(folder / "config.yaml"), f"run={folder}", way]) == 0
        assert f"{folder} is done already, 2 steps" in capsys.readouterr().out
    assert contents(folder) == before
    monkeypatch.undo()
    assert (
        main(["train", str(folder / "config.yaml"), f"run={folder}", "--resume", "optim.lr=1"]) == 2
    )  # is not the run that is done
    assert "--allow optim.lr" in capsys.readouterr().err


@pytest.mark.third_trial(15)
@pytest.mark.parametrize("gone", ["model", "model/config.json", "model/model.safetensors"])
def test_a_run_that_was_killed_before_its_model_was_written_writes_it(done, copied, gone):
    shutil.rmtree(copied / gone) if gone == "model" else (copied / gone).unlink()
    (copied / "loss.png").unlink()
    assert main(["train", str(copied / "config.yaml"), f"run={copied}", "--resume"]) == 0
    assert (
        torch.equal(weights(ovseg.from_pretrained(copied)), done[1])
        and (copied / "loss.png").exists()
    )


@pytest.mark.third_trial(15)
def test_checkpoints_of_earlier_versions_do_not_say_of_how_many_steps(copied):
    made = recipe("train.steps=2", "checkpoint.every_steps=1")
    at = state.complete(copied / "checkpoints")[-1] / "state.json"
    facts = json.loads(at.read_text())
    assert facts.pop("of") == facts["step"] == 2 and finished(copied, made) == 2
    at.write_text(json.dumps(facts))
    assert finished(copied, made) == 2  # the recipe says it
    epochs = recipe("train.epochs=1", "checkpoint.every_steps=1")
    at.write_text(json.dumps({**facts, "recipe": to_dict(epochs)}))
    assert finished(copied, epochs) is None  # the data do
    at.write_text(json.dumps({**facts, "of": 2, "recipe": to_dict(epochs)}))
    assert finished(copied, epochs) == 2
