"""The loop: resume is exact, also after a kill; bad steps are skipped; the learning rate is what the recipe says."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import ovseg
from ovseg.errors import CheckpointError, ConfigError
from ovseg.training import checkpoint
from ovseg.training.loop import build_optimizer, learning_rate, train
from ovseg.training.recipe import load_recipe

SMALL = ["data.form=shapes", "data.train_size=40", "train.batch_size=8", "train.steps=6", "checkpoint.every_steps=2",
         "log.every_steps=1", "model.options={backbone: {width: 16, embed_dim: 16, local_depth: 1}}", "train.device=cpu"]


def recipe(*overrides, name="clip_scenes"):
    return load_recipe(name, [*SMALL, *overrides])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


SEGCLIP = ["model.options={frozen: false, backbone: {width: 16, embed_dim: 16, local_depth: 1}, decoder: {width: 16}}"]


@pytest.mark.parametrize("name,more", [("clip_scenes", []), ("segclip_scenes", SEGCLIP)])
def test_six_steps_equal_four_and_two(tmp_path, name, more):
    """With noise and masks drawn anew at each step, where a system has them."""
    whole = weights(train(recipe(*more, name=name), tmp_path / "a", quiet=True))
    train(recipe(*more, name=name), tmp_path / "b", quiet=True)
    for path in checkpoint.complete(tmp_path / "b" / "checkpoints")[1:]:
        (path / "COMPLETE").unlink()  # as if the run had died while it wrote the last one
    resumed = train(recipe(*more, name=name), tmp_path / "b", resume=True, quiet=True)
    assert torch.equal(whole, weights(resumed))
    log = [json.loads(line)["step"] for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert log == list(range(6))
    assert (tmp_path / "a" / "loss.png").stat().st_size > 1000
    assert torch.equal(whole, weights(ovseg.from_pretrained(tmp_path / "a" / "model")))


def test_pacl_takes_over_the_clip_and_keeps_it(tmp_path):
    clip = train(recipe(), tmp_path / "clip", quiet=True)
    pacl = train(recipe(f"model.clip_from={tmp_path / 'clip'}", name="pacl_scenes"), tmp_path / "pacl", quiet=True)
    for (name, a), b in zip(clip.backbone.state_dict().items(), pacl.backbone.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_segclips_schedule_and_rates():
    """t / 0.15 up to 15 % of the steps, then half a cosine; the trunk a thousand times more slowly; the logit scale is held."""
    published = load_recipe("segclip_vit_b16")
    total, peak = published.train.steps, published.optim.lr
    for step in (0, 100, int(0.15 * total), total // 2, total - 1):
        t = (step + 1) / total
        expected = t / 0.15 if t < 0.15 else 0.5 * (1 + math.cos(math.pi * (t - 0.15) / 0.85))
        assert learning_rate(published, step) == pytest.approx(peak * expected)
    model = ovseg.create_model("segclip_tiny")
    groups = build_optimizer(model, load_recipe("segclip_scenes", ["optim.lr=4e-3", "optim.lower_lr=4e-6"])).param_groups
    assert sorted({group["lr_scale"] for group in groups}) == pytest.approx([1e-3, 1.0])
    for bad in ("optim.warmup_share=1.5", "optim.lower_lr=-1"):
        with pytest.raises(ConfigError, match="expected a"):
            load_recipe("segclip_scenes", [bad])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "terminate"])
def test_killed_run_goes_on_to_the_same_weights(tmp_path, number):
    steps = ["train.steps=40", "checkpoint.every_steps=5"]
    expected = weights(train(recipe(*steps), tmp_path / "whole", quiet=True))
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "ovseg", "train", "clip_scenes", *SMALL, *steps, f"run={run}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    deadline = time.time() + 120
    while not checkpoint.complete(run / "checkpoints") and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    code = process.wait(60)
    done = checkpoint.complete(run / "checkpoints")
    assert done and code in ((-signal.SIGKILL, 0) if number == signal.SIGKILL else (143, 0))
    resumed = train(recipe(*steps), run, resume=True, quiet=True)
    assert torch.equal(expected, weights(resumed))


def test_a_run_is_not_overwritten(tmp_path):
    train(recipe("train.steps=1"), tmp_path, quiet=True)
    with pytest.raises(ConfigError, match="holds a run already"):
        train(recipe("train.steps=1"), tmp_path, quiet=True)


def test_old_checkpoints_are_dropped(tmp_path):
    train(recipe("checkpoint.keep=1"), tmp_path, quiet=True)
    assert [path.name for path in checkpoint.complete(tmp_path / "checkpoints")] == ["step_00000006"]
    assert not list((tmp_path / "checkpoints").glob("*.part"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(recipe("train.steps=2"), tmp_path, quiet=True)
    other = recipe("train.steps=4", "model.options={backbone: {width: 32, embed_dim: 16, local_depth: 1}}")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        train(other, tmp_path, resume=True, quiet=True)


def test_a_truncated_optimizer_is_refused(tmp_path):
    train(recipe("train.steps=2"), tmp_path, quiet=True)
    path = checkpoint.complete(tmp_path / "checkpoints")[-1] / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="no complete safetensors file"):
        train(recipe("train.steps=4"), tmp_path, resume=True, quiet=True)


def test_steps_without_a_finite_loss_are_left_out(tmp_path, monkeypatch):
    from ovseg.models.clip_dense import ClipDense

    real, calls = ClipDense.training_loss, []

    def poisoned(self, batch):
        calls.append(1)
        loss = real(self, batch)
        return {"total": loss["total"] * float("nan")} if len(calls) == 3 else loss

    monkeypatch.setattr(ClipDense, "training_loss", poisoned)
    model = train(recipe(), tmp_path / "one", quiet=True)
    assert bool(weights(model).isfinite().all())
    log = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if entry.get("skipped")] == [2]
    monkeypatch.setattr(ClipDense, "training_loss", lambda self, batch: {"total": real(self, batch)["total"] * float("nan")})
    with pytest.raises(FloatingPointError, match="10 steps in a row"):
        train(recipe("train.steps=30"), tmp_path / "all", quiet=True)


def test_learning_rate_and_weight_decay():
    r = recipe("train.steps=100", "optim.warmup_steps=10", "optim.lr=1.0")
    assert learning_rate(r, 0) == pytest.approx(0.1) and learning_rate(r, 9) > 0.97
    assert learning_rate(r, 50) == pytest.approx(0.5) and learning_rate(r, 99) < 1e-3
    decayed, plain = build_optimizer(ovseg.create_model("pacl_tiny"), r).param_groups
    assert decayed["weight_decay"] == 0.02 and plain["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in plain["params"])


def test_bf16(tmp_path):
    model = train(recipe("train.precision=bf16", "train.steps=2"), tmp_path, quiet=True)
    assert bool(weights(model).isfinite().all()) and next(model.parameters()).dtype == torch.float32


def test_bad_settings(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.root is null"):
        train(recipe("data.form=folder"), tmp_path / "a", quiet=True)
    with pytest.raises(ValueError, match="form is 'photos'"):
        train(recipe("data.form=photos"), tmp_path / "b", quiet=True)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            train(recipe("train.device=cuda"), tmp_path / "c", quiet=True)


@pytest.mark.slow
def test_fused_losses_train_to_the_same_curve(tmp_path):
    """pacl_tiny in two processes, kernels in one and the definitions in the other: far closer than two seeds are."""
    curves = {}
    for backend, seed in (("cpu", 0), ("reference", 0), ("cpu", 1)):
        run = tmp_path / f"{backend}-{seed}"
        small = ["data.form=shapes", "data.train_size=120", "train.batch_size=12", "train.steps=30", "checkpoint.every_steps=30",
                 "log.every_steps=1", f"train.seed={seed}", "train.device=cpu"]
        command = [sys.executable, "-m", "ovseg", "train", "pacl_full_scenes", *small, f"run={run}"]
        environment = {**os.environ, "OVSEG_BACKEND": backend, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        curves[backend, seed] = torch.tensor([json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()])
    fused, plain, other = curves.values()
    assert len(fused) == 30 and float(fused[-1]) < float(fused[0])
    assert float((fused - plain).abs().max()) < 0.05 * float((fused - other).abs().median())
