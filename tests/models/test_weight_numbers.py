"""Tensors of weights: positions of another size, numbers of another kind or not finite."""

import numpy as np
import pytest
import torch
from hub_stand_in import CONFIG
from safetensors.torch import save_file
from torch import nn

import ovseg
from ovseg.cli.main import main
from ovseg.errors import CheckpointError
from ovseg.weights.files import check_numbers

PICTURE = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(1)
    return ovseg.create_model("pacl_tiny")


@pytest.fixture(scope="module")
def clip():
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    torch.manual_seed(2)
    return open_clip.CLIP(**CONFIG)


@pytest.mark.third_trial(11)
def test_positions_are_resized_on_request_as_open_clip_does(clip, tmp_path):
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    small, large = CONFIG, {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": 64}}
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    model = ovseg.create_model(
        "pacl_vit_b16",
        architecture=small,
        clip=str(tmp_path / "clip.pt"),
        image_size=64,
        context_length=32,
    )
    theirs = type(clip)(**{**large, "text_cfg": {**CONFIG["text_cfg"], "context_length": 32}})
    state = dict(clip.state_dict())
    resize_pos_embed(state, theirs)
    resize_text_pos_embed(state, theirs)
    visual, text = (
        model.backbone.clip.visual.positional_embedding,
        model.backbone.clip.positional_embedding,
    )
    assert torch.equal(visual, state["visual.positional_embedding"]) and torch.equal(
        text, state["positional_embedding"]
    )
    assert (
        model.spec.image_size == 64
        and model.tokenizer(["a cat"]).shape == (1, 32)
        and visual.shape == (65, 32)
    )
    again = ovseg.from_pretrained(
        ovseg.save_pretrained(model, tmp_path / "folder")
    )  # it is of this size now
    ours = model.state_dict()
    assert again.spec.image_size == 64
    assert all(torch.equal(x, ours[name]) for name, x in again.state_dict().items())
    # Of a saved folder, a file and a recipe's init; and back.
    asked = ovseg.from_pretrained(tmp_path / "folder", image_size=32)
    assert asked.backbone.clip.visual.positional_embedding.shape == (17, 32)
    dense = ovseg.create_model(
        "clip_dense", str(tmp_path / "clip.pt"), architecture=small, image_size=64
    )
    assert torch.equal(dense.backbone.clip.visual.positional_embedding, visual)
    assert ovseg.segment(PICTURE, ["cat", "dog"], model=asked).labels.shape == (48, 48)


@pytest.mark.third_trial(11)
def test_positions_of_another_size_say_how_to_ask(clip, tmp_path):
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    large = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": 64}}
    with pytest.raises(
        CheckpointError,
        match=r"1 of another shape: visual\.positional_embedding \[17, 32\] instead of \[65, 32\]\): "
        r"positions of another resolution or context; the option image_size=PIXELS .* resizes them",
    ):
        ovseg.create_model("clip_dense", str(tmp_path / "clip.pt"), architecture=large)
    assert (
        ovseg.create_model(
            "clip_dense", str(tmp_path / "clip.pt"), architecture=large, image_size=64
        ).spec.image_size
        == 64
    )
    for size in (63, 4):
        with pytest.raises(
            ValueError, match=f"image_size is {size}; expected a multiple of the patch, 8 pixels"
        ):
            ovseg.create_model("clip_dense", architecture=CONFIG, image_size=size)
    groups = {
        "text": {"kind": "clip", "width": 32, "depth": 1, "hidden": 32},
        "width": 32,
        "heads": 4,
        "hidden": 32,
        "depths": [1, 1, 1],
        "projector": 32,
        "patch_size": 16,
        "image_size": 32,
    }
    model = ovseg.create_model("groupvit_vit_s16", backbone=groups)
    folder = ovseg.save_pretrained(model, tmp_path / "groups")
    found = ovseg.from_pretrained(folder, image_size=64)
    assert found.backbone.image.pos_embed.shape == (1, 16, 32)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(found.encode_image(images).tokens, model.encode_image(images).tokens)


def _with(state, name, tensor):
    return {**state, name: tensor}


@pytest.mark.third_trial(9)
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_tensors_of_another_kind_are_named(tiny, tmp_path, dtype):
    name = "backbone.norm.weight"
    odd = tiny.state_dict()[name].abs().add(1).to(dtype)
    torch.save(_with(tiny.state_dict(), name, odd), tmp_path / "odd.pt")
    with pytest.raises(
        CheckpointError,
        match=rf"odd\.pt: {name} is of {dtype}; expected torch\.float32, or another of torch\.float16, ",
    ):
        ovseg.create_model("pacl_tiny", str(tmp_path / "odd.pt"))


@pytest.mark.third_trial(9)
def test_kinds_that_convert(tiny, tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.save({name: x.to(dtype) for name, x in tiny.state_dict().items()}, tmp_path / "w.pt")
        found = ovseg.create_model("pacl_tiny", str(tmp_path / "w.pt"))
        assert torch.equal(
            found.backbone.words.weight, tiny.backbone.words.weight.to(dtype).float()
        )
    norm = nn.BatchNorm1d(2).state_dict()  # its counter
    for counter, kind in (
        (torch.tensor(3), None),
        (torch.tensor(3.0), None),
        (torch.tensor(True), "torch.bool"),
        (torch.tensor(2.5), "torch.float32"),
        (torch.tensor(float("inf")), "torch.float32"),
    ):
        given = {**norm, "num_batches_tracked": counter}
        if kind is None:
            check_numbers("f", given, norm)
        else:
            with pytest.raises(
                CheckpointError,
                match=f"f: num_batches_tracked is of {kind}; expected whole numbers, torch.int64",
            ):
                check_numbers("f", given, norm)


@pytest.mark.third_trial(9)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_numbers_that_are_not_finite_are_named(tiny, tmp_path, value, capsys):
    broken = {name: x.clone().double() for name, x in tiny.state_dict().items()}
    name = next(key for key, x in broken.items() if x.ndim == 2)
    broken[name][0, :2] = value
    last = list(broken)[-1]
    broken[last].view(-1)[0] = value
    torch.save(broken, tmp_path / "nan.pt")
    total = broken[name].numel()
    message = (
        f"nan.pt: {name} holds 2 numbers of {total} that are NaN, infinite or beyond torch.float32 "
        f"(2 tensors of {len(broken)} do); "
        "expected finite weights"
    )
    assert (
        main(
            [
                "segment",
                "--demo",
                "-m",
                f"pacl_tiny:{tmp_path / 'nan.pt'}",
                "-o",
                str(tmp_path / "out"),
            ]
        )
        == 1
    )
    assert message in capsys.readouterr().err
    folder = ovseg.save_pretrained(tiny, tmp_path / "folder")
    save_file({key: x.float() for key, x in broken.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} holds 2 numbers"):
        ovseg.from_pretrained(folder)


@pytest.mark.third_trial(9)
def test_infinity_stays_where_the_model_has_it():
    """CLIP's mask of what a text may see holds -infinity."""
    mask = torch.full((3, 3), -float("inf")).triu(1)
    check_numbers("f", {"mask": mask}, {"mask": mask.clone()})
    broken = mask.clone()
    broken[2, 0] = float("nan")
    with pytest.raises(CheckpointError, match="mask holds 1 numbers of 9"):
        check_numbers("f", {"mask": broken}, {"mask": mask})


@pytest.mark.third_trial(9)
def test_published_files_are_looked_at_alike(tmp_path):
    options = {
        "architecture": CONFIG,
        "second_stage": 1,
        "heads": 4,
        "decoder": {"width": 32, "depth": 1, "heads": 4},
    }
    model = ovseg.create_model("segclip_vit_b16", **options)
    state = ovseg.official_state_dict(model)
    for tensor, message in (
        (state["clip.visual.proj"].long(), r"clip\.visual\.proj is of torch\.int64"),
        (state["clip.visual.proj"] * float("nan"), r"clip\.visual\.proj holds \d+ numbers of"),
    ):
        with pytest.raises(CheckpointError, match=message):
            ovseg.load_official_state_dict(model, _with(state, "clip.visual.proj", tensor))
