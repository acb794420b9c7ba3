"""Sparse, nested, quantised and meta tensors, None and other things that are none: each is refused
by the name of its argument.
"""

import warnings

import numpy as np
import pytest
import torch

import ovseg
from ovseg.errors import InputError
from ovseg.inference.queries import Queries

LABELS = ["grass", "sand"]
pytestmark = pytest.mark.third_trial(15)


def kinds(x):
    """Things that are no dense tensor of numbers like ``x``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {
            "None": None,
            "str": "a",
            "int": 3,
            "list": [1, 2],
            "object": object(),
            "objects": np.array([None, 1], object),
            "dict": {},
            "scalar": torch.zeros(()),
            "empty": torch.zeros(0),
            "sparse": x.to_sparse(),
            "compressed": x[..., 0, :, :].to_sparse_csr() if x.dim() > 2 else x.to_sparse_csr(),
            "nested": torch.nested.nested_tensor([x[0], x[0][:1]]),
            "complex": x + 1j,
            "quantised": torch.quantize_per_tensor(x.float().contiguous(), 0.1, 0, torch.quint8),
            "8 bits": x.to(torch.float8_e4m3fn),
            "meta": x.to("meta"),
            "integers": x.long(),
            "bool": x.bool(),
        }
    return found


KINDS = list(kinds(torch.zeros(2, 3, 4, 4)))


@pytest.fixture(
    scope="module",
    params=["pacl_tiny", "clip_dense_tiny", "mgca_tiny", "zegclip_tiny", "segclip_tiny"],
)
def model(request):
    return ovseg.create_model(request.param)


@pytest.fixture(scope="module")
def pacl():
    return ovseg.create_model("pacl_tiny", "digits")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("list", "str")])
def test_one_picture(pacl, kind):
    given, predictor = kinds(torch.rand(3, 8, 8))[kind], ovseg.Predictor(pacl, LABELS)
    for ask in (
        predictor.set_image,
        predictor.prepare,
        pacl.preprocess,
        lambda x: predictor.predict_batch([x]),
        lambda x: ovseg.segment(x, LABELS, model=pacl),
    ):
        with pytest.raises(InputError, match=r"^image (is|has|holds) .*expected"):
            ask(given)
    ((_, found),) = predictor.stream([given])
    assert isinstance(found, InputError)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "list"])
def test_many_pictures(pacl, kind):
    given, predictor = kinds(torch.rand(2, 3, 8, 8))[kind], ovseg.Predictor(pacl, LABELS)
    with pytest.raises(InputError, match=r"^images (is|has|holds) .*expected"):
        predictor.predict_batch(given)
    if kind not in (
        "complex",
        "8 bits",
        "integers",
        "bool",
    ):  # those are several pictures, each of a wrong kind
        for name, ask in (("images", predictor.see), ("sources", predictor.stream)):
            with pytest.raises(
                InputError, match=rf"^{name} (is|has) .*expected a list of pictures"
            ):
                ask(given)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_model(model, kind):
    given = kinds(model.normalize(torch.rand(1, 3, 48, 48)))[kind]
    for ask in (
        model,
        model.encode_image,
        lambda x: model.similarity(x, torch.ones(2, model.spec.embed_dim)),
    ):
        with pytest.raises(InputError, match=r"^images (is|has) .*expected"):
            ask(given)
    if kind not in ("meta",):  # which has a shape, as normalising needs no more
        with pytest.raises(InputError, match=r"^pixels (is|has) .*expected"):
            model.normalize(given)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_a_model(model, kind):
    features = model(model.normalize(torch.rand(1, 3, 48, 48)))
    given = kinds(torch.rand(2, model.spec.embed_dim))[kind]
    for ask in (model.similarity, model.segment_logits):
        with pytest.raises(InputError, match=r"^texts (is|has) .*expected"):
            ask(features, given)
    with pytest.raises(
        InputError, match=r"^features is a .*; expected what model.encode_image gives"
    ):
        model.segment_logits(given, torch.ones(2, model.spec.embed_dim))
    ids = model.tokenizer(["grass", "sand"])
    given = {
        "integers": ids.float(),
        **{name: x for name, x in kinds(ids).items() if name != "integers"},
    }[kind]
    with pytest.raises(InputError, match=r"^token_ids (is|has) .*expected"):
        model.encode_text(given)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_are_no_tensors(pacl, kind, tmp_path):
    given = kinds(torch.rand(2, 3, 8, 8))[kind]
    asked = {
        "view": lambda x: ovseg.Predictor(pacl, view=x),
        "decision": lambda x: ovseg.Predictor(pacl, decision=x),
        "resize": lambda x: ovseg.Predictor(pacl, resize=x),
        "short_side": lambda x: ovseg.Predictor(pacl, short_side=x),
        "activation": lambda x: ovseg.Predictor(pacl, activation=x),
        "synonyms": lambda x: Queries(synonyms=x),
        "background": lambda x: Queries(background=x),
        "bias": lambda x: ovseg.Predictor(pacl, bias=x),
        "embeddings": lambda x: Queries(embeddings=x),
        "templates": lambda x: Queries(templates=x),
    }
    valid = {
        "view": ("None",),
        "decision": ("None",),
        "resize": (),
        "short_side": ("None", "int"),
        "activation": ("None",),
        "synonyms": (),
        "background": ("None", "str", "dict"),
        "bias": ("None", "dict"),
        "embeddings": ("None", "str"),
        "templates": ("None",),
    }
    asked |= {
        "model": ovseg.Predictor,
        "name": ovseg.create_model,
        "pretrained": lambda x: ovseg.create_model("pacl_tiny", x),
        "source": ovseg.from_pretrained,
        "device": lambda x: ovseg.create_model("pacl_tiny", device=x),
        "folder": lambda x: ovseg.save_pretrained(pacl, x),
    }
    valid |= {
        "model": (),
        "name": ("str",),
        "pretrained": ("None", "str"),
        "source": ("str",),
        "device": ("int",),
        "folder": ("str",),
    }
    for name, ask in asked.items():
        if kind not in valid[name]:
            with pytest.raises(
                InputError, match=rf"^({name}|templates?\[?) ?.*(is|has|holds) .*expected"
            ):
                ask(given)
    with pytest.raises(InputError, match=r"^model is a .*; expected a model of create_model"):
        ovseg.save_pretrained(given, tmp_path / "m")


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if isinstance(kinds(torch.zeros(2, 3, 4, 4))[kind], torch.Tensor)],
)
def test_labels_that_are_tensors(pacl, kind):
    given, predictor = kinds(torch.rand(2, 3, 8, 8))[kind], ovseg.Predictor(pacl, LABELS)
    picture = np.zeros((8, 8, 3), np.uint8)
    for ask in (
        predictor.set_labels,
        pacl.encode_labels,
        lambda x: predictor.predict_batch([picture], x),
        lambda x: ovseg.segment(picture, x, model=pacl),
        lambda x: ovseg.Predictor(pacl, x),
    ):
        with pytest.raises(InputError, match=r"^labels is a tensor; expected"):
            ask(given)
    with pytest.raises(InputError, match=r"^allowed is a Tensor; expected names"):
        predictor.predict_batch([picture], allowed=given)


@pytest.mark.parametrize("given", [None, 3, [], object(), torch.zeros(2), True, "1", float("nan")])
def test_what_is_saved(pacl, given, tmp_path):
    found = ovseg.segment(np.zeros((8, 8, 3), np.uint8), LABELS, model=pacl)
    with pytest.raises(InputError, match=r"^alpha is .*; expected 0"):
        found.overlay(given)
    for save in (found.save, found.save_mask):
        if not isinstance(given, str):
            with pytest.raises(InputError, match=r"^path is a .*; expected a path"):
                save(given)
