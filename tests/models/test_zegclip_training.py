"""ZegCLIP's objective: the published losses and gradients in three settings, classes and labels
that cannot be, odd sizes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_zegclip import CLASSES, GOLDEN, SEEN, build, close
from torch.nn import functional as F

import ovseg
import ovseg_kernels as ok
from ovseg.data.batches import MaskBatch
from ovseg.data.class_lists import class_list, read_class_embeddings
from ovseg.errors import ConfigError, InputError
from ovseg.systems import PatchFeatures
from ovseg.systems.objective import Progress, create_objective

SETTINGS = ("inductive", "transductive", "supervised")
UNSEEN = ["c", "f"]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "zegclip_tiny.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def embeddings(golden, tmp_path_factory):
    """In the published form: float16."""
    path = tmp_path_factory.mktemp("classes") / "classes.npy"
    np.save(path, golden["in/class_embeddings"].numpy().astype(np.float16))
    return str(path)


def an_objective(model, embeddings, setting):
    return create_objective(
        model.train(),
        setting=setting,
        classes=list(CLASSES),
        unseen=UNSEEN,
        class_embeddings=embeddings,
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_published_losses_and_gradients(golden, embeddings, setting, backend):
    model = build(golden)
    objective, out = an_objective(model, embeddings, setting), f"out/{setting}"
    batch = MaskBatch(golden["in/image"], golden["in/labels"].long())
    seen = {}

    def remember(module, arguments, features):
        seen["F"], seen["g"] = (
            features.tokens.detach().requires_grad_(),
            features.embedding.detach().requires_grad_(),
        )
        seen["features"] = features
        return PatchFeatures(seen["g"], seen["F"], features.grid)

    model.register_forward_hook(remember)
    with ok.backend(backend):
        rows = objective.encode(batch, Progress())
        close(rows["logits"], golden[f"{out}/logits"])
        logits = rows["logits"].detach().requires_grad_()
        losses = objective.loss({"logits": logits}, batch, Progress(), None)
        losses["total"].backward()
    labels = objective.labels(logits, batch)
    hidden = torch.isin(batch.masks, golden["in/unseen_ids"]) & (setting != "supervised")
    mapped = (
        objective.target[batch.masks.clamp(max=6)]
        .masked_fill(hidden, -1)
        .where(batch.masks != 255, 255)
    )
    assert torch.equal(mapped, golden[f"{out}/labels_mapped"].long())
    assert torch.equal(torch.where(labels < 0, 255, labels), golden[f"{out}/labels_used"].long())
    for ours, theirs in (
        ("focal", "loss_focal"),
        ("dice", "loss_dice"),
        ("total", "loss_total"),
        ("accuracy", "acc_seg"),
    ):
        assert losses[ours].item() == pytest.approx(golden[f"{out}/{theirs}"].item(), rel=1e-5), (
            ours
        )
    close(logits.grad, golden[f"{out}/dlogits"], 2e-5)
    rows["logits"].backward(logits.grad)
    close(seen["F"].grad.transpose(1, 2).unflatten(2, (8, 8)), golden[f"{out}/dF"], 2e-5)
    close(seen["g"].grad, golden[f"{out}/dg"], 2e-5)
    torch.autograd.backward(
        [seen["features"].tokens, seen["features"].embedding], [seen["F"].grad, seen["g"].grad]
    )
    checked = check_gradients(
        model,
        {
            k.removeprefix(f"{out}/grad/"): x
            for k, x in golden.items()
            if k.startswith(f"{out}/grad/")
        },
    )
    assert checked == (42 if setting == "inductive" else 8)
    assert all(p.grad is None for p in model.backbone.parameters())


def check_gradients(model, expected):
    named, prompts = dict(model.named_parameters()), model.prompts.embeddings.grad
    for name, gradient in expected.items():
        if name.endswith("prompt_embeddings"):
            found = prompts[1:] if "deep" in name else prompts[:1]
        else:
            found = named[model.published.to_ours(name)].grad
        close(found, gradient, 2e-5)
    return len(expected)


def test_upsampled_maps(golden, embeddings):
    """What no operator stores, from the logits: the published maps and their gradient."""
    for setting in SETTINGS:
        out = f"out/{setting}"
        logits = golden[f"{out}/logits"]
        up = F.interpolate(
            logits, (128, 128), mode="bilinear", align_corners=False
        ).requires_grad_()
        close(up[..., 1::3, 2::3], golden[f"{out}/logits_up_s3"])
        labels = golden[f"{out}/labels_used"].long()
        focal, dice, present = ok.upsample_mask_loss(up, labels)  # at the labels' size already
        assert int(present.sum()) == int(golden[f"{out}/num_masks"])
        ((100 * focal.sum() + (dice * present).sum()) / present.sum()).backward()
        close(up.grad[..., 1::3, 2::3], golden[f"{out}/dlogits_up_s3"], 2e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_loss_alone(golden, embeddings, backend):
    """Large logits; the second picture has no labelled pixel, with the first one and by itself."""
    model = build(golden)
    names = [CLASSES[i] for i in SEEN]
    objective = create_objective(
        model,
        setting="supervised",
        classes=names,
        unseen=[],
        class_embeddings=npy(embeddings, SEEN),
    )
    for ending, rows in (("loss", slice(0, 2)), ("loss_all_ignored", slice(1, 2))):
        logits = golden["in/loss/logits"][rows].clone().requires_grad_()
        batch = MaskBatch(
            torch.zeros(len(logits), 3, 128, 128), golden["in/loss/labels"][rows].long()
        )
        with ok.backend(backend):
            losses = objective.loss({"logits": logits}, batch, Progress(), None)
        assert losses["focal"].item() == pytest.approx(
            golden[f"out/{ending}/loss_focal"].item(), rel=1e-6
        )
        assert losses["dice"].item() == pytest.approx(
            golden[f"out/{ending}/loss_dice"].item(), rel=1e-6, abs=1e-9
        )
        (gradient,) = torch.autograd.grad(losses["total"], logits, retain_graph=True)
        close(gradient, golden[f"out/{ending}/dlogits"], 2e-5)
        if ending == "loss":
            (gradient,) = torch.autograd.grad(losses["dice"], logits)
            close(gradient, golden["out/loss/dlogits_dice_only"], 2e-5)
        else:
            assert (
                losses["accuracy"].item() == 0
                and losses["dice"].item() == 0
                and losses["focal"].item() > 0
            )


def npy(path, rows):
    other = Path(path).with_name("some.npy")
    np.save(other, np.load(path)[list(rows)])
    return str(other)


def test_classes_that_cannot_be(golden, embeddings, tmp_path):
    model = build(golden)
    for options, message in (
        ({"setting": "inducive"}, "setting is 'inducive'; expected one of"),
        (
            {"classes": ["cat", "dog", "cat"]},
            r"labels\[2\] and labels\[0\] are both 'cat'; expected distinct labels",
        ),
        (
            {"classes": ["cat", "dog"], "unseen": ["cat", "dog"]},
            "unseen names all 2 classes; expected at least one that is seen",
        ),
        (
            {"classes": ["cat", "dog"], "unseen": ["cow"]},
            "unseen names 'cow', which is none of the classes",
        ),
        ({"classes": ["cat", "dog"], "unseen": ["cat", "cat"]}, "expected each class once"),
        (
            {"classes": ["cat", "dog"], "setting": "transductive"},
            "setting is 'transductive' and no class is unseen",
        ),
        ({"classes": []}, "labels is empty"),
        ({"classes": "voc2"}, "data set is 'voc2'; expected one of"),
        ({"classes": "ade847"}, "comes without class names"),
        (
            {"classes": "voc20", "class_embeddings": embeddings},
            r"are float16 of \[7, 32\]; expected floats of \[20, 32\]",
        ),
        ({"classes": "voc20", "class_embeddings": str(tmp_path / "none.npy")}, "cannot be read"),
        ({"focl": 20.0}, "focl: unknown key"),
    ):
        with pytest.raises(ConfigError, match=message):
            create_objective(model, **options)
    all_unseen = create_objective(
        model,
        setting="supervised",
        classes=list(CLASSES),
        unseen=list(CLASSES),
        class_embeddings=embeddings,
    )
    assert all_unseen.class_texts.shape == (7, 32)


def test_class_embeddings_are_read_with_care(tmp_path):
    np.save(tmp_path / "good.npy", np.ones((2, 3)))
    assert read_class_embeddings(tmp_path / "good.npy", 2, 3).dtype == torch.float32
    np.save(tmp_path / "nan.npy", np.full((2, 3), np.nan, np.float16))
    np.save(tmp_path / "whole.npy", np.ones((2, 3), np.int64))
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=np.ones((2, 3)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-5])
    (tmp_path / "empty.npy").write_bytes(b"")
    for name, message in (
        ("nan.npy", "NaN or infinities"),
        ("whole.npy", "expected floats"),
        ("evil.npy", "cannot be read"),
        ("several.npz", "an archive"),
        ("cut.npy", "cannot be read"),
        ("empty.npy", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            read_class_embeddings(tmp_path / name, 2, 3)


def test_class_embeddings_at_inference(golden, embeddings, capsys):
    """The same labels as from the rows themselves; for any system."""
    picture = golden["in/image"].new_zeros(3, 60, 70).random_(255).byte()
    model = build(golden)
    labels = list(CLASSES)
    found = ovseg.segment(picture, labels, model=model, embeddings=embeddings)
    predictor = ovseg.Predictor(model, labels, embeddings=embeddings)
    assert torch.equal(predictor._asked().texts, golden["in/class_embeddings"])
    assert (
        np.array_equal(predictor.set_image(picture).predict().labels, found.labels)
        and len(np.unique(found.labels)) > 1
    )
    with pytest.raises(InputError, match=r"expected floats of \[6, 32\], a row for each text"):
        ovseg.segment(picture, labels[:6], model=model, embeddings=embeddings)


def test_splits_are_the_published_ones():
    """Numbers of seen and unseen classes: VOC, COCO-Stuff, Context with its background as a seen
    class, the scenes.
    """
    for name, seen, unseen in (
        ("voc20", 15, 5),
        ("coco_stuff", 156, 15),
        ("context60_zeroshot", 50, 10),
        ("digits", 19, 4),
        ("shapes", 25, 3),
    ):
        found = class_list(name)
        assert (len(found.seen_ids), len(found.unseen_ids)) == (seen, unseen), name
    assert (
        class_list("voc20").texts[10] == "diningtable"
        and class_list("digits").texts[0] == "a red zero"
    )


def tiny(setting, side=(48, 48), B=2, **options):
    torch.manual_seed(0)
    model = ovseg.create_model("zegclip_tiny", dropout=0.0)
    masks = torch.randint(0, 24, (B, *side))
    masks[masks == 23] = 255
    return create_objective(model.train(), setting=setting, **options), MaskBatch(
        torch.randn(B, 3, *side), masks
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_sizes_and_pictures_without_labels(setting):
    """Non-square and odd grids, masks of another size than the picture, no labelled pixel, one
    class alone.
    """
    for side in ((48, 48), (36, 60), (44, 20), (4, 4), (51, 46)):
        objective, batch = tiny(setting, side)
        losses = objective(batch)
        losses["total"].backward()
        assert bool(losses["total"].isfinite()) and all(
            p.grad is not None for _, p in objective.model.trainable
        )
    finer = MaskBatch(batch.images, torch.randint(0, 23, (2, 100, 90)))
    assert bool(objective(finer)["total"].isfinite())
    nothing = objective(MaskBatch(batch.images, torch.full((2, 51, 46), 255)))
    assert (
        nothing["dice"].item() == 0
        and nothing["focal"].item() > 0
        and nothing["accuracy"].item() == 0
    )
    nothing["total"].backward()
    one = create_objective(objective.model, setting="supervised", classes=["red"], unseen=[])
    assert bool(
        one(MaskBatch(batch.images, torch.zeros(2, 51, 46, dtype=torch.int64)))["total"].isfinite()
    )


def test_an_image_of_unseen_classes_alone():
    unseen = class_list("digits").unseen_ids
    for setting in SETTINGS:
        objective, batch = tiny(setting)
        batch.masks = torch.tensor(unseen)[torch.randint(0, len(unseen), (2, 48, 48))]
        with torch.no_grad():
            logits = objective.encode(batch, Progress())["logits"]
            labels = objective.labels(logits, batch)
        if setting == "inductive":
            assert bool((labels == -1).all()) and objective(batch)["dice"].item() == 0
        elif setting == "supervised":
            assert torch.equal(labels, batch.masks)
        else:  # the model's own guess among the unseen
            up = F.interpolate(logits, (48, 48), mode="bilinear", align_corners=False)[:, unseen]
            assert torch.equal(labels, torch.tensor(unseen)[up.argmax(1)])


def test_self_training_keeps_what_is_labelled():
    objective, batch = tiny("transductive")
    logits = objective.encode(batch, Progress())["logits"]
    labels, hidden = (
        objective.labels(logits, batch),
        torch.isin(batch.masks, torch.tensor(objective.classes.unseen_ids)),
    )
    assert torch.equal(labels[~hidden], batch.masks.where(batch.masks != 255, -1)[~hidden])
    assert bool(torch.isin(labels[hidden], torch.tensor(objective.classes.unseen_ids)).all())
    assert not labels.requires_grad


def test_labels_that_cannot_be():
    objective, batch = tiny("supervised")
    batch.masks[0, 0, 0] = 99
    with pytest.raises(
        InputError, match=r"batch\.masks holds 99; expected 0 to 22, or 255 where there is no label"
    ):
        objective(batch)


def test_a_model_of_nan_gives_a_loss_of_nan():
    """Which training leaves out; it does not stop by an error of the argmax."""
    objective, batch = tiny("transductive")
    with torch.no_grad():
        objective.model.descriptor.proj.bias.fill_(float("nan"))
    assert bool(objective(batch)["total"].isnan())


def test_dropout_follows_the_step():
    """Of prompts, attention and MLPs: the same when a step is done again, another one for another
    step; torch's generator is left alone.
    """
    torch.manual_seed(0)
    model = ovseg.create_model("zegclip_tiny", dropout=0.3).train()
    objective, (_, batch) = create_objective(model), tiny("inductive")
    state = torch.get_rng_state()
    values = [
        objective(batch, progress)["total"].item()
        for progress in (Progress(3), Progress(3), Progress(4), Progress(3, rank=1))
    ]
    assert (
        values[0] == values[1]
        and len(set(values)) == 3
        and torch.equal(torch.get_rng_state(), state)
    )
    model.eval()
    assert (
        objective.eval()(batch, Progress(3))["total"].item()
        == objective(batch, Progress(4))["total"].item()
    )
    prompts = model.prompts.train()(2)
    assert prompts.shape == (1, 2, 8, 64) and not torch.equal(prompts[:, 0], prompts[:, 1])


def test_other_data_are_refused():
    from ovseg.data.sources import ModelInputs, create_source, load_options

    objective, _ = tiny("inductive")
    inputs = ModelInputs.of(objective.model)
    objective.check_source(
        create_source(load_options({"kind": "masks", "set": "digits", "train_size": 2}), inputs)
    )
    with pytest.raises(
        ConfigError,
        match=r"data gives 28 classes \(red circle, .* and objective\.options\.classes 23 \(red zero",
    ):
        objective.check_source(
            create_source(load_options({"kind": "masks", "set": "shapes", "train_size": 2}), inputs)
        )


def test_texts_are_encoded_once(monkeypatch):
    objective, batch = tiny("inductive")
    monkeypatch.setattr(objective.model, "encode_text", None)
    assert objective.class_texts.shape == (19, 64) and bool(objective(batch)["total"].isfinite())
    assert not any("texts" in name for name in objective.state_dict())
    torch.testing.assert_close(objective.class_texts.norm(dim=-1), torch.ones(19))


def test_parameter_groups_are_what_published_training_comes_out_as():
    model = ovseg.create_model("zegclip_tiny")
    (group,) = model.parameter_groups(2e-4, 0.01)
    assert (
        group["weight_decay"] == 0.01
        and group["lr_scale"] == 1.0
        and len(group["params"]) == len(model.trainable)
    )
    assert json.dumps(sorted(model.parts())) == '["head", "prompts"]'
