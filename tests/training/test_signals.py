"""A signal at any moment of a run saves once and loses nothing; so does a reader that is gone."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ovseg import stop_signals, time_limits
from ovseg.cli.main import main
from ovseg.data.loader import Loader
from ovseg.errors import ConfigError, DataError
from ovseg.training import hooks, state, trainer
from ovseg.training.hooks import Hook
from ovseg.training.recipe import load_recipe
from ovseg.training.trainer import Interrupted, train

pytestmark = [
    pytest.mark.third_trial(7),
    pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix"),
]
SMALL = [
    "data.style=shapes",
    "data.train_size=24",
    "data.workers=0",
    "train.batch_size=6",
    "log.every_steps=1",
    "train.device=cpu",
    "checkpoint.every_steps=100",
    "model.options={backbone: {width: 8, embed_dim: 8, local_depth: 1}}",
]
TWO_STAGES = ["stages=[{train: {steps: 3}}, {train: {steps: 3}}]", "validation.every_steps=2"]
ALL = [
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR2,
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGXCPU,
]


def recipe(*overrides):
    return load_recipe("clip_scenes", [*SMALL, *overrides])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def send(numbers=ALL, to=None):
    for number in numbers:
        os.kill(to or os.getpid(), number)
        time.sleep(0.001)  # one handler after another


@pytest.fixture(autouse=True)
def as_before():
    """Handlers that stay for ten seconds after a run do not stay after a test."""
    before = {number: signal.getsignal(number) for number in stop_signals.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_are_counted_and_a_late_one_acts_as_usual(capfd):
    with pytest.raises(KeyboardInterrupt), stop_signals.noted() as request:
        assert not request
        send()
        assert request and request.numbers == ALL and str(request) == "signal 15 (SIGTERM)"
        request._since -= stop_signals.PATIENCE + 1
        send([signal.SIGINT])
        time.sleep(1)
    assert (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )


def test_repetitions_after_the_run_are_without_effect_for_as_long():
    with stop_signals.noted() as request:
        send([signal.SIGINT])
    send()  # the handlers are still there: torchrun repeats what it was told
    assert request.numbers == [signal.SIGINT, *ALL]
    request._since -= stop_signals.PATIENCE + 1
    with pytest.raises(KeyboardInterrupt):
        send([signal.SIGINT])
        time.sleep(1)


def test_a_second_ctrl_c_is_answered(capfd):
    with stop_signals.noted():
        send([signal.SIGTERM])
        assert capfd.readouterr().err == ""
        send([signal.SIGINT] * 4)
    assert (
        capfd.readouterr().err.count(
            "saving after this step; press again after ten seconds to stop at once"
        )
        == 1
    )
    with stop_signals.noted():
        send([signal.SIGINT] * 4)
    assert capfd.readouterr().err.count("press again after ten seconds") == 2
    with stop_signals.noted(speak=False):
        send([signal.SIGINT])
    assert capfd.readouterr().err == ""


def test_nohup_is_respected_and_other_threads_are_left_alone():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signals.noted() as request:
        send([signal.SIGHUP])
        assert not request
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    seen = []

    def other():
        with stop_signals.noted() as request:
            seen.append(signal.getsignal(signal.SIGTERM))
            assert not request

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def evaluation(model, step, folder):
    return {"miou": float(step), "drawn": float(torch.rand(()))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return weights(
        train(recipe(*TWO_STAGES), folder, quiet=True, evaluate=evaluation)
    ), validations(folder)


def validations(folder):
    return [
        (entry["step"], entry["drawn"])
        for entry in map(json.loads, (folder / "validation.jsonl").read_text().splitlines())
    ]


@pytest.mark.parametrize(
    "place,name,at,steps",
    [
        (trainer, "find_run", 1, 1),
        (trainer, "build_model", 1, 1),
        (trainer, "build_loader", 1, 1),
        (Loader, "_batches", 1, 1),
        (trainer, "clip", 2, 2),
        (trainer, "clip", 3, 3),
        (hooks, "save_pretrained", 1, 3),
        (state, "save_tensors", 2, 4),
        (trainer.Trainer, "model_to_use", 3, 4),
        (trainer, "build_loader", 2, 4),
        (trainer, "save_pretrained", 1, 6),
    ],
    ids=[
        "open",
        "model",
        "loader",
        "first batch",
        "step",
        "last step of a stage",
        "validation",
        "saving",
        "between stages",
        "second loader",
        "export",
    ],
)
def test_signals_at_any_moment(tmp_path, monkeypatch, whole, place, name, at, steps):
    """Eight of them at call ``at`` of a function; the state is that after ``steps`` steps."""
    real, calls = getattr(place, name), []

    def sending(*arguments, **more):
        calls.append(name)
        if len(calls) == at:
            send()
        return real(*arguments, **more)

    monkeypatch.setattr(place, name, sending)
    with pytest.raises(
        Interrupted,
        match=r"^signal 15 \(SIGTERM\) at step .* saved|after the last step; the run is complete",
    ):
        train(recipe(*TWO_STAGES), tmp_path, quiet=True, evaluate=evaluation)
    monkeypatch.undo()
    facts = state.facts_of(state.complete(tmp_path / "checkpoints")[-1])
    assert facts["done"] + facts["step"] == steps
    resumed = train(recipe(*TWO_STAGES), tmp_path, resume=True, quiet=True, evaluate=evaluation)
    assert torch.equal(weights(resumed), whole[0]) and validations(tmp_path) == whole[1]


def test_commands_leave_with_143_in_one_line(tmp_path, monkeypatch, capsys):
    real = trainer.clip
    monkeypatch.setattr(trainer, "clip", lambda *arguments: send() or real(*arguments))
    assert main(["train", "clip_scenes", *SMALL, "train.steps=9", f"run={tmp_path / 'run'}"]) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "ovseg train: signal 15 (SIGTERM) at step 0; saved, go on with resume"
    assert (
        main(
            [
                "demo",
                "--data",
                "shapes",
                "--steps",
                "4",
                "2",
                "2",
                "--train-scenes",
                "80",
                "--quiet",
                "--out",
                str(tmp_path),
            ]
        )
        == 143
    )
    assert "ovseg demo: signal 15 (SIGTERM) at step 0; saved" in capsys.readouterr().err


def readers():
    return [
        int(text) for text in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    ]


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


class ToReader(Hook):
    """After the second step, once: do something to the process that reads."""

    def __init__(self, act, before):
        self.act, self.before = act, before

    def after_step(self, trainer, step):
        if step.number == 1:
            self.act((set(readers()) - self.before).pop())
            time.sleep(0.2)  # here torch would raise the death of a reader


@pytest.fixture(scope="module")
def read_by_one(tmp_path_factory):
    return weights(train(recipe("train.steps=12"), tmp_path_factory.mktemp("read"), quiet=True))


@linux
def test_a_signal_to_a_reader_alone_stops_the_run(tmp_path, read_by_one):
    made = recipe("train.steps=12", "data.workers=1")
    with pytest.raises(Interrupted, match=r"^signal 15 \(SIGTERM\) at step"):
        train(
            made, tmp_path, quiet=True, hooks=[ToReader(lambda pid: send(to=pid), set(readers()))]
        )
    assert len(state.complete(tmp_path / "checkpoints")) == 1
    assert torch.equal(weights(train(made, tmp_path, resume=True, quiet=True)), read_by_one)


@linux
@pytest.mark.parametrize(
    "number,message",
    [
        (
            signal.SIGKILL,
            r"DataLoader worker 0 \(pid \d+\) was killed by signal 9 \(SIGKILL\).* saved",
        ),
        (
            signal.SIGSTOP,
            r"DataLoader timed out after 1.5 s without a batch: workers 0 \(pid .* saved",
        ),
    ],
    ids=["dies", "stands still"],
)
def test_a_reader_that_is_gone_ends_the_run_once_it_is_saved(
    tmp_path, monkeypatch, read_by_one, number, message
):
    monkeypatch.setenv("OVSEG_DATA_TIMEOUT", "1.5")
    made = recipe("train.steps=12", "data.workers=1", "data.prefetch=1")
    before, began = set(readers()), time.time()
    with pytest.raises(DataError, match=message):
        train(
            made, tmp_path, quiet=True, hooks=[ToReader(lambda pid: os.kill(pid, number), before)]
        )
    assert time.time() - began < 30 and set(readers()) == before
    (checkpoint,) = state.complete(tmp_path / "checkpoints")
    assert 2 <= state.facts_of(checkpoint)["step"] < 12
    assert torch.equal(weights(train(made, tmp_path, resume=True, quiet=True)), read_by_one)


def test_data_that_fail_at_a_checkpoint_save_no_second_one(tmp_path, monkeypatch):
    batches, saves, real = Loader._batches, [], state.save

    def short(self):
        for n, batch in enumerate(batches(self)):
            if n == 2:
                raise DataError("the disk is gone")
            yield batch

    monkeypatch.setattr(Loader, "_batches", short)
    monkeypatch.setattr(state, "save", lambda *arguments: saves.append(1) or real(*arguments))
    with pytest.raises(
        DataError, match=r"^the disk is gone; saved after 2 steps, --resume goes on$"
    ):
        train(recipe("checkpoint.every_steps=2"), tmp_path, quiet=True)
    assert len(saves) == 1
    monkeypatch.setattr(
        Loader, "_batches", lambda self: (_ for _ in ()).throw(DataError("no disk"))
    )
    with pytest.raises(DataError, match=r"^no disk$"):
        train(recipe(), tmp_path / "new", quiet=True)
    assert len(saves) == 1


@pytest.mark.parametrize("value", ["0", "-3", "nan", "soon", "inf", "1e9"])
def test_time_limits_that_cannot_be(monkeypatch, value):
    limits = {"START": time_limits.start_limit, "RANK": time_limits.rank_limit}
    for kind, limit in {**limits, "DATA": time_limits.data_limit}.items():
        name = f"OVSEG_{kind}_TIMEOUT"
        monkeypatch.delenv(name, raising=False)
        usual = limit()
        monkeypatch.setenv(name, "")
        assert limit() == usual
        monkeypatch.setenv(name, value)
        with pytest.raises(
            ConfigError, match=f"^{name} is '{value}' in the environment; expected seconds"
        ):
            limit()
