"""What one process sees, all act on: a loss that is not finite, a signal, the end of its data, bad
pictures, an error. Nothing hangs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import free_port, run

import ovseg
from ovseg import distributed
from ovseg.data.loader import Loader
from ovseg.errors import ConfigError, DataError
from ovseg.training import state, trainer
from ovseg.training.hooks import Hook
from ovseg.training.recipe import load_recipe
from ovseg.training.trainer import Interrupted, train

SMALL = [
    "data.style=shapes",
    "data.train_size=40",
    "train.batch_size=10",
    "train.steps=6",
    "log.every_steps=1",
    "train.device=cpu",
    "checkpoint.every_steps=100",
    "model.options={backbone: {width: 16, embed_dim: 16, local_depth: 1}}",
]


STEPS = 20


def recipe(*overrides):
    return load_recipe("clip_scenes", [*SMALL, *overrides])


def noisy(*overrides):
    """SegCLIP by its contrast alone: the noise of its groups is all that is drawn."""
    small = [
        *SMALL[:-1],
        "data.superpixels=false",
        "objective.options.weights={superpixel: 0, reconstruction: 0}",
        "train.steps=4",
    ]
    tiny = "model.options={backbone: {width: 16, embed_dim: 16, local_depth: 1}, decoder: {width: 16, depth: 1, heads: 2}}"
    return load_recipe("segclip_scenes", [*small, tiny, *overrides])


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


class Watch(Hook):
    """The weights after every step."""

    def __init__(self):
        self.weights = []

    def after_step(self, trainer, step):
        self.weights.append(
            torch.cat([p.detach().flatten() for p in trainer.state.objective.parameters()])
            .double()
            .sum()
            .item()
        )


def scenarios(folder):
    """One after another in every process; only rank 1 meets anything."""
    me, found = distributed.rank(), {}
    alone = me == 1

    def attempt(name, *overrides, resume=False):
        watch = Watch()
        try:
            train(recipe(*overrides), f"{folder}/{name}", quiet=True, resume=resume, hooks=[watch])
            outcome = "done"
        except (Interrupted, DataError, ConfigError, FloatingPointError) as error:
            outcome = f"{type(error).__name__}: {error}"
        sums = distributed.gather_strings([json.dumps(watch.weights)])
        assert len(set(sums)) == 1, f"{name}: the processes' weights differ: {sums}"
        found[name] = [outcome, len(watch.weights)]

    attempt("plain")

    real = trainer.Gradients.__call__

    def poisoned(self, batch, progress, scale=1.0):
        losses = real(self, batch, progress, scale)
        return (
            {name: x * float("nan") for name, x in losses.items()}
            if alone and progress.step in (2, 3)
            else losses
        )

    trainer.Gradients.__call__ = poisoned
    attempt("nan")
    trainer.Gradients.__call__ = real

    class Signalled(Hook):
        def after_step(self, trainer, step):
            if alone and step.number == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    watch_step = Watch.after_step
    Watch.after_step = lambda self, t, step: (
        watch_step(self, t, step),
        Signalled().after_step(t, step),
    )[0]
    attempt("signal")
    Watch.after_step = watch_step
    attempt("signal", resume=True)

    batches = Loader._batches

    def short(self):
        for n, batch in enumerate(batches(self)):
            if alone and n == 3:
                return
            yield batch

    Loader._batches = short
    attempt("end")

    def failing(self):
        for n, batch in enumerate(batches(self)):
            if alone and n == 2:
                raise DataError("the disk is gone")
            yield batch

    Loader._batches = failing
    attempt("error")

    def bad(self):
        for n, batch in enumerate(batches(self)):
            yield replace(batch, skipped=(f"picture {n} is bad",) if alone else ())

    Loader._batches = bad
    attempt("bad")
    Loader._batches = batches

    def ids(self):
        for batch in batches(self):
            seen.append(batch.image_ids.tolist())
            yield batch

    seen = []
    Loader._batches = ids
    attempt("ids", "train.steps=3")
    Loader._batches = batches
    found["ids"] = [seen, np.random.rand()]
    attempt("averaged", "train.ema=0.5")
    attempt("fsdp", "train.parallel=fsdp", "train.ema=0.5")
    attempt("fsdp", "train.parallel=fsdp", "train.ema=0.5", resume=True)
    halves = (
        "train.parallel=fsdp",
        "train.ema=0.5",
        "checkpoint.every_steps=3",
        "checkpoint.keep=9",
        "train.chunk=2",
    )
    attempt("halves", *halves)
    if distributed.is_main():
        shutil.rmtree(state.complete(Path(folder) / "halves" / "checkpoints")[-1])
    distributed.barrier()
    attempt("halves", *halves, resume=True)
    train(noisy("train.chunk=3"), f"{folder}/noisy", quiet=True)
    attempt("other", "optim.lr=1")
    attempt("other", "optim.lr=2", resume=True)
    distributed.close()
    print(json.dumps(found))


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    return folder, [
        json.loads(text.splitlines()[-1])
        for text in run(__file__, "scenarios", 2, folder, seconds=180)
    ]


def curve(folder):
    return [entry["loss"] for entry in log_of(folder)]


@pytest.mark.third_trial(14)
def test_noise_is_that_of_one_process(met, tmp_path):
    """Of the groups, by the row of the whole batch: two processes in chunks of 3 and 2 follow one
    that encodes 10 pictures at once.
    """
    train(noisy(), tmp_path, quiet=True)
    assert (
        curve(met[0] / "noisy") == pytest.approx(curve(tmp_path), abs=1e-4)
        and len(set(curve(tmp_path))) == 4
    )


def same(met, name):
    outcomes = [found[name] for found in met[1]]
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


@pytest.mark.bad_input("several processes", "a loss that is not finite in one of them")
def test_a_loss_that_is_not_finite_in_one_process_skips_the_step_in_all(met):
    assert same(met, "nan") == ["done", 6]
    assert [entry["step"] for entry in log_of(met[0] / "nan") if entry.get("skipped")] == [2, 3]
    updates = []
    for name in ("plain", "nan"):
        tensors = state.load_tensors(
            state.complete(met[0] / name / "checkpoints")[-1] / "optimizer.safetensors"
        )
        updates.append({float(x) for key, x in tensors.items() if key.startswith("step/")})
    assert updates == [{6.0}, {4.0}]


def test_a_signal_to_one_process_stops_all_after_a_checkpoint(met):
    assert [found["signal"] for found in met[1]] == [
        ["done", 3]
    ] * 2  # the second life: steps 3 to 5
    assert [entry["step"] for entry in log_of(met[0] / "signal")] == list(range(6))
    assert [entry["loss"] for entry in log_of(met[0] / "signal")] == [
        entry["loss"] for entry in log_of(met[0] / "plain")
    ]


def test_the_end_of_the_data_of_one_process_ends_all(met):
    assert same(met, "end") == ["done", 3]


@pytest.mark.bad_input("several processes", "an error of one of them")
def test_an_error_of_one_process_is_that_of_all(met):
    assert same(met, "error") == [
        "DataError: the disk is gone; saved after 2 steps, --resume goes on",
        2,
    ]


@pytest.mark.bad_input("several processes", "pictures that cannot be read")
def test_bad_pictures_are_counted_over_the_processes(met):
    outcome, steps = same(met, "bad")
    assert steps == 1 and outcome.startswith("DataError: 2 of 40 pictures cannot be used")


def test_ids_and_random_numbers_differ_by_rank(met):
    (a, x), (b, y) = (found["ids"] for found in met[1])
    assert x != y and len(a) == len(b) == 3
    for mine, yours in zip(a, b, strict=True):
        assert len(mine) == len(yours) == 5 and not set(mine) & set(yours)


def test_sharded_checkpoints_hold_whole_tensors(met):
    """Trained through FSDP2: the curve, the model and its average are those of DDP, also in chunks
    and after going on half-way.
    """
    assert same(met, "fsdp") == ["done", 0]  # the second life had nothing left to do
    assert same(met, "halves") == ["done", 3]
    for name in ("fsdp", "halves"):
        assert curve(met[0] / name) == pytest.approx(curve(met[0] / "averaged"), abs=1e-3)
        places = ("model", f"checkpoints/{state.complete(met[0] / name / 'checkpoints')[-1].name}")
        for place in places:
            ours, theirs = (
                state.load_tensors(met[0] / run / place / "model.safetensors")
                for run in (name, "averaged")
            )
            assert ours.keys() == theirs.keys() and all(
                torch.allclose(ours[key], theirs[key], atol=2e-3) for key in ours
            ), place


@pytest.mark.bad_input("several processes", "resume with another recipe")
def test_another_recipe_is_refused_in_all(met):
    outcome, steps = same(met, "other")
    assert steps == 0 and outcome.startswith("ConfigError: optim.lr is 2.0")


def test_torchrun_trains_to_the_curve_of_one_process(tmp_path):
    """The same global batch, shared by two: eleven pictures, six and five.

    The validation is shared too.
    """
    clip = Path(ovseg.__file__).parent / "systems" / "pacl" / "bundled" / "pacl_tiny.digits"
    common = [
        "train",
        "pacl_scenes",
        f"init.backbone={clip}",
        "data.train_size=60",
        "train.batch_size=11",
        f"train.steps={STEPS}",
        "log.every_steps=1",
        "train.device=cpu",
        "schedule.warmup_steps=2",
        "validation={every_steps: 10, limit: 5}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = subprocess.Popen(
        [sys.executable, "-m", "ovseg", *common, f"run={tmp_path / 'one'}"],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "-m",
        "ovseg",
    ]
    two = subprocess.run(
        [*torchrun, *common, f"run={tmp_path / 'two'}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert two.returncode == 0, two.stderr
    assert "FutureWarning" not in two.stderr
    assert one.wait(60) == 0 and two.stdout.count("ovseg segment --model") == 1
    single, both = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(single) == len(both) == STEPS and sum(single[-5:]) < sum(single[:5]) - 1
    assert both == pytest.approx(single, abs=1e-4)
    figures = [
        (tmp_path / name / "validation.jsonl").read_text().splitlines() for name in ("one", "two")
    ]
    assert [json.loads(line)["miou"] for line in figures[0]] == pytest.approx(
        [json.loads(line)["miou"] for line in figures[1]], abs=0.5
    )
    assert len(figures[1]) == 2 and len(list((tmp_path / "two" / "validation").glob("*.png"))) == 2
    assert json.loads((tmp_path / "two" / "env.json").read_text())["processes"] == 2


def test_torchrun_passes_a_signal_on(tmp_path):
    """SIGTERM to torchrun reaches all processes: they save and leave; resume ends the run."""
    run_folder, steps = tmp_path / "run", 400
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "-m",
        "ovseg",
        "train",
        "clip_scenes",
        *SMALL,
        f"train.steps={steps}",
        f"run={run_folder}",
    ]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = run_folder / "log.jsonl"
    for _ in range(6000):
        if log.exists() and len(log.read_bytes().splitlines()) > 3:
            break
        assert process.poll() is None
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    saved = state.complete(run_folder / "checkpoints")
    done = state.facts_of(saved[-1])["step"]
    assert len(saved) == 1 and 3 <= done < steps and state.facts_of(saved[-1])["processes"] == 2
    with pytest.raises(ConfigError, match=r"^processes is 1 and .* begun with 2"):
        train(recipe(f"train.steps={steps}"), run_folder, resume=True, quiet=True)
    train(
        recipe(f"train.steps={done + 3}"),
        run_folder,
        resume=True,
        allow=["processes", "train.steps"],
        quiet=True,
    )
    assert [entry["step"] for entry in log_of(run_folder)][-3:] == [done, done + 1, done + 2]
