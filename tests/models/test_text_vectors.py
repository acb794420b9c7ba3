"""The table of vectors: texts as sets of names, its teacher, words it does not know."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_trunks import CNN, TEXT, backbone, batch, small
from torch.nn import functional as F

import ovseg
from ovseg.data.entities import load_entities
from ovseg.data.entity_words import EntityTokenizer
from ovseg.data.labels import LabelSet
from ovseg.errors import CheckpointError, ConfigError, InputError
from ovseg.inference.known_words import check_words
from ovseg.inference.queries import Queries
from ovseg.systems.objective import create_objective


def test_texts_are_sets_of_names():
    tokenizer = EntityTokenizer(load_entities("everyday"))
    woman = tokenizer(["woman"])
    assert torch.equal(woman, tokenizer(["the people"])) and woman[0, 0] == 1
    cat, bus = (tokenizer.words.index(name) + 1 for name in ("cat", "bus"))
    ids = tokenizer(["Cat and a bus", "two buses and cats", "a photo of nothing", "cat"])
    assert ids.shape == (4, 16) and ids[0].tolist() == ids[1].tolist()
    assert sorted(ids[0][:2].tolist()) == sorted([cat, bus]) and not ids[2].any()
    assert ids[3].tolist() == [cat] + [0] * 15
    assert tokenizer.unknown("a photo of the wombat's cat") == ["wombat"]
    assert tokenizer.unknown("There is a large cat in the scene.") == []
    assert tokenizer.nearest("xyzzy") == [] and "horse" in tokenizer.nearest("hors")
    short = EntityTokenizer(load_entities("everyday"), 1)
    assert short.cut(["a cat", "a cat and a bus"]) == [False, True]
    assert short(["a bus and a cat"]).tolist() == [[bus]]


@torch.no_grad()
def test_embeddings_by_their_formula():
    tower = backbone()
    table = F.normalize(tower.text.vectors, dim=-1)
    ids = tower.tokenizer(["a woman and her dogs", "sofa", ""])
    found = tower.encode_text(ids)
    torch.testing.assert_close(found[0], F.normalize(table[1] + table[2], dim=0))
    torch.testing.assert_close(found[1], table[3])
    assert not found[2].any() and not tower.text.center.any()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_vectors_begin_at_a_teachers(kind, tmp_path):
    names, center = ["Kitten", "dog", "zebra"], torch.randn(8) / 10
    vectors = 3 * torch.randn(3, 8)
    path = tmp_path / f"teacher.{kind}"
    if kind == "npz":
        arrays = {"vectors": vectors.numpy().astype(np.float16), "center": center.numpy()}
        np.savez(path, names=np.array(names), **arrays)
    else:
        tensors = {"vectors": vectors, "center": center}
        save_file(tensors, path, {"names": json.dumps(names)})
    text = {**TEXT, "teacher": str(path), "fixed": True}
    model = small(backbone={"text": text, **CNN, "weights": None}, trained=["embedder", "text"])
    tower = model.backbone.text
    expected = F.normalize(F.normalize(vectors[:2], dim=-1) - center, dim=-1)
    torch.testing.assert_close(tower.table()[:2], expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(tower.center, center)
    assert tower.vectors.shape == (2, 8) and tower.fixed_vectors.shape == (2, 8)
    with torch.enable_grad():
        create_objective(model)(batch())["total"].backward()
    assert tower.vectors.grad.abs().sum() > 0
    # The folder holds the vectors; the teacher is not asked again.
    folder = ovseg.save_pretrained(model, tmp_path / "saved")
    path.unlink()
    saved = json.loads((folder / "config.json").read_text())["options"]["backbone"]["text"]
    assert saved["teacher"] is None and saved["fixed"] == ["cat", "dog"]
    again = ovseg.from_pretrained(folder).backbone.text
    assert torch.equal(again.table(), tower.table()) and again.fixed == [0, 1]


def write(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.bad_input("models", "a table of vectors or its teacher that cannot be")
def test_teachers_that_are_none(tmp_path):
    rows = np.ones((2, 8), np.float32)
    names = np.array(["cat", "dog"])
    bad = rows.copy()
    bad[1] = 0
    (tmp_path / "text.npz").write_text("cat 1 2 3")
    cases = (
        (write(tmp_path / "a.npz", vectors=rows), "cannot be read"),
        (write(tmp_path / "b.npz", names=names[:1], vectors=rows), "has 1 names, vectors"),
        (write(tmp_path / "c.npz", names=names, vectors=bad), "not finite or zero"),
        (write(tmp_path / "d.npz", names=names[[0, 0]], vectors=rows), "has 'cat' twice"),
        (
            write(tmp_path / "e.npz", names=names, vectors=rows[:, :4]),
            "expected a vector of width 8",
        ),
        (write(tmp_path / "f.npz", names=names.astype(object), vectors=rows), "holds code"),
        (str(tmp_path / "text.npz"), "cannot be read"),
        (str(tmp_path / "none.safetensors"), "does not exist"),
    )
    for path, message in cases:
        with pytest.raises(CheckpointError, match=message):
            backbone(text={**TEXT, "teacher": path})
    zebra = write(tmp_path / "g.npz", names=np.array(["zebra", "dogs"]), vectors=rows)
    for options, message in (
        ({"teacher": zebra}, "has no vector of 'cat' or any other"),
        ({"fixed": True}, "text.teacher is missing"),
        ({"fixed": ["cow"]}, "text.fixed has 'cow'; expected names of text.words"),
        ({"fixed": "cat"}, "expected True, False or a list of names"),
        ({"words": ["cat"]}, "text.words is a list"),
        ({"words": {"cat": ["dog"], "dog": []}}, "stands for 'cat' and 'dog'"),
        ({"words": {"cat": 3}}, "text.words: 'cat' is 3"),
        ({"words": "no_list"}, "list of entities 'no_list' does not exist"),
        ({"width": 0}, "text.width is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            backbone(text={**TEXT, **options})
    with pytest.raises(ValueError, match=r"text\.kind is 'vectors', which gives no tokens"):
        ovseg.create_model("groupvit_tiny", backbone={"text": TEXT})


@pytest.mark.bad_input("labels", "words that a table of vectors does not have")
def test_unknown_words_are_refused_by_name():
    model = small()
    check_words(model, Queries(LabelSet.of(["a kitten", "the sofa"]), background=("persons",)))
    with pytest.raises(
        InputError, match=r"does not know: sof \(nearest: sofa\), zebra; it knows 4"
    ):
        check_words(model, Queries(LabelSet.of(["zebra", "sof"])))
    with pytest.raises(InputError, match="reads as nothing"):
        model.encode_labels(["zebra", "cat"])
    with pytest.raises(InputError, match="read the same"):
        model.encode_labels(["kitten", "cat"])
    picture = np.zeros((40, 60, 3), np.uint8)
    assert ovseg.segment(picture, ["cat", "dog"], model=model).labels.shape == (40, 60)
    with pytest.raises(InputError, match="does not know: zebra"):
        ovseg.segment(picture, ["cat", "zebra"], model=model)


@torch.no_grad()
def test_another_text_tower():
    tower = backbone(text={"kind": "words", "width": 16})
    assert tower.embed_dim == 16 and len(tower.text_blocks) == 2
    assert tower.encode_text(tower.tokenizer(["a red seven"])).shape == (1, 16)
