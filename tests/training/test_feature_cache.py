"""``train.cache``: training on what a frozen tower gave is training on pictures, to 16 bits; keys,
kills, full disks, and what is refused.
"""

import contextlib
import copy
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ovseg
from ovseg.data import feature_store
from ovseg.data.batches import EntityBatch, PairBatch, StoredFeatures
from ovseg.data.cached_source import CachedSource
from ovseg.data.feature_store import FeatureStore, Form, in_words
from ovseg.data.sampling import generator
from ovseg.data.sources import ModelInputs, create_source, load_options
from ovseg.data.transforms import PairAugment
from ovseg.errors import ConfigError, DataError, InputError
from ovseg.output_lock import locked_folder
from ovseg.systems.objective import create_objective
from ovseg.training import feature_cache, state
from ovseg.training.feature_cache import Tower
from ovseg.training.hooks import Hook
from ovseg.training.recipe import build_recipe, load_recipe, to_dict
from ovseg.training.trainer import Interrupted, train

SMALL = [
    "data.style=shapes",
    "data.train_size=40",
    "data.captions=2",
    "train.batch_size=8",
    "train.steps=5",
    "schedule.warmup_steps=0",
    "checkpoint.every_steps=4",
    "log.every_steps=1",
    "model.options={backbone: {width: 16, embed_dim: 16, local_depth: 1}, trained: [embedder, scale]}",
    "train.device=cpu",
]
MGCA = [
    "model.options={backbone: {width: 16, embed_dim: 16, local_depth: 1}, hidden: 8, trained: [decoder, scale]}",
    "objective.options={weights: {region: 0, pixel: 0}}",
]
STILL = "data.augment={scale: [1, 1], ratio: [1, 1]}"


def recipe(*overrides, name="pacl_scenes"):
    return load_recipe(name, [*SMALL, *overrides])


def folder_recipe(root, *overrides):
    values = to_dict(recipe("data.captions=1"))
    still = {"scale": [1, 1], "ratio": [1, 1]}
    values["data"] = {"kind": "folder", "root": str(root), "workers": 0, "augment": still}
    values["train"]["steps"] = 10
    again = build_recipe(values)
    for override in overrides:
        key, value = override.split("=")
        setattr(again.train, key.removeprefix("train."), type(value)(value))
    return again


def curve(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def subfolders(cache):
    return sorted(path.name for path in Path(cache).iterdir() if path.is_dir())


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Nobody looks at them here, and they take most of the time."""
    monkeypatch.setattr("ovseg.training.trainer.plot_loss", lambda *args, **options: None)


@pytest.fixture
def pictures(tmp_path):
    """Twenty pictures of two sides, and their captions."""
    root = tmp_path / "pictures"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        pixels = rng.integers(0, 255, (50, 50 + i % 3, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i:03}.png")
        (root / f"{i:03}.txt").write_text(f"a red {i}\ngravel and {i} grass\n")
    return root


@pytest.fixture
def encoded(monkeypatch):
    """Numbers of pictures that towers encode, call by call."""
    calls = []
    encode = Tower.encode
    monkeypatch.setattr(
        Tower, "encode", lambda self, images: calls.append(len(images)) or encode(self, images)
    )
    return calls


@pytest.mark.parametrize("name,more", [("pacl_scenes", []), ("mgca_scenes", MGCA)])
def test_the_curve_is_that_of_pictures(tmp_path, encoded, name, more):
    more = [*more, "train.steps=10"]
    train(recipe(*more, name=name), tmp_path / "plain", quiet=True)
    cached = [*more, f"train.cache={tmp_path / 'cache'}"]
    train(recipe(*cached, name=name), tmp_path / "first", quiet=True)
    assert sum(encoded) == 40 + 1 and curve(tmp_path / "first") != curve(tmp_path / "plain")
    train(recipe(*cached, "data.workers=1", name=name), tmp_path / "again", quiet=True)
    train(recipe(*cached, "train.chunk=3", name=name), tmp_path / "chunk", quiet=True)
    assert sum(encoded) == 40 + 3, "one picture tells the form; the rest is read"
    expected = curve(tmp_path / "plain")
    assert len(set(expected)) == 10
    assert curve(tmp_path / "first") == pytest.approx(expected, rel=5e-5)
    assert curve(tmp_path / "again") == curve(tmp_path / "first")
    assert curve(tmp_path / "chunk") == pytest.approx(curve(tmp_path / "first"), rel=1e-5)
    assert len(subfolders(tmp_path / "cache")) == 1


def test_all_levels_of_mgca_train_on_features(tmp_path):
    """Groups and hard pixels are choices: where two are alike, 16 bits may choose the other."""
    more = MGCA[:1]
    train(recipe(*more, name="mgca_scenes"), tmp_path / "plain", quiet=True)
    cached = recipe(*more, f"train.cache={tmp_path / 'cache'}", name="mgca_scenes")
    train(cached, tmp_path / "cached", quiet=True)
    assert curve(tmp_path / "cached") == pytest.approx(curve(tmp_path / "plain"), rel=2e-2)


def test_steps_see_features_and_no_pixels(tmp_path):
    seen = []

    class Look(Hook):
        def before_steps(self, trainer):
            gradients = trainer.gradients

            def look(batch, *rest):
                seen.append((batch.images.shape, batch.features.tokens.dtype, len(batch)))
                return gradients(batch, *rest)

            trainer.gradients = look

    train(recipe(f"train.cache={tmp_path / 'c'}"), tmp_path / "run", quiet=True, hooks=[Look()])
    assert set(seen) == {((8, 3, 0, 0), torch.float16, 8)} and len(seen) == 5


def test_going_on_is_bit_for_bit(tmp_path):
    cached = recipe(f"train.cache={tmp_path / 'cache'}", "train.ema=0.9")
    whole = weights(train(cached, tmp_path / "a", quiet=True))
    train(cached, tmp_path / "b", quiet=True)
    for path in state.complete(tmp_path / "b" / "checkpoints")[1:]:
        (path / "COMPLETE").unlink()
    shutil.rmtree(tmp_path / "cache")  # made anew of the weights in the checkpoint
    resumed = train(cached, tmp_path / "b", resume=True, quiet=True)
    assert torch.equal(whole, weights(resumed)) and curve(tmp_path / "a") == curve(tmp_path / "b")


def test_a_folder_of_pictures_one_of_them_damaged(tmp_path, pictures, caplog):
    train(folder_recipe(pictures), tmp_path / "plain", quiet=True)
    cached = folder_recipe(pictures, f"train.cache={tmp_path / 'cache'}")
    train(cached, tmp_path / "cached", quiet=True)
    assert curve(tmp_path / "cached") == pytest.approx(curve(tmp_path / "plain"), rel=5e-5)
    (pictures / "007.png").write_bytes(b"no picture")
    train(folder_recipe(pictures), tmp_path / "plain 2", quiet=True)
    told = caplog.text.count("skipped: ")
    train(cached, tmp_path / "cached 2", quiet=True)
    assert told > 0 and caplog.text.count("skipped: ") == 2 * told, "replaced and named alike"
    assert curve(tmp_path / "cached 2") == pytest.approx(curve(tmp_path / "plain 2"), rel=5e-5)
    assert len(subfolders(tmp_path / "cache")) == 2, "one file changed: another key"


def key_of(model, source, precision="fp32"):
    return feature_cache._key(source, Tower(model, contextlib.nullcontext, precision), show=False)


def small(name="pacl_tiny", **options):
    torch.manual_seed(0)
    backbone = {"width": 16, "embed_dim": 16, "local_depth": 1}
    return ovseg.create_model(name, backbone=backbone, **options).train()


def test_the_key_is_of_weights_options_view_and_pictures(pictures):
    def source(**options):
        given = {"augment": {"scale": [1, 1], "ratio": [1, 1]}, "root": str(pictures)}
        return create_source(
            load_options({"kind": "folder", **given, **options}), ModelInputs.of(model)
        )

    model = small()
    plain = key_of(model, source())
    for _ in range(2):
        assert key_of(model, source()) == plain
    with torch.no_grad():
        for part in (model.embedder, model.backbone.text_projection):
            next(part.parameters()).add_(1.0)
        model.log_scale.add_(1.0)
    assert key_of(model, source(captions=2)) == plain, "what is trained, and texts, do not count"
    found = {"plain": plain, "precision": key_of(model, source(), "bf16")}
    found["tap"] = key_of(small(tap="post_norm"), source())
    found["system"] = key_of(small("mgca_tiny"), source())
    found["readout"] = key_of(small("mgca_tiny", readout="sclip"), source())
    found["size"] = key_of(model, source(image_size=64))
    bilinear = {"scale": [1, 1], "ratio": [1, 1], "interpolation": "bilinear"}
    found["interpolation"] = key_of(model, source(augment=bilinear))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.backbone.local[0].parameters().__next__().view(-1)[0] += 1e-6
    found["weight"] = key_of(other, source())
    other = copy.deepcopy(model)
    other.backbone.image_mean = (0.4, 0.5, 0.5)
    found["mean"] = key_of(other, source())
    os.utime(pictures / "011.png", ns=(1, 1))
    found["time"] = key_of(model, source())
    shutil.copy(pictures / "010.png", pictures / "011.png")
    found["content"] = key_of(model, source())
    (pictures / "011.txt").unlink()
    found["fewer"] = key_of(model, source())
    assert len({json.dumps(key) for key in found.values()}) == len(found)


def test_the_identity_of_other_kinds():
    model = small()

    def identity(**options):
        source = create_source(load_options(options), ModelInputs.of(model))
        return source.identity()

    scenes = {"kind": "scenes", "train_size": 4, "style": "shapes"}
    entities = {**scenes, "kind": "entity_scenes"}
    masks = {"kind": "masks", "set": "shapes", "train_size": 3}
    assert identity(**scenes) == identity(**entities) == identity(**scenes, captions=3)
    assert identity(**masks) == identity(**masks)
    assert len({identity(**x) for x in (scenes, {**scenes, "train_size": 5}, masks)}) == 3


class Killed(BaseException):
    pass


def kill_after(monkeypatch, writes, error):
    """Let the n-th row be written in half, then raise."""
    real = feature_store._write_at
    count = iter(range(10**6))

    def write(file, data, at):
        if len(data) > 1 and next(count) == writes:
            real(file, data[: len(data) // 2], at)
            raise error
        real(file, data, at)

    monkeypatch.setattr(feature_store, "_write_at", write)


def test_a_kill_in_the_middle_goes_on(tmp_path, monkeypatch, encoded):
    cached = recipe(f"train.cache={tmp_path / 'cache'}")
    with monkeypatch.context() as patched:
        kill_after(patched, 20, Killed())
        with pytest.raises(Killed):
            train(cached, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    del encoded[:]
    train(cached, tmp_path / "run", quiet=True)
    assert sum(encoded) == 1 + 40 - 16, "two batches of eight were whole; half a row is none"
    train(recipe(f"train.cache={tmp_path / 'other'}"), tmp_path / "whole", quiet=True)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    files = [
        (tmp_path / name / subfolders(tmp_path / name)[0] / "features.bin").read_bytes()
        for name in ("cache", "other")
    ]
    assert files[0] == files[1]


def test_a_signal_while_pictures_are_encoded(tmp_path, monkeypatch):
    asked = iter([False, False, True])
    monkeypatch.setattr("ovseg.training.trainer._asked", lambda request: next(asked))
    with pytest.raises(Interrupted, match="while pictures were encoded; what is encoded stays"):
        train(recipe(f"train.cache={tmp_path / 'cache'}"), tmp_path / "run", quiet=True)
    folder = tmp_path / "cache" / subfolders(tmp_path / "cache")[0]
    assert (folder / "done.bin").read_bytes() == b"\1" * 24 + b"\0" * 16
    assert not (tmp_path / "run").exists() and not (folder / ".ovseg.lock").exists()


@pytest.mark.bad_input("training", "a disk that fills while features are written")
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    cached = recipe(f"train.cache={tmp_path / 'cache'}")
    with monkeypatch.context() as patched:
        kill_after(patched, 9, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(DataError, match=r"No space left.*; 8 of 40 pictures are in the cache"):
            train(cached, tmp_path / "run", quiet=True)
    folder = tmp_path / "cache" / subfolders(tmp_path / "cache")[0]
    assert (folder / "done.bin").read_bytes() == b"\1" * 8 + b"\0" * 32
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        words = "needs .* more for the features of 40 pictures and 1.0 kB are free on its disk"
        with pytest.raises(DataError, match=words):
            train(cached, tmp_path / "run", quiet=True)
        with pytest.raises(DataError, match=words):
            train(recipe(f"train.cache={tmp_path / 'new'}"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "new").exists(), "nothing is begun"
    train(cached, tmp_path / "run", quiet=True)


@pytest.mark.bad_input("training", "train.cache_limit below what features take")
def test_the_folder_is_bounded(tmp_path):
    cache = tmp_path / "cache"
    size = Form(40, (12, 12), 16, 16).size
    one = [f"train.cache={cache}", f"train.cache_limit={size}"]
    with pytest.raises(DataError, match=f"train.cache_limit is {size - 1} bytes; expected a limit"):
        train(recipe(one[0], f"train.cache_limit={size - 1}"), tmp_path / "run", quiet=True)
    assert not cache.exists()
    train(recipe(*one), tmp_path / "run", quiet=True)
    with pytest.raises(DataError, match=r"beside .* of other keys there, and train.cache_limit"):
        train(recipe(*one, "train.seed=1"), tmp_path / "other", quiet=True)
    assert len(subfolders(cache)) == 1, "what does not fit leaves nothing"


def test_other_weights_and_damaged_files_are_not_believed(tmp_path, encoded, caplog):
    cache = tmp_path / "cache"
    cached = recipe(f"train.cache={cache}")
    train(cached, tmp_path / "a", quiet=True)
    (first,) = subfolders(cache)
    data = (cache / first / "features.bin").read_bytes()
    (cache / first / "features.bin").write_bytes(data[:-2])
    del encoded[:]
    train(cached, tmp_path / "b", quiet=True)
    assert sum(encoded) == 41 and "is damaged and is made anew" in caplog.text
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    # The folder of another key under this name, as a copy would be.
    index = json.loads((cache / first / "index.json").read_text())
    index["facts"]["tower"] = "0" * 32
    (cache / first / "index.json").write_text(json.dumps(index))
    del encoded[:]
    train(cached, tmp_path / "c", quiet=True)
    assert sum(encoded) == 41 and curve(tmp_path / "a") == curve(tmp_path / "c")
    other = ovseg.from_pretrained(tmp_path / "c" / "model")
    next(other.backbone.local.parameters()).data.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    train(
        recipe(f"train.cache={cache}", f"init.backbone={tmp_path / 'other'}"),
        tmp_path / "d",
        quiet=True,
    )
    assert len(subfolders(cache)) == 2


@pytest.mark.bad_input("training", "two runs that write into one train.cache")
def test_two_runs_at_once(tmp_path):
    cached = recipe(f"train.cache={tmp_path / 'cache'}")
    train(cached, tmp_path / "a", quiet=True)
    folder = tmp_path / "cache" / subfolders(tmp_path / "cache")[0]
    with locked_folder(folder, "train.cache", "train"):
        train(cached, tmp_path / "b", quiet=True)  # what is whole is only read
        (folder / "done.bin").write_bytes(b"\1" * 39 + b"\0")
        with pytest.raises(InputError, match=r"train.cache .* is being written by `ovseg train`"):
            train(cached, tmp_path / "c", quiet=True)
    train(cached, tmp_path / "c", quiet=True)
    assert curve(tmp_path / "c") == curve(tmp_path / "a")


REFUSED = [
    (
        ["model.options.trained=[embedder, vision]"],
        ConfigError,
        "image tower of pacl_tiny does not stay",
    ),
    (["objective.name=segclip"], ConfigError, "looks at pictures themselves"),
    (["train.cache={file}"], InputError, "train.cache .* is a file; expected a folder"),
    (["train.cache_limit=0"], ConfigError, "train.cache_limit is 0; expected a positive"),
]


@pytest.mark.bad_input("training", "train.cache where the tower does not stay as it is")
@pytest.mark.parametrize("overrides,kind,message", REFUSED)
def test_what_is_refused(tmp_path, overrides, kind, message):
    (tmp_path / "file").write_text("")
    given = [o.format(file=tmp_path / "file") for o in overrides]
    with pytest.raises(kind, match=message):
        train(recipe(f"train.cache={tmp_path / 'c'}", *given), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists() and not (tmp_path / "c").exists()


@pytest.mark.bad_input("training", "train.cache with data.augment")
def test_augmentation_is_refused_by_its_key(tmp_path, pictures):
    cached = folder_recipe(pictures, f"train.cache={tmp_path / 'c'}")
    for field, value in (
        ("scale", (0.5, 1.0)),
        ("ratio", (0.75, 1.0)),
        ("flip", 0.5),
        ("rand_augment", "rand-m9"),
        ("erase", 0.25),
    ):
        cached.data.augment = PairAugment(
            **{"scale": (1.0, 1.0), "ratio": (1.0, 1.0), field: value}
        )
        with pytest.raises(ConfigError, match=rf"data.augment.{field} is .* looks different each"):
            train(cached, tmp_path / "run", quiet=True)
    masks = load_recipe("zegclip_scenes", [f"train.cache={tmp_path / 'c'}", "train.device=cpu"])
    with pytest.raises(ConfigError, match="image tower of zegclip_tiny does not stay"):
        train(masks, tmp_path / "run", quiet=True)
    objective = create_objective(small())
    masks.model.name = "pacl_tiny"
    with pytest.raises(ConfigError, match=r"data.augment of data.kind 'masks' crops at random"):
        feature_cache.check_cache(masks, objective)


@pytest.mark.bad_input("training", "train.cache with a source that draws without saying so")
def test_a_source_that_looks_different_each_time(tmp_path):
    source = create_source(
        load_options({"kind": "scenes", "train_size": 3, "style": "shapes"}),
        ModelInputs.of(small()),
    )
    read = source.read

    def noisy(index, rng):
        sample = read(index, rng)
        sample.image = torch.randint(0, 255, (3, 48, 48), generator=rng, dtype=torch.uint8)
        return sample

    source.read = noisy
    with pytest.raises(ConfigError, match=r"picture 0 of .* looks different each time it is read"):
        key_of(small(), source)


@pytest.mark.bad_input("training", "a tower whose numbers float16 does not hold")
def test_numbers_beyond_16_bits_are_refused(tmp_path):
    source = CachedSource(
        create_source(
            load_options({"kind": "scenes", "train_size": 3, "style": "shapes"}),
            ModelInputs.of(small()),
        )
    )
    for factor, told in ((1e7, r"[\d.]+e\+07"), (float("nan"), "nan")):
        model = small(tap="post_norm")
        with torch.no_grad():
            model.backbone.norm.weight.mul_(factor)
        with pytest.raises(DataError, match=f"gives {told} of picture 0, which float16 does not"):
            feature_cache.fill_cache(
                source,
                Tower(model, contextlib.nullcontext, "fp32"),
                recipe(f"train.cache={tmp_path}"),
                asked=lambda: False,
                show=False,
            )
    with pytest.raises(RuntimeError, match="features are not there yet"):
        source.collate([source.sample(0, 0)])


def test_nothing_can_be_read(tmp_path, pictures):
    for path in pictures.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="20 pictures in a row cannot be used; the first: "):
        train(folder_recipe(pictures, f"train.cache={tmp_path / 'c'}"), tmp_path / "r", quiet=True)


def test_batches_carry_features(pictures):
    """They are split, moved and cast with the rest; what is drawn of texts stays the same."""
    tokens = torch.arange(5 * 4 * 2).view(5, 4, 2).half()
    ids = torch.ones(5, 3, dtype=torch.int64)
    batch = PairBatch(
        torch.empty(5, 3, 0, 0),
        ids,
        ids[:, 0],
        ids[:, 0],
        features=StoredFeatures(tokens, tokens[:, 0], (2, 2)),
    )
    parts = batch.split(2)
    assert [len(part) for part in parts] == [3, 2] and parts[1].features.grid == (2, 2)
    assert torch.equal(torch.cat([part.features.tokens for part in parts]), tokens)
    assert batch.to("meta").features.embedding.device.type == "meta"
    model = small().double()
    with pytest.raises(RuntimeError):
        model.encode_features(batch.features)
    options = load_options({"kind": "folder", "root": str(pictures), "captions": 2})
    source = create_source(options, ModelInputs.of(model))
    plain = source.collate([source.read(i, generator(i)) for i in range(4)])
    inside = source.without_pictures()
    (pictures / "000.png").write_bytes(b"nobody looks")
    bare = inside.collate([inside.read(i, generator(i)) for i in range(4)])
    assert bare.images.shape == (4, 3, 0, 0) and torch.equal(bare.token_ids, plain.token_ids)
    assert source.decoding and torch.equal(bare.image_ids, plain.image_ids)


def test_any_kind_of_batch(tmp_path):
    """Features stand beside whatever a source gives; a picture that has none is replaced."""
    options = load_options({"kind": "entity_scenes", "train_size": 6, "style": "shapes"})
    source = CachedSource(create_source(options, ModelInputs.of(small())))
    store = FeatureStore(tmp_path, Form(6, (1, 2), 2, 1), {})
    store.create()
    store.write(range(6), np.arange(30, dtype=np.float16).reshape(6, 5))
    source.use(store, {2: "picture 2 is gone"})
    batch = source.collate([source.sample(i, 7) for i in (5, 2, 0)])
    plain = source.pictures.collate([source.pictures.sample(i, 7) for i in (5, 0)])
    assert type(batch) is EntityBatch and batch.skipped == ("picture 2 is gone",)
    found = batch.features.embedding.flatten().tolist()
    assert found[::2] == [29, 4] and found[1] in (4, 9, 19, 24, 29)
    assert torch.equal(batch.image_ids[::2], plain.image_ids)
    length = plain.token_ids.shape[1]
    assert torch.equal(batch.token_ids[::2, :length], plain.token_ids)


def test_halves_of_encode_image():
    for name in ("pacl_tiny", "mgca_tiny"):
        model = small(name)
        images = torch.randn(2, 3, 48, 48)
        whole = model.encode_image(images)
        tower = model.encode_tower(images)
        assert model.frozen_tower and not tower.tokens.requires_grad and whole.tokens.requires_grad
        assert torch.equal(model.encode_features(tower).tokens, whole.tokens)
    model = small("pacl_tiny", trained=["embedder", "vision"])
    assert not model.frozen_tower and model.encode_tower(images).tokens.requires_grad
    assert not ovseg.create_model("segclip_tiny").frozen_tower


def test_rows_of_a_store(tmp_path):
    form = Form(3, (1, 2), 2, 1)
    store = FeatureStore(tmp_path, form, {"a": 1})
    assert not store.exists() and (form.row, form.size) == (5, 30)
    store.create()
    assert store.exists() and store.missing().tolist() == [0, 1, 2]
    store.write([2, 0], np.arange(10, dtype=np.float16).reshape(2, 5))
    assert store.missing().tolist() == [1]
    found = copy.deepcopy(store).read([0, 2, 0])
    assert found.tokens.tolist() == [[[5, 6], [7, 8]], [[0, 1], [2, 3]], [[5, 6], [7, 8]]]
    assert found.embedding.tolist() == [[9], [4], [9]]
    assert not FeatureStore(tmp_path, form, {"a": 2}).exists()
    assert [in_words(n) for n in (800, 3_100_000, 2 * 10**10)] == ["800 bytes", "3.1 MB", "20.0 GB"]


def test_rows_of_another_selection_are_taken_over(tmp_path):
    """Of the same pictures, tower and view, those that are whole; whatever else lies beside."""
    form = Form(3, (1, 2), 2, 1)
    facts = {"tower": "t", "pictures": "all", "some": {}}
    names = [bytes([i]) * 16 for i in range(4)]
    stores = {
        "all": (form, facts, names[:3]),
        "other_tower": (form, {**facts, "tower": "u"}, names[:3]),
        "other_form": (Form(3, (2, 1), 2, 1), facts, names[:3]),
        "unnamed": (form, facts, None),
    }
    for number, (name, (shape, said, pictures)) in enumerate(stores.items()):
        (tmp_path / name).mkdir()
        store = FeatureStore(tmp_path / name, shape, said)
        store.create(pictures)
        rows = np.arange(15, dtype=np.float16).reshape(3, 5) + 100 * number
        store.write([0, 2], rows[[0, 2]])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "index.json").write_text("{")
    (tmp_path / "file").touch()
    (tmp_path / "new").mkdir()
    new = FeatureStore(tmp_path / "new", Form(4, (1, 2), 2, 1), {**facts, "pictures": "some"})
    new.create([names[3], names[2], names[1], names[0]])
    assert new.take_over(("pictures", "some")) == 2 and new.missing().tolist() == [0, 2]
    assert new.read([1, 3]).embedding.tolist() == [[14], [4]]
    assert new.take_over(("pictures", "some")) == 0
    assert new.take_over(()) == 0
    new.create()
    assert new.take_over(("pictures", "some")) == 0
