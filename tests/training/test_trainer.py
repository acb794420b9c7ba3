"""The loop: resume is exact, also after a kill; bad steps are skipped; the learning rate is what
the recipe says.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

import ovseg
import ovseg_kernels
from ovseg.cli.main import main
from ovseg.data.batches import Batch, PairBatch
from ovseg.data.scenes import Scenes
from ovseg.data.sources.scenes import ScenePairs
from ovseg.errors import CheckpointError, ConfigError, DataError
from ovseg.evaluation.validation import validation
from ovseg.systems.clip_dense.objective import ClipDenseObjective
from ovseg.training import state, trainer
from ovseg.training.hooks import Hook
from ovseg.training.recipe import load_recipe, stages_of
from ovseg.training.schedule import Schedule, learning_rate
from ovseg.training.stages import build_model, build_objective, build_optimizer
from ovseg.training.trainer import train
from ovseg.weights.files import load_tensors

SMALL = [
    "data.style=shapes",
    "data.train_size=40",
    "train.batch_size=8",
    "train.steps=6",
    "checkpoint.every_steps=2",
    "log.every_steps=1",
    "model.options={backbone: {width: 16, embed_dim: 16, local_depth: 1}}",
    "train.device=cpu",
]


SMALL_MODEL = {"backbone": {"width": 16, "embed_dim": 16, "local_depth": 1}}


def recipe(*overrides, name="clip_scenes"):
    return load_recipe(name, [*SMALL, *overrides])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


SEGCLIP = [
    "model.options={backbone: {width: 16, embed_dim: 16, local_depth: 1}, decoder: {width: 16, "
    "depth: 1, heads: 2}}"
]


GROUPVIT = [
    "model.options={backbone: {width: 16, embed_dim: 16, local_depth: 1, heads: 2, hidden: 16, "
    "projector: 16}}"
]
NOUNS = [
    "stages=[]",
    "data={kind: entity_scenes, gives: nouns, nouns: 2, style: shapes, train_size: 40}",
    GROUPVIT[0].replace("{backbone", "{multi_label: true, backbone"),
    "objective.options={multi_label: 1.0}",
]


def test_what_the_host_reads_stays_there(tmp_path, monkeypatch):
    """The lengths of packed texts are sizes of tensors: read from a GPU, it would be waited for at
    each step.
    """
    kept, to = [], Batch.to
    monkeypatch.setattr(
        Batch, "to", lambda batch, device, but=(): kept.append(set(but)) or to(batch, device, but)
    )
    for name, more in (("clip_scenes", []), ("groupvit_scenes", NOUNS)):
        train(recipe("train.steps=1", *more, name=name), tmp_path / name, quiet=True)
    assert len(kept) == 2 and not kept[0] and {"token_ids", "noun_ids"} <= kept[1]
    texts = torch.ones(2, 5, dtype=torch.int64)
    moved = PairBatch(torch.zeros(2, 3, 8, 8), texts, texts[:, 0], texts[:, 0]).to(
        "meta", but=["token_ids"]
    )
    assert (
        moved.token_ids is texts
        and moved.images.device.type == moved.text_ids.device.type == "meta"
    )


@pytest.mark.parametrize(
    "name,more", [("clip_scenes", []), ("segclip_scenes", SEGCLIP), ("groupvit_scenes", NOUNS)]
)
def test_six_steps_equal_four_and_two(tmp_path, name, more):
    """With noise and masks drawn anew at each step, where a system has them."""
    whole = weights(train(recipe(*more, name=name), tmp_path / "a", quiet=True))
    train(recipe(*more, name=name), tmp_path / "b", quiet=True)
    for path in state.complete(tmp_path / "b" / "checkpoints")[1:]:
        (path / "COMPLETE").unlink()  # as if the run had died while it wrote the last one
    resumed = train(recipe(*more, name=name), tmp_path / "b", resume=True, quiet=True)
    assert torch.equal(whole, weights(resumed))
    log = [
        json.loads(line)["step"] for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()
    ]
    assert log == list(range(6))
    assert (tmp_path / "a" / "loss.png").stat().st_size > 1000
    assert torch.equal(whole, weights(ovseg.from_pretrained(tmp_path / "a" / "model")))


def test_pacl_takes_over_the_clip_and_keeps_it(tmp_path):
    clip = train(recipe(), tmp_path / "clip", quiet=True)
    pacl = train(
        recipe(f"init.backbone={tmp_path / 'clip'}", name="pacl_scenes"),
        tmp_path / "pacl",
        quiet=True,
    )
    taken = {name: x for name, x in clip.state_dict().items() if name.startswith("backbone.")}
    assert taken and all(torch.equal(x, pacl.state_dict()[name]) for name, x in taken.items())


def test_segclips_schedule_and_rates():
    """t / 0.15 up to 15 % of the steps, then half a cosine; the trunk a thousand times more slowly;
    the logit scale is held.
    """
    published = load_recipe("segclip_vit_b16")
    total, peak = published.train.steps, published.optim.lr
    for step in (0, 100, int(0.15 * total), total // 2, total - 1):
        t = (step + 1) / total
        expected = t / 0.15 if t < 0.15 else 0.5 * (1 + math.cos(math.pi * (t - 0.15) / 0.85))
        assert learning_rate(published.schedule, peak, step, total) == pytest.approx(
            peak * expected
        )
    model = ovseg.create_model("segclip_tiny")
    slow = load_recipe("segclip_scenes", ["optim.lr=4e-3", "optim.lower_lr=4e-6"])
    groups = build_optimizer(build_objective(model, slow), slow).param_groups
    assert sorted({group["lr_scale"] for group in groups}) == pytest.approx([1e-3, 1.0])
    for bad in ("schedule.warmup_share=1.5", "optim.lower_lr=-1"):
        with pytest.raises(ConfigError, match="expected a"):
            load_recipe("segclip_scenes", [bad])


def test_schedules_of_groupvit_and_ovsegmentor():
    """Rates times batch / 4096; warm-up from its own rate over the beginning of the cosine; what
    has two dimensions decays, scalars too.
    """
    one, two = stages_of(load_recipe("ovsegmentor_vit_b16"))
    (whole,) = stages_of(load_recipe("groupvit_vit_s16"))
    rates = (
        (one, 30_000, 2000, 3.2e-4, 8e-6, 8e-5),
        (two, 10_000, 0, 2.5e-6, 2.5e-6, 2.5e-7),
        (whole, 30_000, 2000, 1.6e-3, 4e-6, 4e-5),
    )
    for stage, steps, warm, peak, first, last in rates:
        rate = [
            learning_rate(stage.schedule, stage.optim.lr, step, steps)
            for step in range(0, steps + 1, 500)
        ]
        assert rate[0] == pytest.approx(first) and rate[-1] == pytest.approx(last)
        for step, found in zip(range(0, steps, 500), rate, strict=False):
            cosine = last + (peak - last) * (1 + math.cos(math.pi * step / steps)) / 2
            assert found == pytest.approx(
                cosine if step >= warm else first + (peak - first) * step / warm, rel=1e-5
            )
        optim = stage.optim
        assert (optim.weight_decay, optim.clip_grad, tuple(optim.betas), optim.eps) == (
            0.05,
            5.0,
            (0.9, 0.999),
            1e-8,
        )
    assert (one.train.batch_size, two.train.batch_size, whole.train.batch_size) == (
        2048,
        1024,
        4096,
    )
    stage = stages_of(load_recipe("ovsegmentor_scenes"))[1]
    model = build_model(stage)
    groups = build_optimizer(build_objective(model, stage), stage).param_groups
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {
        id(p)
        for name, p in model.named_parameters()
        if p.requires_grad and (p.ndim == 1 or name.endswith(".bias"))
    } == spared
    held = ("backbone.text.", "teacher.")  # texts are not trained, the teacher follows
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith(held))
    assert all(
        p.requires_grad
        for name, p in model.named_parameters()
        if name.startswith(("backbone.image.", "bridge_projector."))
    )


def test_the_second_stage_goes_on_from_the_first(tmp_path):
    """And its teacher begins as the image tower that the first stage left."""
    small = [
        "data.train_size=16",
        "train.batch_size=8",
        "train.steps=3",
        "checkpoint.every_steps=2",
        "log.every_steps=1",
        *GROUPVIT,
    ]
    begun = {}

    class First(Hook):
        def after_step(self, trainer, step):
            if trainer.state.stage == 1 and not begun:
                model = trainer.state.objective.model
                begun.update(
                    {
                        "image": model.image.state_dict(),
                        "teacher": {k: x.clone() for k, x in model.teacher.state_dict().items()},
                    }
                )

    tiny = load_recipe("ovsegmentor_scenes", small)
    tiny.stages[1]["train"]["steps"] = 3
    whole = weights(train(tiny, tmp_path / "a", quiet=True, hooks=[First()]))
    for path in state.complete(tmp_path / "a" / "checkpoints"):
        if state.facts_of(path)["stage"] == 1 and state.facts_of(path)["step"] == 3:
            (path / "COMPLETE").unlink()
    assert torch.equal(whole, weights(train(tiny, tmp_path / "a", resume=True, quiet=True)))
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [("mask" in entry, "entity" in entry) for entry in log] == [(False, True)] * 3 + [
        (True, True)
    ] * 3
    far = sum(float((begun["teacher"][name] - x).abs().sum()) for name, x in begun["image"].items())
    size = sum(float(x.abs().sum()) for x in begun["image"].values())
    assert 0 <= far < 0.05 * size


KILLED = ["train.steps=90", "checkpoint.every_steps=5"]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    torch.manual_seed(0)
    return weights(train(recipe(*KILLED), tmp_path_factory.mktemp("whole"), quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "number,expected",
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)],
    ids=["kill", "terminate"],
)
def test_killed_run_goes_on_to_the_same_weights(tmp_path, never_killed, number, expected):
    """Through the command line; other moments are in tests/distributed/test_resume.py, other
    signals in test_endings.py.
    """
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "ovseg", "train", "clip_scenes", *SMALL, *KILLED, f"run={run}"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    deadline = time.time() + 120
    while not state.complete(run / "checkpoints") and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(60) == expected
    done = state.complete(run / "checkpoints")
    assert done and done[-1].name < "step_00000090" and not (run / "model").exists()
    resumed = train(recipe(*KILLED), run, resume=True, quiet=True)
    assert torch.equal(never_killed, weights(resumed))


@pytest.mark.bad_input("training", "a folder that holds another run")
def test_a_run_is_not_overwritten(tmp_path):
    train(recipe("train.steps=1"), tmp_path, quiet=True)
    with pytest.raises(ConfigError, match="holds a run already"):
        train(recipe("train.steps=1"), tmp_path, quiet=True)


def test_old_checkpoints_are_dropped(tmp_path):
    train(recipe("checkpoint.keep=1"), tmp_path, quiet=True)
    assert [path.name for path in state.complete(tmp_path / "checkpoints")] == ["step_00000006"]
    assert not list((tmp_path / "checkpoints").glob("*.part")) and not list(
        (tmp_path / "checkpoints").glob(".*")
    )


@pytest.mark.third_trial(4)
def test_what_a_killed_run_was_saving_is_removed(tmp_path):
    left = tmp_path / "checkpoints" / ".part.4194305-0123abcd.step_00000001"
    left.mkdir(parents=True)
    (left / "COMPLETE").write_text("")
    assert state.complete(tmp_path / "checkpoints") == []
    train(recipe("train.steps=1"), tmp_path, resume="auto", quiet=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


@pytest.mark.bad_input("training", "a checkpoint of another model")
def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(recipe("train.steps=2"), tmp_path, quiet=True)
    other = recipe(
        "train.steps=4", "model.options={backbone: {width: 32, embed_dim: 16, local_depth: 1}}"
    )
    with pytest.raises(CheckpointError, match="does not fit the model"):
        train(other, tmp_path, resume=True, allow=["train.steps", "model.options"], quiet=True)


@pytest.mark.bad_input("training", "a loss that is not finite")
def test_steps_without_a_finite_loss_are_left_out(tmp_path, monkeypatch):
    real, calls = ClipDenseObjective.loss, []

    def poisoned(self, *arguments):
        calls.append(1)
        loss = real(self, *arguments)
        return {"total": loss["total"] * float("nan")} if len(calls) == 3 else loss

    monkeypatch.setattr(ClipDenseObjective, "loss", poisoned)
    model = train(recipe(), tmp_path / "one", quiet=True)
    assert bool(weights(model).isfinite().all())
    log = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if entry.get("skipped")] == [2]
    monkeypatch.setattr(
        ClipDenseObjective,
        "loss",
        lambda self, *a: {"total": real(self, *a)["total"] * float("nan")},
    )
    with pytest.raises(FloatingPointError, match="10 steps in a row"):
        train(recipe("train.steps=30"), tmp_path / "all", quiet=True)


def test_learning_rate_and_weight_decay():
    default = Schedule(warmup_steps=10)
    assert (
        learning_rate(default, 1.0, 0, 100) == pytest.approx(0.1)
        and learning_rate(default, 1.0, 9, 100) > 0.97
    )
    assert (
        learning_rate(default, 1.0, 50, 100) == pytest.approx(0.5)
        and learning_rate(default, 1.0, 99, 100) < 1e-3
    )
    objective = build_objective(ovseg.create_model("pacl_tiny"), recipe())
    groups = build_optimizer(objective, recipe()).param_groups
    assert all(
        (p.ndim >= 2) == (group["weight_decay"] == 0.02)
        for group in groups
        for p in group["params"]
    )
    assert sorted({group["weight_decay"] for group in groups}) == [0, 0.02]


def test_schedules_of_other_systems():
    """ZegCLIP's poly with a warm-up on top, stopped half-way; OVSegmentor's cosine whose warm-up
    takes its beginning's place.
    """
    poly = Schedule("poly", warmup_steps=1500, warmup_start=1e-6, min_lr=1e-6, steps=20000)
    for step in (0, 700, 1499, 1500, 9999):
        warm = 1 - (1 - step / 1500) * (1 - 1e-6) if step < 1500 else 1
        expected = warm * ((2e-4 - 1e-6) * (1 - step / 20000) ** 0.9 + 1e-6)
        assert learning_rate(poly, 2e-4, step, 10000) == pytest.approx(expected)
    cosine = Schedule(warmup_steps=20, warmup_mode="replace", warmup_start=0.025, min_lr=8e-5)
    assert learning_rate(cosine, 3.2e-4, 0, 300) == pytest.approx(8e-6)
    assert learning_rate(cosine, 3.2e-4, 10, 300) == pytest.approx(8e-6 + 0.5 * (3.2e-4 - 8e-6))
    for step in (20, 150, 299):
        assert learning_rate(cosine, 3.2e-4, step, 300) == pytest.approx(
            8e-5 + 0.5 * 2.4e-4 * (1 + math.cos(math.pi * step / 300))
        )
    flat = Schedule("constant", warmup_steps=0)
    assert {learning_rate(flat, 0.3, step, 10) for step in range(10)} == {0.3}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(tmp_path, precision):
    model = train(
        recipe(f"train.precision={precision}", "train.chunk=4", "train.steps=4"),
        tmp_path,
        quiet=True,
    )
    assert bool(weights(model).isfinite().all()) and next(model.parameters()).dtype == torch.float32
    facts = state.facts_of(state.complete(tmp_path / "checkpoints")[-1])
    skipped = [
        json.loads(line).get("skipped", False)
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert not all(skipped) and facts["scaler"]["scale"] == (
        2.0**16 / 2 ** sum(skipped) if precision == "fp16" else 1.0
    )


@pytest.mark.bad_input("training", "settings that cannot go together")
def test_bad_settings(tmp_path):
    (tmp_path / "folder.yaml").write_text(
        "{model: {name: pacl_tiny}, data: {kind: folder}, train: {device: cpu}}"
    )
    with pytest.raises(ConfigError, match=r"data\.root is null"):
        train(load_recipe(tmp_path / "folder.yaml"), tmp_path / "a", quiet=True)
    with pytest.raises(ConfigError, match=r"data\.kind is 'mask'; expected one of"):
        load_recipe(tmp_path / "folder.yaml", ["data.kind=mask"])
    (tmp_path / "masks.yaml").write_text(
        "{model: {name: pacl_tiny}, data: {kind: masks, train_size: 80}, train: {device: cpu}}"
    )
    with pytest.raises(
        ConfigError, match=r"the data give MaskBatch and objective.options.classes is null"
    ):
        train(load_recipe(tmp_path / "masks.yaml"), tmp_path / "m", quiet=True)
    with pytest.raises(ConfigError, match="form is 'photos'"):
        train(recipe("data.style=photos"), tmp_path / "b", quiet=True)
    with pytest.raises(ConfigError, match=r"init\.backbone is 'nowhere': nowhere does not exist"):
        train(recipe("init.backbone=nowhere"), tmp_path / "d", quiet=True)
    with pytest.raises(ConfigError, match="has no part 'tower'; expected 'model' or one of"):
        train(recipe("init.tower=previous"), tmp_path / "e", quiet=True)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            train(recipe("train.device=cuda"), tmp_path / "c", quiet=True)


@pytest.mark.slow
def test_fused_losses_train_to_the_same_curve(tmp_path):
    """pacl_tiny by the kernels and by the definitions: far closer than two seeds are."""
    curves = {}
    for backend, seed in (("cpu", 0), ("reference", 0), ("cpu", 1)):
        run = tmp_path / f"{backend}-{seed}"
        small = [
            "data.style=shapes",
            "data.train_size=120",
            "train.batch_size=12",
            "train.steps=30",
            "checkpoint.every_steps=30",
            "log.every_steps=1",
            f"train.seed={seed}",
            "train.device=cpu",
        ]
        with ovseg_kernels.backend(backend):
            train(load_recipe("pacl_full_scenes", small), run, quiet=True)
        curves[backend, seed] = torch.tensor(
            [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
        )
    fused, plain, other = curves.values()
    assert len(fused) == 30 and float(fused[-1]) < float(fused[0])
    assert float((fused - plain).abs().max()) < 0.05 * float((fused - other).abs().median())


@pytest.mark.bad_input("training", "resume with another recipe")
def test_another_recipe_is_refused_by_the_key(tmp_path):
    train(recipe("train.steps=2"), tmp_path, quiet=True)
    before = (tmp_path / "config.yaml").read_bytes()
    for key, value in (
        ("optim.lr", "0.5"),
        ("train.seed", "1"),
        ("data.train_size", "48"),
        ("train.batch_size", "4"),
        ("model.options.readout", "naclip"),
        ("init.backbone", "runs/other"),
        ("objective.name", "pacl"),
    ):
        with pytest.raises(ConfigError, match=rf"^{key} is .* was begun with .* --allow {key}"):
            train(recipe("train.steps=2", f"{key}={value}"), tmp_path, resume=True, quiet=True)
    with pytest.raises(ConfigError, match=r"^optim\.lr is"):
        train(
            recipe("train.steps=4", "optim.lr=0.5"),
            tmp_path,
            resume=True,
            allow=["train.steps"],
            quiet=True,
        )
    assert (tmp_path / "config.yaml").read_bytes() == before
    train(recipe("train.steps=4"), tmp_path, resume=True, allow=["train.steps"], quiet=True)
    assert load_recipe(tmp_path / "config.yaml").train.steps == 4
    assert (tmp_path / "config.until_step_00000002.yaml").read_bytes() == before


def test_the_log_tells_speed_and_waiting(tmp_path):
    train(recipe("data.workers=2"), tmp_path, quiet=True)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(entries) == 6 and all(
        0 <= entry["data_share"] <= 1 and entry["samples_per_second"] > 0 for entry in entries
    )


def test_a_parameter_without_a_gradient_is_no_obstacle(tmp_path, monkeypatch):
    """ZegCLIP's last layer has such; the optimizer then knows nothing of it."""

    def with_one_more(made):
        model = build_model(made)
        model.unused = torch.nn.Parameter(torch.zeros(3))
        return model

    monkeypatch.setattr(trainer, "build_model", with_one_more)
    whole = weights(train(recipe(), tmp_path / "a", quiet=True))
    train(recipe(), tmp_path / "b", quiet=True)
    last = state.complete(tmp_path / "b" / "checkpoints")[-1]
    assert not any("unused" in name for name in load_tensors(last / "optimizer.safetensors"))
    shutil.rmtree(last)
    assert torch.equal(whole, weights(train(recipe(), tmp_path / "b", resume=True, quiet=True)))


def test_the_average_is_saved_and_goes_on(tmp_path):
    averaged = ["train.ema=0.9"]
    whole = train(recipe(*averaged), tmp_path / "a", quiet=True)
    plain = train(recipe(), tmp_path / "plain", quiet=True)
    last = state.complete(tmp_path / "a" / "checkpoints")[-1]
    assert torch.equal(
        weights(plain),
        weights(
            ovseg.create_model("clip_dense_tiny", str(last / "model.safetensors"), **SMALL_MODEL)
        ),
    )
    by_hand, seen = None, []

    class Watch(Hook):
        def after_step(self, trainer, step):
            seen.append(weights(trainer.state.objective.model))

    train(recipe(), tmp_path / "watched", quiet=True, hooks=[Watch()])
    for now in seen:
        by_hand = now if by_hand is None else 0.9 * by_hand + 0.1 * now
    assert torch.allclose(weights(whole), by_hand, atol=1e-6) and not torch.allclose(
        by_hand, weights(plain), atol=1e-6
    )
    train(recipe(*averaged), tmp_path / "b", quiet=True)
    shutil.rmtree(state.complete(tmp_path / "b" / "checkpoints")[-1])
    assert torch.equal(
        weights(train(recipe(*averaged), tmp_path / "b", resume=True, quiet=True)), weights(whole)
    )


def test_chunks_train_to_the_same_curve(tmp_path):
    curves = []
    for chunk in ("null", 3):
        train(recipe(f"train.chunk={chunk}"), tmp_path / str(chunk), quiet=True)
        curves.append(
            [
                json.loads(line)["loss"]
                for line in (tmp_path / str(chunk) / "log.jsonl").read_text().splitlines()
            ]
        )
    assert curves[0] == pytest.approx(curves[1], abs=1e-4) and len(set(curves[0])) == 6


STAGES = """
model: {name: clip_dense_tiny, options: {backbone: {width: 16, embed_dim: 16, local_depth: 1}}}
data: {kind: scenes, style: shapes, train_size: 40}
schedule: {warmup_steps: 0}
train: {batch_size: 8, steps: 4, device: cpu}
checkpoint: {every_steps: 2, keep: 9}
log: {every_steps: 1}
stages:
- {name: clip, schedule: {kind: poly, steps: 8}, optim: {lr: 0.004}}
- name: pacl
  model: {name: pacl_tiny}
  init: {backbone: previous}
  optim: {name: sgd, lr: 0.1}
  data: {captions: 2}
  train: {steps: 3}
"""


def test_stages(tmp_path):
    """One run: a CLIP that stops half-way of its schedule, then PACL on it with an optimizer, data
    and steps of its own.
    """
    (tmp_path / "two.yaml").write_text(STAGES)
    two = load_recipe(tmp_path / "two.yaml")
    model = train(two, tmp_path / "a", quiet=True)
    assert model.name == "pacl_tiny" and len(state.complete(tmp_path / "a" / "checkpoints")) == 4
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["step"]) for entry in log] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 4),
        (1, 5),
        (1, 6),
    ]
    assert [entry["lr"] for entry in log[:4]] == pytest.approx(
        [0.004 * (1 - s / 8) ** 0.9 for s in range(4)]
    ) and log[4]["lr"] == 0.1
    clip = load_tensors(state.complete(tmp_path / "a" / "checkpoints")[1] / "model.safetensors")
    assert all(
        torch.equal(value, clip[name])
        for name, value in model.state_dict().items()
        if name.startswith("backbone.")
    )
    for keep in (1, 2, 3):  # in the first stage, at its end, in the second
        run = tmp_path / f"until_{keep}"
        train(two, run, quiet=True)
        for path in state.complete(run / "checkpoints")[keep:]:
            shutil.rmtree(path)
        assert torch.equal(weights(train(two, run, resume=True, quiet=True)), weights(model))
    with pytest.raises(
        ConfigError, match=r"stages\[1\]\.train\.stepz: unknown key, did you mean train\.steps"
    ):
        load_recipe(tmp_path / "two.yaml", ["stages=[{},{train: {stepz: 1}}]"])


def test_a_stage_starts_from_the_one_before(tmp_path):
    """ZegCLIP's self-training: the same model, a fresh optimizer."""
    (tmp_path / "r.yaml").write_text(STAGES)
    half = load_recipe(
        tmp_path / "r.yaml",
        ["stages=[{name: a}, {name: b, train: {steps: 1}, optim: {name: sgd, lr: 1.0e-30}}]"],
    )
    model = train(half, tmp_path / "run", quiet=True)
    first = load_tensors(state.complete(tmp_path / "run" / "checkpoints")[1] / "model.safetensors")
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    again = load_recipe(
        tmp_path / "r.yaml",
        [
            f"init.model={tmp_path / 'run' / 'checkpoints' / 'step_00000004'}",
            "stages=[]",
            "optim={name: sgd, lr: 1.0e-30}",
            "train.steps=1",
        ],
    )
    assert all(
        torch.equal(value, first[name])
        for name, value in train(again, tmp_path / "again", quiet=True).state_dict().items()
    )


def test_validation(tmp_path):
    called = []

    def evaluate(model, step, folder):
        called.append((step, model.training, folder.name))
        return {"miou": {3: 40.0, 6: 30.0}[step]}

    small = ["validation.every_steps=3"]
    plain = weights(train(recipe(), tmp_path / "plain", quiet=True))
    assert torch.equal(
        plain, weights(train(recipe(*small), tmp_path / "a", quiet=True, evaluate=evaluate))
    )
    assert called == [(3, False, "validation"), (6, False, "validation")]
    lines = [
        json.loads(line) for line in (tmp_path / "a" / "validation.jsonl").read_text().splitlines()
    ]
    assert lines == [{"step": 3, "miou": 40.0}, {"step": 6, "miou": 30.0}]
    assert json.loads((tmp_path / "a" / "best" / "config.json").read_text())["step"] == 3
    real = validation(recipe("validation={every_steps: 3, limit: 4}"))
    figures = real(ovseg.from_pretrained(tmp_path / "a" / "best"), 3, tmp_path / "a" / "validation")
    assert (
        0 <= figures["miou"] <= 100
        and (tmp_path / "a" / "validation" / "step_00000003.png").stat().st_size > 1000
    )
    with pytest.raises(ConfigError, match=r"validation\.root is null"):
        validation(recipe("validation={every_steps: 3, data: voc21}"))


def test_epochs_and_uneven_last_batches(tmp_path):
    """40 pictures in batches of 16: 16, 16 and 8, twice."""
    seen = []

    class Watch(Hook):
        def after_step(self, trainer, step):
            seen.append(step.images)

    train(
        recipe("train.epochs=2", "train.drop_last=false", "train.batch_size=16"),
        tmp_path,
        quiet=True,
        hooks=[Watch()],
    )
    assert seen == [16, 16, 8, 16, 16, 8]


@pytest.mark.bad_input("training", "pictures that cannot be read")
def test_too_many_bad_pictures_end_training(tmp_path, monkeypatch):
    real, seen = ScenePairs.collate, []

    def bad(self, samples):
        seen.append(1)
        return replace(real(self, samples), skipped=(f"picture {len(seen)} is bad",))

    monkeypatch.setattr(ScenePairs, "collate", bad)
    with pytest.raises(
        DataError, match="2 of 40 pictures cannot be used, 1 % may; the last: picture 2 is bad"
    ):
        train(recipe(), tmp_path, quiet=True)


def test_a_folder_of_pictures_from_training_to_labels(tmp_path, capsys):
    """Pictures with captions beside them, two workers, one picture that is damaged; then the run
    segments one of them.
    """
    scenes = Scenes("shapes", "train", 110, 0)
    for i in range(len(scenes)):
        Image.fromarray(scenes[i].image).save(tmp_path / f"{i:03}.png")
        (tmp_path / f"{i:03}.txt").write_text(
            "\n".join(caption.text for caption in scenes[i].captions)
        )
    (tmp_path / "007.png").write_bytes(b"no picture")
    (tmp_path / "folder.yaml").write_text(
        "{model: {name: pacl_tiny, options: {trained: [embedder, vision, text], backbone: {width: "
        "16, embed_dim: 16, local_depth: 1}}},"
        f" data: {{kind: folder, root: '{tmp_path}', workers: 2}}, train: {{epochs: 1, "
        f"batch_size: 11, device: cpu}},"
        " log: {every_steps: 1}}"
    )
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "folder.yaml"), f"run={run}"]) == 0
    assert len((run / "log.jsonl").read_text().splitlines()) == 10
    facts = state.facts_of(state.complete(run / "checkpoints")[-1])
    assert len(facts["skips"]["seen"]) == 1 and "007.png" in facts["skips"]["seen"][0]
    assert (
        main(
            [
                "segment",
                str(tmp_path / "001.png"),
                "--model",
                str(run),
                "--labels",
                "red,blue",
                "-o",
                str(tmp_path / "out"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert (tmp_path / "out" / "001.overlay.png").exists(), list((tmp_path / "out").iterdir())
