"""Runs of ZegCLIP: what their files hold, the self-training half, resuming, starting from other
CLIPs; the published schedule.
"""

import json
import shutil

import pytest
import torch

import ovseg
from ovseg.errors import ConfigError
from ovseg.training import state
from ovseg.training.recipe import load_recipe, stages_of
from ovseg.training.schedule import learning_rate
from ovseg.training.stages import build_model, build_objective, build_optimizer
from ovseg.training.trainer import train
from ovseg.weights.files import load_tensors

SMALL = [
    "data.train_size=40",
    "data.workers=0",
    "train.batch_size=4",
    "train.steps=6",
    "checkpoint.every_steps=2",
    "checkpoint.keep=9",
    "log.every_steps=1",
    "train.device=cpu",
    "model.options.dropout=0.1",
]
HALVES = [
    "stages=[{name: a, train: {steps: 3}, schedule: {steps: 6}}, "
    "{name: b, train: {steps: 3}, objective: {options: {setting: transductive}}}]"
]


def recipe(*overrides, name="zegclip_scenes"):
    return load_recipe(name, [*SMALL, *overrides])


def tensors(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("more", [[], HALVES], ids=["one stage", "self-training"])
def test_resumed_runs_are_the_same_bit_for_bit(tmp_path, more):
    """Dropout and all; killed in the first stage, at its end and in the second."""
    whole = tensors(train(recipe(*more), tmp_path / "whole", quiet=True))
    for keep in (1, 2, 3):
        shutil.copytree(tmp_path / "whole", tmp_path / f"{keep}")
        shutil.rmtree(tmp_path / f"{keep}" / "model")
        for path in state.complete(tmp_path / f"{keep}" / "checkpoints")[keep:]:
            shutil.rmtree(path)
        assert same(
            whole, tensors(train(recipe(*more), tmp_path / f"{keep}", resume=True, quiet=True))
        )
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 6 and all({"focal", "dice", "accuracy"} <= set(entry) for entry in log)


def test_checkpoints_hold_prompts_and_head_alone(tmp_path):
    model = train(recipe(), tmp_path, quiet=True)
    names = {name for name, _ in model.trainable}
    for path in (state.complete(tmp_path / "checkpoints")[-1], tmp_path / "model"):
        assert set(load_tensors(path / "model.safetensors")) == names
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["options"]["clip"] == "clip_dense_tiny:digits" and config["clip_hash"].startswith(
        "float32:"
    )
    clip = ovseg.from_pretrained("clip_dense_tiny:digits").backbone.state_dict()
    assert same(ovseg.from_pretrained(tmp_path / "model").backbone.state_dict(), clip)
    # A stage elsewhere begins from the run, from one of its checkpoints, and trains on.
    for source in (tmp_path, state.complete(tmp_path / "checkpoints")[0]):
        still = recipe(
            f"init.model={source}",
            "optim={name: sgd, lr: 1.0e-30}",
            "train.steps=1",
            "schedule={kind: constant, min_lr: 0.0}",
        )
        found = train(still, tmp_path / f"from_{source.name}", quiet=True)
        file = (
            source / "model.safetensors"
            if source != tmp_path
            else tmp_path / "model" / "model.safetensors"
        )
        assert same(tensors(found), load_tensors(file))


def test_the_second_half_begins_at_the_first_with_a_fresh_optimizer(tmp_path):
    train(recipe(*HALVES), tmp_path, quiet=True)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in log] == [0, 0, 0, 1, 1, 1]
    assert (
        log[0]["lr"] == log[3]["lr"] and log[2]["lr"] != log[5]["lr"]
    )  # both warm up; the first one's curve is twice as long
    paths = state.complete(tmp_path / "checkpoints")
    assert [path.name for path in paths] == [
        "step_00000002",
        "step_00000003",
        "step_00000004",
        "step_00000006",
    ]
    steps = load_tensors(paths[-1] / "optimizer.safetensors")
    assert all(int(x) == 3 for name, x in steps.items() if name.startswith("step/"))


def test_all_that_is_trained_moves_and_the_clip_does_not(tmp_path):
    model = build_model(recipe())
    before, clip = (
        tensors(model),
        {name: x.clone() for name, x in model.backbone.state_dict().items()},
    )
    after = train(recipe("schedule.warmup_steps=0"), tmp_path, quiet=True)
    assert same(clip, after.backbone.state_dict())
    unmoved = {name for name, x in after.state_dict().items() if torch.equal(x, before[name])}
    assert not unmoved


def test_a_clip_of_a_run(tmp_path):
    """Without a name of its own the CLIP is in the files; with one, ``init.backbone`` is refused."""
    clip = ovseg.save_pretrained(ovseg.create_model("clip_dense_tiny"), tmp_path / "clip")
    given = [f"init.backbone={clip}", "model.options.clip=null", "train.steps=3"]
    model = train(recipe(*given), tmp_path / "run", quiet=True)
    stored = load_tensors(tmp_path / "run" / "model" / "model.safetensors")
    own = load_tensors(clip / "model.safetensors")
    assert (
        all(torch.equal(stored[name], x) for name, x in own.items())
        and set(stored) > set(own)
        and model.named_clip is None
    )
    resumed = tensors(train(recipe(*given), tmp_path / "run", resume=True, quiet=True))
    assert same(resumed, stored)
    with pytest.raises(
        ConfigError,
        match=r"init\.backbone is .* has no part 'backbone'; expected 'model' or one of \['prompts', ",
    ):
        train(recipe(f"init.backbone={clip}"), tmp_path / "both", quiet=True)
    named = train(
        recipe(f"model.options.clip={clip}", "train.steps=3"), tmp_path / "named", quiet=True
    )
    assert same(tensors(named), {name: x for name, x in resumed.items() if name not in own})


def test_data_of_other_classes_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"data gives 28 classes .* and objective\.options\.classes 23"
    ):
        train(recipe("data.set=shapes"), tmp_path, quiet=True)
    with pytest.raises(
        ConfigError, match="gives PairBatch; the objective ZegCLIPObjective expects MaskBatch"
    ):
        train(
            recipe(
                "data={kind: scenes, style: digits, train_size: 8}", name=without_augment(tmp_path)
            ),
            tmp_path / "b",
            quiet=True,
        )


def without_augment(folder):
    path = folder / "pairs.yaml"
    path.write_text("model: {name: zegclip_tiny}\ndata: {kind: scenes}\n")
    return str(path)


@pytest.mark.parametrize(
    "name,steps,half,prompts,seen",
    [
        ("zegclip_voc", 20000, 10000, 10, 15),
        ("zegclip_coco", 80000, 40000, 100, 156),
        ("zegclip_context", 40000, 20000, 100, 50),
    ],
)
def test_published_schedule_and_groups(name, steps, half, prompts, seen):
    """(2e-4 - 1e-6) (1 - t / T)^0.9 + 1e-6, in the first 1500 steps times 1 - (1 - t / 1500)(1 -
    1e-6); AdamW, one group, no clipping.
    """
    published = load_recipe(name)
    assert (
        published.train.steps == steps
        and published.train.batch_size == 16
        and published.optim.clip_grad is None
    )
    assert (
        published.model.options["prompts"] == prompts
        and published.model.options.get("seen_classes", 15) == seen
    )
    for step in (0, 1, 700, 1499, 1500, steps // 2, steps - 1):
        expected = (2e-4 - 1e-6) * (1 - step / steps) ** 0.9 + 1e-6
        if step < 1500:
            expected *= 1 - (1 - step / 1500) * (1 - 1e-6)
        assert learning_rate(published.schedule, published.optim.lr, step, steps) == pytest.approx(
            expected, rel=1e-9
        )
    first, second = stages_of(load_recipe(f"{name}_transductive"))
    assert (first.train.steps, first.schedule.steps, second.train.steps, second.schedule.steps) == (
        half,
        steps,
        half,
        None,
    )
    settings = [one.objective.options["setting"] for one in (first, second)]
    assert settings == ["inductive", "transductive"] and second.init == {"model": "previous"}
    assert first.optim == second.optim == published.optim and first.data == published.data
    model = ovseg.create_model("zegclip_tiny")
    optimizer = build_optimizer(build_objective(model, recipe()), published)
    (group,) = [group for group in optimizer.param_groups if group["params"]]
    assert (group["lr_scale"], group["weight_decay"], group["betas"], group["eps"]) == (
        1.0,
        0.01,
        (0.9, 0.999),
        1e-8,
    )
