"""Names as the field writes them: the same weights under each of their names, and what is said of a
name that is none.
"""

import json
import sys

import numpy as np
import pytest
import torch
from hub_stand_in import ARCHITECTURE, CONFIG, PREPROCESS, bundle, fill_cache, open_clip_config
from safetensors.torch import save, save_file

import ovseg
from ovseg.errors import CheckpointError, InputError, WeightsError
from ovseg.systems import names
from ovseg.weights import hub

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
PICTURE = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
LABELS = ["cat", "wall", "a red seven"]


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """A small architecture of open_clip's with one pretrained tag."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS]
        )
        patch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
        patch.setitem(
            open_clip.pretrained._PRETRAINED,
            ARCHITECTURE,
            {"drawn": open_clip.pretrained._pcfg(hf_hub="small/clip/", quick_gelu=True)},
        )
        open_clip.add_model_config(folder)
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("OVSEG_CACHE", str(tmp_path / "ovseg"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def clip():
    """transformers' model with random weights, in sizes of the small architecture."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(3)
    text = {
        "vocab_size": 49408,
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # or all patches look alike
    return model


def labels(source, **options):
    return ovseg.segment(PICTURE, LABELS, model=ovseg.from_pretrained(source, **options)).labels


def state_of(clip):
    from ovseg.weights.transformers_layout import from_clip

    return {name: tensor.contiguous() for name, tensor in from_clip(clip.state_dict()).items()}


def test_one_checkpoint_under_all_its_names(clip, cache, tmp_path):
    state = state_of(clip)
    clip.save_pretrained(tmp_path / "transformers")
    save_file(state, tmp_path / "clip.safetensors")
    torch.save(
        {
            "epoch": 3,
            "name": "run",
            "state_dict": {f"module.{name}": x for name, x in state.items()},
        },
        tmp_path / "clip.pt",
    )
    torch.save(state, tmp_path / "clip.bin")
    fill_cache(cache, "small/clip", {"open_clip_model.safetensors": save(state)})
    fill_cache(
        cache,
        "small/whole",
        {"open_clip_config.json": open_clip_config(), "open_clip_model.safetensors": save(state)},
    )
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "transformers").iterdir()}
    fill_cache(cache, "small/theirs", theirs)
    expected = labels(f"{ARCHITECTURE}:drawn")
    assert len(np.unique(expected)) > 1
    forms = [
        ARCHITECTURE,
        "hf-hub:small/clip",
        "hf-hub:small/whole",
        "hf-hub:small/theirs",
        tmp_path / "clip.safetensors",
        tmp_path / "clip.pt",
        tmp_path / "clip.bin",
        tmp_path / "transformers",
        tmp_path / "transformers" / "model.safetensors",
        f"{ARCHITECTURE}:{tmp_path / 'clip.pt'}",
        f"{ARCHITECTURE}:{tmp_path / 'transformers'}",
        f"{ARCHITECTURE}:hf-hub:small/whole",
    ]
    fill_cache(cache, "small/clip", {"open_clip_config.json": open_clip_config()})
    for form in forms:
        assert np.array_equal(labels(str(form)), expected), form
    saved = ovseg.from_pretrained(str(tmp_path / "transformers")).save_pretrained(tmp_path / "ours")
    assert (
        np.array_equal(labels(saved), expected)
        and json.loads((saved / "config.json").read_text())["options"]["readout"] == "naclip"
    )
    fill_cache(cache, "small/ours", {path.name: path.read_bytes() for path in saved.iterdir()})
    assert np.array_equal(labels("hf-hub:small/ours"), expected)
    assert not np.array_equal(labels(ARCHITECTURE, readout="clip"), expected)
    whole = ovseg.create_model(ARCHITECTURE, pretrained="drawn", readout="naclip")
    assert np.array_equal(ovseg.segment(PICTURE, LABELS, model=whole).labels, expected)
    assert np.array_equal(
        ovseg.segment(PICTURE, LABELS, model=f"{ARCHITECTURE}:drawn").labels, expected
    )
    assert ovseg.create_model(f"{ARCHITECTURE}:drawn").source == f"{ARCHITECTURE}:drawn"
    trained = ovseg.create_model(
        "pacl_vit_b16", architecture=ARCHITECTURE, clip=str(tmp_path / "clip.pt")
    )
    assert torch.equal(trained.backbone.clip.text_projection, state["text_projection"])


def test_a_name_is_looked_up_once(clip, cache, monkeypatch):
    from ovseg.systems import weight_sources
    from ovseg.weights import clip as clips

    fill_cache(cache, "small/clip", {"open_clip_model.safetensors": save(state_of(clip))})
    asked = []
    for place, function in (
        (names, "tags_of"),
        (names, "bundled_weights"),
        (weight_sources, "tags"),
        (clips, "fetch"),
        (clips, "tags_of"),
    ):
        real = getattr(place, function)
        monkeypatch.setattr(
            place,
            function,
            lambda *given, real=real, name=function, **ways: (
                asked.append(name) or real(*given, **ways)
            ),
        )
    for form in (ARCHITECTURE, f"{ARCHITECTURE}:drawn"):
        asked.clear()
        assert ovseg.from_pretrained(form).name == ARCHITECTURE
        assert asked == ["tags", "bundled_weights", "tags_of", "fetch"]


def test_what_the_weights_are_seen_with_comes_along(clip, cache, tmp_path, monkeypatch):
    """Mean and std of a tag, of a folder and of what was saved from them."""
    fill_cache(cache, "small/clip", {"open_clip_model.safetensors": save(state_of(clip))})
    tags = {
        "drawn": open_clip.pretrained._pcfg(hf_hub="small/clip/", quick_gelu=True),
        "other": open_clip.pretrained._slpcfg(hf_hub="small/clip/", quick_gelu=True),
        "usual": open_clip.pretrained._pcfg(hf_hub="small/clip/", quick_gelu=True),
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, ARCHITECTURE, tags)
    other = ovseg.create_model(ARCHITECTURE, "other")
    assert other.spec.mean == (0.5, 0.5, 0.5) and ovseg.create_model(
        ARCHITECTURE, "drawn"
    ).spec.mean == tuple(PREPROCESS["mean"])
    assert ovseg.from_pretrained(other.save_pretrained(tmp_path / "m")).spec.mean == (0.5, 0.5, 0.5)
    begun = ovseg.create_model(
        "clip_dense", architecture=ARCHITECTURE, clip="other"
    )  # the folder does not name these weights
    assert (
        begun.spec.mean
        == ovseg.from_pretrained(begun.save_pretrained(tmp_path / "n")).spec.mean
        == (0.5, 0.5, 0.5)
    )
    clip.save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    )
    assert ovseg.from_pretrained(str(tmp_path / "t")).spec.mean == (0.1, 0.2, 0.3)


def test_a_tag_decides_the_activation(monkeypatch):
    """open_clip lists OpenAI's weights under ViT-B-16 too, whose GELU is not theirs, and says so in
    a warning alone.
    """
    from ovseg.weights.clip import ClipSource, find_clip, settled

    monkeypatch.setattr("ovseg.weights.clip.fetch", lambda repo, files, **_: files[0])
    assert settled(find_clip("openai", "ViT-B-16"), "ViT-B-16") == "ViT-B-16-quickgelu"
    assert (
        settled(find_clip("laion2b_s34b_b88k", "ViT-B-16-quickgelu"), "ViT-B-16-quickgelu")
        == "ViT-B-16"
    )
    assert settled(find_clip("laion2b_s32b_b82k", "ViT-L-14"), "ViT-L-14")["preprocess_cfg"][
        "mean"
    ] == (0.5, 0.5, 0.5)
    assert settled(find_clip("openai", "ViT-L-14"), "ViT-L-14") == "ViT-L-14-quickgelu"
    repo = ClipSource(
        dict, "hf-hub:a/b", {**open_clip.get_model_config("ViT-B-16"), "quick_gelu": True}
    )
    assert settled(repo, "ViT-B-16") == "ViT-B-16-quickgelu"
    with pytest.raises(
        ValueError,
        match=r"trained with QuickGELU, and architecture 'ViT-B-16'; expected .*'ViT-B-16-quickgelu'",
    ):
        ovseg.create_model("pacl_vit_b16", architecture="ViT-B-16", clip="openai")


@pytest.mark.parametrize(
    "name,message",
    [
        (
            "ViT-B-16",
            r"15 sets of weights; expected one of .*ViT-B-16:laion2b_s34b_b88k.*, ViT-B-16:openai",
        ),
        (
            "clip_dense_vit_b16",
            r"sets of weights; expected one of .*clip_dense_vit_b16:laion2b_s34b_b88k",
        ),
        (
            "pacl_vit_b16",
            r"no weights are published; expected pacl_vit_b16:PATH.*pacl_tiny.*clip_dense_vit_b16:openai",
        ),
        ("clip_dense", "no weights are published"),
        ("ViT-B/16:openai", r"did you mean ViT-B-16:openai\?"),
        ("vit-b-16:openai", r"did you mean ViT-B-16:openai\?"),
        ("pacl_tinny", r"no known name; did you mean pacl_tiny\?"),
        ("timm/ViT-B-16-SigLIP", r"did you mean .*hf-hub:timm/ViT-B-16-SigLIP\?"),
        ("nowhere.pt", "no path that exists and no known name"),
        ("ViT-B-16:laion2b_s34b_b88", r"did you mean ViT-B-16:laion2b_s34b_b88k\?"),
        ("pacl_tiny:numbers", r"expected a path that exists or one of the tags \['digits'\]"),
        ("hf-hub:nothing", "repository is 'nothing'; expected owner/name"),
    ],
)
def test_names_that_name_nothing_or_several(name, message, cache):
    with pytest.raises(InputError, match=message):
        ovseg.from_pretrained(name)


def test_a_path_and_a_name_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ovseg.create_model("pacl_tiny").save_pretrained("pacl_tiny")
    ovseg.create_model("pacl_tiny").save_pretrained("ViT-B-16")
    with pytest.raises(
        InputError,
        match=r"a path here and a name; expected \./pacl_tiny for the path or pacl_tiny:TAG \(digits\)",
    ):
        ovseg.from_pretrained("pacl_tiny")
    with pytest.raises(InputError, match=r"\./ViT-B-16 for the path or ViT-B-16:TAG \(.*openai"):
        ovseg.from_pretrained("ViT-B-16")
    assert ovseg.from_pretrained("./pacl_tiny").name == "pacl_tiny"
    assert ovseg.from_pretrained("pacl_tiny:digits").name == "pacl_tiny"


def test_repositories_of_something_else(cache):
    fill_cache(cache, "timm/vit", {"config.json": b'{"architecture": "vit_base_patch16_clip_224"}'})
    with pytest.raises(
        CheckpointError,
        match="hf-hub:timm/vit holds no CLIP of open_clip's or transformers' and no model of ovseg",
    ):
        ovseg.from_pretrained("hf-hub:timm/vit")  # before its weights are fetched
    fill_cache(cache, "small/half", {"open_clip_config.json": open_clip_config()})
    with pytest.raises(
        WeightsError,
        match=r"small/half is not in the cache .*open_clip_model\.safetensors, beside open_clip_config\.json",
    ):
        ovseg.from_pretrained("hf-hub:small/half")
    fill_cache(
        cache, "small/odd", {"open_clip_config.json": b"{}", "open_clip_model.safetensors": b"x"}
    )
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json is damaged \('model_cfg'\)"):
        ovseg.from_pretrained("hf-hub:small/odd")


def test_weights_of_another_kind(clip, cache, tmp_path):
    save_file(state_of(clip), tmp_path / "clip.safetensors")
    for name in ("pacl_vit_b16", "clip_dense_tiny"):
        with pytest.raises(
            InputError,
            match=rf"a CLIP, and {name} is trained upon one.*clip=.*trains from that CLIP",
        ):
            ovseg.create_model(name, str(tmp_path / "clip.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"clip\.safetensors does not fit the model \(.*of another shape"
    ):
        wide = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "width": 48}}
        ovseg.create_model("clip_dense", str(tmp_path / "clip.safetensors"), architecture=wide)
    small = {name: tensor for name, tensor in state_of(clip).items() if "resblocks.1" not in name}
    save_file(small, tmp_path / "other.safetensors")
    with pytest.raises(
        InputError, match=r"fits 0 architectures of open_clip .* expected -m NAME:PATH"
    ):
        ovseg.from_pretrained(str(tmp_path / "other.safetensors"))
    save_file({"a": torch.zeros(2)}, tmp_path / "noise.safetensors")
    with pytest.raises(
        CheckpointError, match="holds no CLIP and no published checkpoint that is known"
    ):
        ovseg.from_pretrained(str(tmp_path / "noise.safetensors"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(
        CheckpointError, match=r"holds transformers' 'bert'; expected one of \['clip', 'siglip'\]"
    ):
        ovseg.from_pretrained(str(tmp_path / "bert"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        ovseg.from_pretrained(str(tmp_path / "empty"))


def test_two_activations_look_alike(clip, tmp_path, monkeypatch):
    configs = {
        **open_clip.factory._MODEL_CONFIGS,
        f"{ARCHITECTURE}-plain": {**CONFIG, "quick_gelu": False},
    }
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", configs)
    path = tmp_path / "clip.safetensors"
    save_file(state_of(clip), path)
    with pytest.raises(
        InputError,
        match=rf"fits 2 architectures .*expected -m {ARCHITECTURE}:{path} or {ARCHITECTURE}-plain:{path}",
    ):
        ovseg.from_pretrained(str(path))
    assert ovseg.from_pretrained(f"{ARCHITECTURE}-plain:{path}").name == f"{ARCHITECTURE}-plain"


class _Scripted(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.bad_input("weights", "a checkpoint that would run code, or is cut")
def test_files_that_hold_code_or_are_cut(clip, cache, tmp_path):
    torch.jit.script(_Scripted()).save(str(tmp_path / "ViT-B-16.pt"))
    with pytest.raises(
        CheckpointError, match=r"TorchScript archive.*holds code.*-m ViT-B-16:openai"
    ):
        ovseg.from_pretrained(str(tmp_path / "ViT-B-16.pt"))
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": object()}, tmp_path / "pickled.pt")
    with pytest.raises(
        CheckpointError, match=r"pickled\.pt cannot be read without running code, or is damaged"
    ):
        ovseg.from_pretrained(str(tmp_path / "pickled.pt"))
    state = state_of(clip)
    torch.save(state, tmp_path / "cut.pt")
    save_file(state, tmp_path / "cut.safetensors")
    for name, message in (
        ("cut.pt", "cut.pt cannot be read"),
        ("cut.safetensors", r"cut\.safetensors \(\d+ bytes\) is no complete"),
    ):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(CheckpointError, match=message):
            ovseg.from_pretrained(str(tmp_path / name))


@pytest.mark.bad_input("weights", "a damaged file of the cache")
def test_a_damaged_file_of_the_cache_is_refused_by_its_hash(clip, cache, tmp_path):
    data = save(state_of(clip))
    snapshot = fill_cache(cache, "small/clip", {"open_clip_model.safetensors": data})
    ovseg.from_pretrained(ARCHITECTURE)
    assert list((tmp_path / "ovseg" / "hashes").glob("*.json"))  # it is hashed once
    blob = (snapshot / "open_clip_model.safetensors").resolve()
    for broken in (data[: len(data) // 2], data[:-1] + bytes([data[-1] ^ 1])):
        blob.write_bytes(broken)
        with pytest.raises(
            CheckpointError,
            match=rf"open_clip_model\.safetensors \(.*small/clip\) is cut or damaged.*remove {blob}",
        ):
            ovseg.from_pretrained(ARCHITECTURE)
    blob.write_bytes(data)
    ovseg.from_pretrained(ARCHITECTURE)


def test_published_checkpoints_are_known_by_their_names(tmp_path, monkeypatch):
    options = {
        "architecture": {**CONFIG},
        "second_stage": 1,
        "heads": 4,
        "decoder": {"width": 32, "depth": 1, "heads": 4},
    }
    model = ovseg.create_model("segclip_vit_b16", **options)
    torch.save(ovseg.official_state_dict(model), tmp_path / "segclip.bin")
    found = ovseg.from_pretrained(str(tmp_path / "segclip.bin"), **options)
    assert found.name == "segclip_vit_b16" and torch.equal(
        found.reconstruct.weight, model.reconstruct.weight
    )


def test_lists(monkeypatch):
    bundle(monkeypatch, None)
    known = ovseg.list_pretrained()
    bundled = [
        (f"{name}_tiny", "digits")
        for name in ("clip_dense", "groupvit", "mgca", "ovsegmentor", "pacl", "segclip", "zegclip")
    ]
    assert known[: len(bundled)] == bundled
    assert {
        ("ViT-B-16", "laion2b_s34b_b88k"),
        ("ViT-B-16-quickgelu", "openai"),
        (ARCHITECTURE, "drawn"),
    } <= set(known)
    monkeypatch.setitem(sys.modules, "open_clip", None)  # as if it were not installed
    assert ovseg.list_pretrained() == bundled


def test_a_repository_is_written_with_its_card(cache, tmp_path, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, **options):
            calls["api"] = options

        def create_repo(self, repo, **options):
            calls["repo"] = repo, options

        def upload_folder(self, *, folder_path, repo_id, **options):
            from pathlib import Path

            calls["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = ovseg.create_model("pacl_tiny", "digits")
    address = model.push_to_hub("me/pacl", licence="apache-2.0", private=True, miou=12.5)
    assert address == "https://huggingface.co/me/pacl" and calls["repo"] == (
        "me/pacl",
        {"private": True, "exist_ok": True},
    )
    card = calls["files"]["README.md"].decode()
    for text in (
        "license: apache-2.0",
        "licence apache-2.0",
        "gravel",
        "-m hf-hub:me/pacl",
        "| miou | 12.5 |",
        "Weights from digits",
    ):
        assert text in card, text
    fill_cache(cache, "me/pacl", calls["files"])
    again = ovseg.from_pretrained("hf-hub:me/pacl")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    with pytest.raises(InputError, match="repository is 'pacl'; expected owner/name"):
        model.push_to_hub("pacl", licence="mit")
    wide = ovseg.create_model(ARCHITECTURE)
    wide.push_to_hub("me/clip", licence="mit", labels=["cat", "dog"])
    assert "It knows these words only: cat, dog." in calls["files"]["README.md"].decode()


def test_the_default_is_what_open_clip_publishes():
    name, tag = names.DEFAULT_MODEL.split(":")
    facts = open_clip.pretrained.get_pretrained_cfg("ViT-B-16-quickgelu", tag)
    assert (
        names.architecture_of(name) == "ViT-B-16-quickgelu"
        and facts["hf_hub"] == names.DEFAULT_REPO + "/"
    )


def test_offline_is_read_at_the_call(cache, monkeypatch):
    for variable, value, expected in (
        ("HF_HUB_OFFLINE", "0", False),
        ("HF_HUB_OFFLINE", "1", True),
        ("TRANSFORMERS_OFFLINE", "yes", True),
    ):
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv(variable, value)
        assert hub.offline() is expected
    with pytest.raises(
        WeightsError,
        match=r"the Hub may not be asked .*open_clip_model\.safetensors and -m ViT-B-16:FILE",
    ):
        ovseg.create_model("ViT-B-16", "laion2b_s34b_b88k")
