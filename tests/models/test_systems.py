"""What every system must do, run over all tiny presets: a new system is tested as soon as it has a preset line."""

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

import ovseg
from ovseg.data.batch_types import MaskBatch, PairBatch
from ovseg.errors import ConfigError
from ovseg.models import registry
from ovseg.objectives import Progress, create_objective

TINY = ovseg.list_models("*_tiny")


def pixels(B=2, side=48):
    return torch.rand(B, 3, side, side, generator=torch.Generator().manual_seed(0))


def batch_for(model, B=4):
    """Of the kind that the model's objective takes."""
    ids, texts = torch.arange(B), ["a red seven", "gravel", "a blue one", "grass"] * B
    image = torch.randint(0, 256, (B, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    if create_objective(model).batch_type is MaskBatch:
        return MaskBatch(image, torch.randint(0, 23, (B, 48, 48), generator=torch.Generator().manual_seed(2)))
    N = (48 // model.spec.patch_size) ** 2
    return PairBatch(image, model.tokenizer(texts[:B]), ids, ids, segments=torch.arange(N).expand(B, N) // 7)


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
    towers = {id(block) for block in (*model.backbone.vision_blocks, *model.backbone.text_blocks)} & {id(b) for b in model.blocks}
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
    assert low.segment_logits(features, found).shape == (2, 2, *features.grid) and low.similarity(features, found).shape == (2, 2)
    # Half precision moves directions by percents; groups may be others, the whole picture's vector is not.
    cosine = torch.nn.functional.cosine_similarity(features.embedding.float(), expected.embedding)
    assert float(cosine.min()) > 0.99
    torch.testing.assert_close(found.float(), texts, rtol=0, atol=0.05)


@torch.no_grad()
def test_compiled(model):
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
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for _, p in model.trainable)
    assert all({"params", "lr_scale", "weight_decay"} == set(g) for g in groups)


def test_a_step_done_again_is_the_same_and_others_differ(model):
    objective, batch = create_objective(model.train()), batch_for(model)
    first, again = (objective(batch, Progress(3, 10, seed=1))["total"] for _ in range(2))
    assert torch.equal(first, again)
    rngs = {tuple(Progress(**at).rng("cpu", use).tolist()) for at in ({"step": 3}, {"step": 4}, {"seed": 1}, {"rank": 1}, {"chunk": 1})
            for use in ("groups", "masking")}
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


THROW_AWAY = '''
    from dataclasses import dataclass, field
    from torch import nn
    from ovseg.models.base import OVSegModel, PatchFeatures, SystemOptions

    @dataclass
    class Options(SystemOptions):
        trained: list[str] = field(default_factory=lambda: ["all"])
        shift: float = 0.5

    class System(OVSegModel):
        """Adds a number to every token."""
        Options = Options
        objective = "clip_dense"

        def __init__(self, options):
            super().__init__(options)
            self.train_parts(options.trained)

        def parts(self):
            return {"all": list(self.backbone.parameters())}

        def encode_image(self, images):
            patches, project = self.backbone.encode_patches(images), self.backbone.project
            return PatchFeatures(project(patches.cls), project(patches.tokens) + self.options.shift, patches.grid)
'''


def test_a_system_is_its_folder_and_one_preset_line(tmp_path, monkeypatch):
    import ovseg.models

    (tmp_path / "throw_away").mkdir()
    (tmp_path / "throw_away" / "__init__.py").write_text(textwrap.dedent(THROW_AWAY))
    monkeypatch.setattr(ovseg.models, "__path__", [*ovseg.models.__path__, str(tmp_path)])
    line = {"throw_away_tiny": {"system": "throw_away", "backbone": {"kind": "tiny"}, "templates": "scenes"}}
    known = registry.presets()
    monkeypatch.setattr(registry, "presets", lambda: {**known, **line})
    try:
        model = ovseg.create_model("throw_away_tiny", shift=0.25)
        assert model.name in ovseg.list_models() and model.options.shift == 0.25
        result = ovseg.segment(torch.randint(0, 255, (3, 60, 70), dtype=torch.uint8), ["a red seven", "gravel"], model=model)
        assert result.labels.shape == (60, 70)
        create_objective(model)(batch_for(model))["total"].backward()
        folder = ovseg.save_pretrained(model, tmp_path / "saved")
        assert ovseg.from_pretrained(folder).options.shift == 0.25
        with pytest.raises(ConfigError, match="options of throw_away_tiny: shfit: unknown key, did you mean"):
            ovseg.create_model("throw_away_tiny", shfit=1.0)
    finally:
        sys.modules.pop("ovseg.models.throw_away", None)


def test_options_are_typed():
    for options, message in [({"hidden_dim": "wide"}, r"options of pacl_tiny\.hidden_dim: Value 'wide'"),
                             ({"backbone": {"width": "wide"}}, r"backbone\.width: Value 'wide'"),
                             ({"backbone": {"kind": "resnet"}}, "backbone.kind is 'resnet'; expected one of"),
                             ({"temprature": 1.0}, "temprature: unknown key, did you mean options of pacl_tiny: temperature")]:
        with pytest.raises(ValueError, match=message):
            ovseg.create_model("pacl_tiny", **options)


def test_options_of_earlier_versions():
    """Folders that were saved before parts had names."""
    old = ovseg.create_model("pacl_tiny", train_clip="all", learn_logit_scale=False, tap="local")
    assert old.options.trained == ["embedder", "vision", "text"]
    old = ovseg.create_model("segclip_tiny", frozen=False, weights={"superpixel": 0.5}, tau=0.8)
    assert old.options.trained == list(old.parts())


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
            import ovseg
        except ModuleNotFoundError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "ovseg needs PIL, which is not installed: pip install 'ovseg-kernels[models]'" in done.stdout
