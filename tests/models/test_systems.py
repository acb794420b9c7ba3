"""What every system must do, run over all tiny presets: a new system is tested as soon as it has a
preset line.
"""

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

import ovseg
from ovseg.data.batches import MaskBatch, PairBatch
from ovseg.data.scenes import Scenes
from ovseg.errors import ConfigError
from ovseg.systems import registry
from ovseg.systems.objective import Progress, create_objective, list_objectives
from ovseg.training.recipe import list_recipes, load_recipe
from ovseg.training.trainer import train

TINY = ovseg.list_models("*_tiny")


def pixels(B=2, side=48):
    return torch.rand(B, 3, side, side, generator=torch.Generator().manual_seed(0))


def batch_for(model, B=4):
    """Of the kind that the model's objective takes."""
    ids, texts = torch.arange(B), ["a red seven", "gravel", "a blue one", "grass"] * B
    image = torch.randint(
        0, 256, (B, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    if create_objective(model).batch_types[0] is MaskBatch:
        return MaskBatch(
            image, torch.randint(0, 23, (B, 48, 48), generator=torch.Generator().manual_seed(2))
        )
    N = (48 // model.spec.patch_size) ** 2
    return PairBatch(
        image, model.tokenizer(texts[:B]), ids, ids, segments=torch.arange(N).expand(B, N) // 7
    )


@pytest.fixture(params=TINY)
def model(request):
    torch.manual_seed(0)
    return ovseg.create_model(request.param)


@torch.no_grad()
def test_forward_is_encode_image_and_hooks_fire_once(model):
    fired = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, *_: fired.append(id(module)))
    images = model.normalize(pixels())
    features = model(images)
    seen = list(fired)
    assert len(set(seen)) == len(seen)
    model.encode_text(model.tokenizer(["gravel"]))
    reached = set(fired)
    # What only training uses (decoders) is not reached; every block of the towers is, once.
    towers = {
        id(block) for block in (*model.backbone.vision_blocks, *model.backbone.text_blocks)
    } & {id(b) for b in model.blocks}
    assert towers <= reached and len(fired) == len(reached)
    again = model.encode_image(images)
    torch.testing.assert_close(features.tokens, again.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_dtypes(model, dtype):
    expected = model(model.normalize(pixels()))
    texts = model.encode_labels(["a red seven", "gravel"])
    low = copy.deepcopy(model).to(dtype)
    features = low(low.normalize(pixels()))
    found = low.encode_labels(["a red seven", "gravel"])
    assert features.tokens.dtype == features.embedding.dtype == found.dtype == dtype
    assert low.segment_logits(features, found).shape == (2, 2, *features.grid) and low.similarity(
        features, found
    ).shape == (2, 2)
    # Half precision moves directions by percents; groups may be others, the whole picture's vector
    # is not.
    cosine = torch.nn.functional.cosine_similarity(features.embedding.float(), expected.embedding)
    assert float(cosine.min()) > 0.99
    torch.testing.assert_close(found.float(), texts, rtol=0, atol=0.05)


@torch.no_grad()
def test_compiled(model):
    torch.compiler.reset()  # what other tests compiled counts against the limit of one function
    images = model.normalize(pixels())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).tokens, model(images).tokens, rtol=1e-4, atol=1e-4)
    assert compiled.spec == model.spec and compiled.decision == model.decision


def test_pickled(model):
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        images = model.normalize(pixels())
        torch.testing.assert_close(again(images).tokens, model(images).tokens)
    assert torch.equal(again.tokenizer(["gravel"]), model.tokenizer(["gravel"]))


def test_parts_say_what_is_trained(model):
    parts = model.parts()
    members = [id(p) for part in parts.values() for p in part]
    assert len(set(members)) == len(members)
    own = {id(p) for p in model.parameters()}
    assert set(members) <= own
    for name in parts:
        model.train_parts([name])
        assert {id(p) for _, p in model.trainable} == {id(p) for p in parts[name]}
    with pytest.raises(ConfigError, match="trained names 'nothing'; expected some of"):
        model.train_parts(["nothing"])


def test_objective_trains_what_it_says_and_nothing_else(model):
    objective = create_objective(model.train())
    losses = objective(batch_for(model))
    assert "total" in losses and all(loss.ndim == 0 for loss in losses.values())
    losses["total"].backward()
    assert all(p.grad is not None for _, p in model.trainable)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    groups = model.parameter_groups(1e-3, 0.1)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(
        id(p) for _, p in model.trainable
    )
    assert all({"params", "lr_scale", "weight_decay"} == set(g) for g in groups)


def test_a_step_done_again_is_the_same_and_others_differ(model):
    objective, batch = create_objective(model.train()), batch_for(model)
    first, again = (objective(batch, Progress(3, 10, seed=1))["total"] for _ in range(2))
    assert torch.equal(first, again)
    rngs = {
        tuple(Progress(**at).rng("cpu", use).tolist())
        for at in ({"step": 3}, {"step": 4}, {"seed": 1}, {"rank": 1}, {"chunk": 1})
        for use in ("groups", "masking")
    }
    assert len(rngs) == 10


def test_uint8_and_normalised_pictures_give_one_loss(model):
    objective, batch = create_objective(model), batch_for(model)
    ready = copy.copy(batch)
    ready.images = model.normalize(batch.images)
    torch.testing.assert_close(objective(batch)["total"], objective(ready)["total"])


def test_preprocess(model):
    from PIL import Image

    picture = Image.linear_gradient("L").convert("RGB").resize((90, 60))
    ready = model.preprocess(picture)
    assert ready.shape == (3, model.spec.image_size, model.spec.image_size)
    mean, std = (torch.tensor(x)[:, None, None] for x in (model.spec.mean, model.spec.std))
    back = ready * std + mean
    assert float(back.min()) >= 0 and float(back.max()) <= 1.001 and float(back.std()) > 0.05


THROW_AWAY = {
    "__init__.py": """
        from .model import Shifted as System
        from .objective import Contrast as Objective
    """,
    "model.py": """
        from dataclasses import dataclass, field
        from ovseg.systems.base import OVSegModel, PatchFeatures, SystemOptions

        @dataclass
        class Options(SystemOptions):
            trained: list[str] = field(default_factory=lambda: ["all"])
            shift: float = 0.5

        class Shifted(OVSegModel):
            # A CLIP that adds a number to every token.
            Options = Options
            objective = "throw_away"

            def __init__(self, options):
                super().__init__(options)
                self.train_parts(options.trained)

            def parts(self):
                return {"all": list(self.backbone.parameters())}

            def encode_image(self, images):
                tokens = self.backbone.project(self.backbone.encode_patches(images).tokens) + self.options.shift
                side = images.shape[2] // self.spec.patch_size
                return PatchFeatures(tokens.mean(1), tokens, (side, tokens.shape[1] // side))
    """,
    "objective.py": """
        from ovseg.systems.contrast import image_text_contrast
        from ovseg.systems.objective import Objective

        class Contrast(Objective):
            # The mean token of a picture against texts.
            def encode(self, batch, progress):
                return {"image": self.model(self.images(batch)).embedding, "text": self.model.encode_text(batch.token_ids)}

            def loss(self, rows, batch, progress, group):
                return {"total": image_text_contrast(rows["image"], rows["text"], self.model.logit_scale, batch, group)}
    """,
    "preset.yaml": """
        throw_away_tiny: {backbone: {kind: tiny, width: 32}, templates: scenes}
    """,
    "recipes/throw_away_scenes.yaml": """
        model: {name: throw_away_tiny, options: {shift: 0.125}}
        data: {kind: scenes, style: digits, train_size: 16, captions: 2}
        train: {steps: 1, batch_size: 8, device: cpu}
    """,
}


@pytest.fixture
def throw_away(tmp_path, monkeypatch):
    """A system that is a folder and nothing else."""
    import ovseg.systems

    for name, text in THROW_AWAY.items():
        path = tmp_path / "systems" / "throw_away" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.setattr(
        ovseg.systems, "__path__", [*ovseg.systems.__path__, str(tmp_path / "systems")]
    )
    registry.presets.cache_clear()
    yield "throw_away_tiny"
    registry.presets.cache_clear()
    for name in [name for name in sys.modules if name.startswith("ovseg.systems.throw_away")]:
        del sys.modules[name]


def test_a_system_is_its_folder(throw_away, tmp_path):
    model = ovseg.create_model(throw_away, shift=0.25)
    assert (
        model.name in ovseg.list_models()
        and model.system == "throw_away"
        and model.options.shift == 0.25
    )
    assert "throw_away" in list_objectives() and "throw_away_scenes" in list_recipes()
    result = ovseg.segment(
        torch.randint(0, 255, (3, 60, 70), dtype=torch.uint8),
        ["a red seven", "gravel"],
        model=model,
    )
    assert result.labels.shape == (60, 70)
    create_objective(model)(batch_for(model))["total"].backward()
    again = ovseg.from_pretrained(ovseg.save_pretrained(model, tmp_path / "saved"))
    assert again.options.shift == 0.25 and torch.equal(
        again.backbone.words.weight, model.backbone.words.weight
    )
    with pytest.raises(
        ConfigError, match="options of throw_away_tiny: shfit: unknown key, did you mean"
    ):
        ovseg.create_model(throw_away, shfit=1.0)
    trained = train(load_recipe("throw_away_scenes"), tmp_path / "run", quiet=True)
    assert trained.options.shift == 0.125
    loaded = ovseg.from_pretrained(tmp_path / "run")
    assert all(
        torch.equal(x, loaded.state_dict()[name]) for name, x in trained.state_dict().items()
    )


@pytest.mark.parametrize("name", ["groupvit_tiny", "ovsegmentor_tiny"])
def test_tiny_groups_begin_apart(name):
    """In training Gumbel noise, of 1.3, is added to the logits of the assignment; where they are
    small beside it groups learn nothing.
    """
    torch.manual_seed(0)
    scenes, model = Scenes("digits", "val", 4), ovseg.create_model(name).eval()
    with torch.no_grad():
        stages = model.image(
            model.normalize(
                torch.stack([torch.from_numpy(scenes[i].image).permute(2, 0, 1) for i in range(4)])
            )
        ).stages
    for stage in stages:
        logits = stage.soft.log()
        assert (
            float((logits - logits.mean(1, keepdim=True)).std()) > 0.4
        )  # 0.02 with linear layers of 0.02, as published


def test_options_are_typed():
    for options, message in [
        ({"hidden_dim": "wide"}, r"options of pacl_tiny\.hidden_dim: Value 'wide'"),
        ({"backbone": {"width": "wide"}}, r"backbone\.width: Value 'wide'"),
        ({"backbone": {"kind": "resnet"}}, "backbone.kind is 'resnet'; expected one of"),
        (
            {"temprature": 1.0},
            "temprature: unknown key, did you mean options of pacl_tiny: temperature",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            ovseg.create_model("pacl_tiny", **options)


# name, options of an earlier version, the parts that they trained, the words of the error
EARLIER = [
    (
        "pacl_tiny",
        {"train_clip": "all", "learn_logit_scale": False, "tap": "local"},
        ["embedder", "vision", "text"],
        "it is trained now",
    ),
    ("pacl_tiny", {"train_clip": "vision"}, ["embedder", "scale", "vision"], "it is trained now"),
    (
        "segclip_tiny",
        {"frozen": False, "weights": {"superpixel": 0.5}, "tau": 0.8},
        None,
        "it is trained now",
    ),
    (
        "segclip_tiny",
        {"weights": {"superpixel": 0.0}},
        "published",
        r"it is objective\.options\.weights now",
    ),
    ("segclip_tiny", {"tau": 0.8}, "published", r"it is objective\.options\.tau now"),
    ("segclip_tiny", {"kept": 0.5}, "published", r"it is objective\.options\.kept now"),
]


@pytest.mark.parametrize("name,options,parts,message", EARLIER)
def test_options_of_earlier_versions_in_saved_folders(tmp_path, name, options, parts, message):
    """Folders that were saved before parts had names, and before the losses had an objective."""
    model = ovseg.create_model(name)
    folder = ovseg.save_pretrained(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format": 1, "options": options}))
    expected = (
        list(model.parts())
        if parts is None
        else type(model.options)().trained
        if parts == "published"
        else parts
    )
    assert ovseg.from_pretrained(folder).options.trained == expected


@pytest.mark.parametrize(
    "name,options,parts,message",
    [
        pytest.param(*row, marks=pytest.mark.bad_input("models", "an option of an earlier version"))
        for row in EARLIER
    ],
)
def test_options_of_earlier_versions_elsewhere(tmp_path, name, options, parts, message):
    """A call and a recipe mean what they say today: what would be dropped is refused, with the
    place it has now.
    """
    key = next(iter(options))
    with pytest.raises(ConfigError, match=rf"options of {name}: {key}: unknown key; {message}"):
        ovseg.create_model(name, **options)
    with pytest.raises(ConfigError, match=rf"{key}: unknown key; {message}"):
        ovseg.from_pretrained(name, **options)
    text = json.dumps(
        {
            "model": {"name": name, "options": options},
            "train": {"steps": 1},
            "data": {"kind": "scenes", "train_size": 64},
        }
    )
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"{key}: unknown key; {message}"):
        train(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    "name,options,message",
    [
        pytest.param(*row, marks=pytest.mark.bad_input("models", "an option that means nothing"))
        for row in (
            (
                "pacl_tiny",
                {"logit_scale": -1.0},
                r"logit_scale is -1\.0; expected a positive finite number",
            ),
            (
                "pacl_tiny",
                {"temperature": 0.0},
                r"temperature is 0\.0; expected a positive finite number",
            ),
            (
                "pacl_tiny",
                {"temperature": float("inf")},
                r"options of pacl_tiny\.temperature is inf; expected finite numbers",
            ),
            (
                "pacl_tiny",
                {"backbone": {"width": float("nan")}},
                r"backbone\.width is nan; expected finite numbers",
            ),
            ("segclip_tiny", {"centers": 0}, "centers is 0; expected 1 or more"),
            ("segclip_tiny", {"cross_layers": -1}, "cross_layers is -1; expected 0 or more"),
            ("segclip_tiny", {"heads": 0}, "heads is 0; expected 1 or more"),
            ("segclip_tiny", {"decoder": {"width": 0}}, r"decoder\.width is 0; expected 1 or more"),
            ("pacl_tiny", {"hidden_dim": -3}, "hidden_dim is -3; expected 1 or more"),
            *(
                (
                    "clip_dense_tiny",
                    {"backbone": {name: -1}},
                    rf"backbone\.{name} is -1; expected \d or more",
                )
                for name in (
                    "width",
                    "embed_dim",
                    "heads",
                    "image_size",
                    "context_length",
                    "local_depth",
                    "depth",
                    "text_depth",
                )
            ),
            *(
                (
                    "groupvit_tiny",
                    {"backbone": {name: -1}},
                    rf"backbone\.{name} is -1; expected \d or more",
                )
                for name in (
                    "width",
                    "heads",
                    "hidden",
                    "image_size",
                    "patch_size",
                    "embed_dim",
                    "projector",
                    "local_depth",
                )
            ),
            (
                "groupvit_tiny",
                {"backbone": {"groups": [8, 0]}},
                r"backbone\.groups\.1 is 0; expected 1 or more",
            ),
            ("groupvit_tiny", {"backbone": {"std": [0.2, 0.0, 0.2]}}, r"backbone\.std\.1 is 0"),
            *(
                ("zegclip_tiny", {name: -1}, rf"{name} is -1.*; expected \d or more")
                for name in ("image_size", "heads", "hidden", "class_weight", "seen_classes")
            ),
            ("ovsegmentor_tiny", {"entity_heads": 0}, "entity_heads is 0; expected 1 or more"),
        )
    ],
)
def test_options_that_mean_nothing(name, options, message):
    with pytest.raises(ConfigError, match=message):
        ovseg.create_model(name, **options)


@pytest.mark.bad_input("training", "an objective's option that means nothing")
@pytest.mark.parametrize(
    "name,options,message",
    [
        ("zegclip_tiny", {"focal": -1.0}, r"objective zegclip\.focal is -1\.0; expected 0 or more"),
        ("zegclip_tiny", {"dice": -1.0}, "dice is"),
        ("zegclip_tiny", {"alpha": 2.0}, r"alpha is 2\.0; expected 0 to 1"),
        ("zegclip_tiny", {"gamma": -1.0}, "gamma is"),
        ("groupvit_tiny", {"multi_label": -1.0}, r"multi_label is -1\.0; expected 0 or more"),
        ("ovsegmentor_tiny", {"momentum": 2.0}, r"momentum is 2\.0; expected 0 to 1"),
        (
            "ovsegmentor_tiny",
            {"weights": {"contrastive": -1.0}},
            r"weights\.contrastive is -1\.0; expected 0 or more",
        ),
        ("ovsegmentor_tiny", {"mask_ratio": 2.0}, "mask_ratio is"),
        ("ovsegmentor_tiny", {"spared": -1.0}, "spared is"),
        ("ovsegmentor_tiny", {"mask_scale": 0}, "mask_scale is"),
        ("ovsegmentor_tiny", {"mask_batch": 0}, "mask_batch is"),
        *(
            ("segclip_tiny", *row)
            for row in (
                (
                    {"weights": {"superpixel": -1.0}},
                    r"weights\.superpixel is -1\.0; expected 0 or more",
                ),
                (
                    {"weights": {"superpixel": float("nan")}},
                    r"weights\.superpixel is nan; expected finite numbers",
                ),
                ({"weights": {"contrast": 1.0}}, "weights names"),
                ({"tau": 0.0}, r"tau is 0\.0; expected a positive"),
                ({"tau": float("inf")}, "tau is inf"),
                ({"kept": 2.0}, r"kept is 2\.0; expected a share"),
                ({"weight": {}}, "weight: unknown key, did you mean objective segclip.weights"),
            )
        ),
    ],
)
def test_objectives_options_that_mean_nothing(name, options, message):
    with pytest.raises(ConfigError, match=message):
        create_objective(ovseg.create_model(name), **options)


def test_without_its_libraries_the_package_says_what_to_install():
    code = """
        import sys
        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "PIL":
                    raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
        sys.meta_path.insert(0, Missing())
        import ovseg_kernels
        try:
            from ovseg import Predictor
        except ModuleNotFoundError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert (
        "ovseg needs PIL, which is not installed: pip install 'ovseg-kernels[models]'"
        in done.stdout
    )
