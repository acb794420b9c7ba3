"""Pictures with several true words: what captions and names say, what is not counted, batches, and
what is wrong with files.
"""

import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import pairs, same
from PIL import Image

import ovseg
from ovseg.data.batches import PairBatch, TagBatch
from ovseg.data.entities import load_entities
from ovseg.data.loader import Loader
from ovseg.data.pair_samples import countable_pairs
from ovseg.data.sampling import generator
from ovseg.data.sources import ModelInputs, create_source, load_options
from ovseg.data.words import WordTokenizer
from ovseg.errors import ConfigError, DataError, NoData
from ovseg.systems.objective import Progress, create_objective

PHOTOS = Path(
    os.environ.get("OVSEG_PHOTOS", Path(__file__).parents[2].parent / "shared" / "photos")
)
WORDS = {"cat": ["kitten"], "dog": [], "sofa": ["couch"], "potted plant": ["plant"], "grass": []}
TOKENIZER = WordTokenizer(["cat", "dog", "sofa", "potted", "plant", "grass", "an", "image", "of"])
INPUTS = ModelInputs(8, 4, TOKENIZER, (0.5, 0.25, 0.0))
CAPTIONS = [  # five a picture
    ["two cats", "a kitten on a couch", "cats", "a cat", "cats on grass"],
    ["a dog"] * 4 + ["a dog and a plant"],
    ["an empty room"] * 5,
    ["grass"] * 5,
]


def paint(path, number, size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), 20 * number, np.uint8)
    pixels[:, : size[0] // 3] = (255, 0, number)
    Image.fromarray(pixels).save(path)


def coco_tree(captions=CAPTIONS):
    return {
        "images": [{"id": 7 + i, "file_name": f"{i}.png"} for i in range(len(captions))],
        "annotations": [
            {"id": 10 * i + k, "image_id": 7 + i, "caption": text}
            for i, texts in enumerate(captions)
            for k, text in enumerate(texts)
        ],
    }


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / "coco"
    for i in range(len(CAPTIONS)):
        paint(root / "val2017" / f"{i}.png", i)
    (root / "annotations").mkdir()
    write(root, coco_tree())
    return root


def write(root, tree, name="captions_val2017.json"):
    text = tree if isinstance(tree, str) else json.dumps(tree)
    (root / "annotations" / name).write_text(text)


@pytest.fixture
def names(tmp_path):
    root = tmp_path / "names"
    for i in range(3):
        paint(root / "pictures" / f"{i}.png", 5 + i)
    (root / "names.tsv").write_text(
        "# looked for: cat, dog, potted plant\n0.png\tcat\n1.png\tdog, cat\n2.png\tpotted plant\n"
    )
    return root


@pytest.fixture
def words(tmp_path):
    (tmp_path / "words.yaml").write_text(json.dumps(WORDS))
    return str(tmp_path / "words.yaml")


def tags(root, words, inputs=INPUTS, split="train", **options):
    options = {"least": 1, "share": 0.4, **options}
    tree = {"kind": "tags", "root": root if isinstance(root, (list, dict)) else str(root)}
    return create_source(load_options({**tree, "words": words, **options}), inputs, split=split)


def said(source, which):
    return [
        {source.words[i] for i in row.nonzero().flatten().tolist()}
        for row in getattr(source, which)
    ]


def test_captions(coco, words, caplog):
    """True from a share of the captions on, not counted below it, false where none names it."""
    source = tags(coco, words)
    assert [Path(name).name for name in source.names] == ["0.png", "1.png", "3.png"]
    assert "1 of 4 pictures have no word of the vocabulary and are left out" in caplog.text
    assert said(source, "positives") == [{"cat"}, {"dog"}, {"grass"}]
    everything = set(WORDS)
    # Nothing shows a sofa or a plant often enough: they are counted nowhere.
    rare = {"sofa", "potted plant"}
    assert said(source, "counted") == [
        everything - rare - {"grass"},
        everything - rare,
        everything - rare,
    ]
    source = tags(coco, words, share=0.2)
    assert said(source, "positives") == [
        {"cat", "sofa", "grass"},
        {"dog", "potted plant"},
        {"grass"},
    ]
    assert said(source, "counted") == [everything] * 3
    source = tags(coco, words, share=0.2, unsure=["grass"])
    assert said(source, "positives") == [{"cat", "sofa"}, {"dog", "potted plant"}]
    assert said(source, "counted") == [everything - {"grass"}] * 2
    assert source.describe()["pictures_of_words"] == {
        "cat": 1,
        "dog": 1,
        "sofa": 1,
        "potted plant": 1,
    }


def test_rare_words(coco, words, caplog):
    source = tags(coco, words, share=0.2, least=2)
    assert said(source, "positives") == [{"grass"}, {"grass"}]
    assert said(source, "counted") == [{"grass"}, {"grass"}]
    assert (
        "4 words that fewer than 2 pictures show are not counted: cat 1, dog 1, sofa 1, potted plant 1"
        in caplog.text
    )


def test_names(names, words, caplog):
    """Listed names are true, the others that were looked for false, all other words uncounted."""
    source = tags(names, words)
    assert said(source, "positives") == [{"cat"}, {"cat", "dog"}, {"potted plant"}]
    assert said(source, "counted") == [{"cat", "dog", "potted plant"}] * 3
    table = names / "names.tsv"
    rest = "".join(table.read_text().splitlines(keepends=True)[1:])
    table.write_text(rest + "\n")  # without the line: what the table holds
    assert said(tags(names, words), "counted") == [{"cat", "dog", "potted plant"}] * 3
    place = {"names": str(table), "images": str(names / "pictures")}
    asked = ["cat", "dog", "potted plant", "sofa", "unicorn"]
    source = tags({**place, "looked_for": asked}, words, least=1)
    # A sofa was looked for and never found: no picture shows it, which is too few.
    assert said(source, "counted") == [{"cat", "dog", "potted plant"}] * 3
    assert "1 names are no words of the vocabulary and are left out: unicorn 0" in caplog.text
    with pytest.raises(
        DataError, match=r"names 'potted plant', which is none of what was looked f"
    ):
        tags({**place, "looked_for": ["cat", "dog"]}, words)
    caplog.clear()
    table.write_text(rest + "3.png\tcat\n")
    assert len(tags(names, words)) == 3 and "of 4 pictures are left out: 1 not in" in caplog.text
    table.write_text("0.png\tdog, zebra\n1.png\tzebra\n")
    source = tags(names, words)
    assert said(source, "positives") == [{"dog"}] and "left out: zebra 2" in caplog.text


def test_several_places_and_a_folder(coco, names, words, tmp_path):
    folder = tmp_path / "folder"
    paint(folder / "a" / "x.png", 9)
    (folder / "a" / "x.txt").write_text("a dog on a sofa\n")
    source = tags([str(coco), {"root": str(names)}, str(folder)], words)
    assert len(source) == 7 and source.names[6] == str(folder / "a" / "x.png")
    assert said(source, "positives")[6] == {"dog", "sofa"}
    assert source.describe()["root"] == [
        str(coco / "annotations/captions_val2017.json"),
        str(names / "names.tsv"),
        str(folder),
    ]
    # A word that one place shows is counted at all that would know it.
    assert "sofa" in said(source, "counted")[1] and "sofa" not in said(source, "counted")[4]


@pytest.mark.parametrize("texts", ["tags", "one"])
def test_batches(coco, names, words, texts):
    """Batches are the same for any number of workers and ranks, and without pictures."""
    source = tags([str(coco), str(names)], words, share=0.2, texts=texts)

    def batches(workers, ranks=1):
        found = []
        for rank in range(ranks):
            with Loader(
                source, 4, seed=3, workers=workers, drop_last=False, rank=rank, ranks=ranks
            ) as loader:
                found.append([next(iter(loader)) for _ in range(2)])
        return found

    expected = batches(0)[0]
    assert type(expected[0]) is (TagBatch if texts == "tags" else PairBatch) is source.batch_type
    assert all(same(a, b) for a, b in zip(expected, batches(1)[0], strict=True))
    halves = batches(0, ranks=2)
    for step in range(2):
        joined = torch.cat([halves[rank][step].images for rank in range(2)])
        assert torch.equal(joined, expected[step].images)
    blind = source.without_pictures()
    for index in range(len(source)):
        whole = source.read(index, generator(index))
        light = blind.read(index, generator(index))
        assert light.image.shape == (3, 0, 0) and whole.image.shape == (3, 8, 8)
        light.image = whole.image
        assert same(source.collate([whole]), source.collate([light]))
    again = pickle.loads(pickle.dumps(source))
    assert same(again.collate([again.sample(1, 1)]), source.collate([source.sample(1, 1)]))


def test_the_vocabulary_survives_a_split(coco, words):
    source = tags(coco, words)
    batch = source.collate([source.sample(i, 0) for i in range(3)])
    assert torch.equal(batch.token_ids, TOKENIZER(list(WORDS))[:, :4])
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 1] and all(type(p) is TagBatch for p in parts)
    assert all(torch.equal(part.token_ids, batch.token_ids) for part in parts)
    for name in ("images", "positives", "counted"):
        rows = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(rows, getattr(batch, name))
    said = tags(coco, words, template="an image of {}").token_ids
    assert torch.equal(said, TOKENIZER([f"an image of {word}" for word in WORDS])[:, :7])


def test_words_weigh_less_the_more_pictures_show_them(coco, words):
    source = tags(coco, words, balance=0.5)
    shown = source.positives.sum(0)
    batch = source.collate([source.sample(i, 0) for i in range(3)])
    for count, weight in zip(shown.tolist(), batch.weights.tolist(), strict=True):
        assert weight == pytest.approx(max(1, count) ** -0.5)
    assert all(torch.equal(part.weights, batch.weights) for part in batch.split(2))
    assert tags(coco, words).collate([source.sample(0, 0)]).weights is None


def test_the_identity_is_that_of_the_files(coco, words):
    source = tags(coco, words)
    before = source.identity()
    assert tags(coco, words, balance=1.0).identity() == before
    picture = Path(source.names[0])
    picture.write_bytes(picture.read_bytes() + b" ")
    assert source.identity() != before


def test_one_word(coco, names, words):
    """Equal words are positives of each other; what a picture may show is no negative of it."""
    source = tags([str(coco), str(names)], words, share=0.4, texts="one")
    assert said(source, "positives")[4] == {"cat", "dog"}
    drawn = {int(source.read(4, generator(seed)).id) for seed in range(20)}
    assert drawn == {0, 1}
    batch = source.collate([source.sample(i, 0) for i in (0, 1, 3)])
    assert batch.image_ids.tolist() == batch.text_ids.tolist() == [0, 1, 0]
    own = batch.image_ids[:, None] == batch.text_ids[None]
    kept = countable_pairs(batch.text_entities, batch.image_entities, own)
    # Picture 0 shows a cat and maybe a sofa and grass, 1 a dog; 3 is known to show no dog.
    assert kept.tolist() == [[True, True, True]] * 3
    batch = source.collate([source.sample(i, 0) for i in (0, 2, 3)])
    assert batch.image_ids.tolist() == [0, 4, 0]
    own = batch.image_ids[:, None] == batch.text_ids[None]
    kept = countable_pairs(batch.text_entities, batch.image_entities, own)
    assert kept.tolist() == [[True, False, True], [True, True, True], [True, False, True]]


def test_an_objective_of_pairs_takes_one_word(tmp_path):
    """What trains on captions trains on single words, in chunks too."""
    pairs(tmp_path / "pairs", 6)
    (tmp_path / "words.yaml").write_text("red:\ngrass:\ngravel:\n")
    model = ovseg.create_model("pacl_tiny", pretrained=None)
    source = tags(
        tmp_path / "pairs", str(tmp_path / "words.yaml"), ModelInputs.of(model), texts="one"
    )
    batch = source.collate([source.sample(i, 0) for i in range(6)])
    objective = create_objective(model)
    whole = objective(batch)["total"]
    rows = [objective.encode(part, Progress()) for part in batch.split(2)]
    joined = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
    parts = objective.loss(joined, batch, Progress(), None)["total"]
    assert bool(whole.isfinite()) and torch.allclose(whole, parts, atol=1e-5)


def test_how_pictures_fit(coco, words):
    """The whole picture, the square in its middle, or augmented for training alone."""

    def pixels(**options):
        return tags(coco, words, **options).read(0, generator(0)).image

    squashed = pixels()  # a third of 12 columns is red
    assert (squashed[0] > 127).sum(1).tolist() == [3] * 8
    cropped = pixels(fit="crop")  # the middle 8 of 12 columns: two of them are red
    assert (cropped[0] > 127).sum(1).tolist() == [2] * 8
    augment = {"scale": [0.2, 0.3], "flip": 1.0}
    changed = pixels(augment=augment)
    assert not torch.equal(changed, squashed)
    assert torch.equal(pixels(augment=augment, split="val"), squashed)
    assert pixels(image_size=5).shape == (3, 5, 5)
    paint(Path(tags(coco, words).names[0]), 1, (400, 400))
    skipped = tags(coco, words, max_pixels=1000).sample(0, 0).skipped
    assert "400x400" in skipped[0]


def test_the_models_own_vocabulary(coco):
    class Known(WordTokenizer):
        entities = load_entities("everyday")

    known = Known(sorted({part for name in Known.entities.names for part in name.split()}))
    source = tags(coco, None, ModelInputs(8, 4, known))
    assert source.words == Known.entities.names and said(source, "positives")[0] == {"cat"}
    with pytest.raises(ConfigError, match=r"data.words is null and the model has no vocabulary of"):
        tags(coco, None)
    with pytest.raises(
        ConfigError, match=r"the model does not know 72 of 73 words, the first 'person'"
    ):
        tags(coco, "everyday", ModelInputs(8, 4, WordTokenizer(["cat"])))

    def deaf(texts):
        return torch.ones(len(texts), 4, dtype=torch.int64)

    with pytest.raises(ConfigError, match="the model reads 'person' and 'bicycle' alike"):
        tags(coco, "everyday", ModelInputs(8, 4, deaf))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"share": 0}, "data.share is 0.0; expected above 0 and up to 1"),
        ({"share": 1.5}, "data.share is 1.5"),
        ({"least": 0}, "data.least is 0; expected 1 to"),
        ({"fit": "pad"}, r"data.fit is 'pad'; expected one of \['squash', 'crop'\]"),
        ({"texts": "all"}, r"data.texts is 'all'; expected one of \['tags', 'one'\]"),
        ({"template": "a photo"}, "data.template is 'a photo'; expected a text with one {}"),
        ({"unsure": ["orange"]}, "data.unsure names 'orange'; expected some of 5 words"),
        ({"root": None}, "data.root is None; with data.kind=tags expected a folder of pictures"),
        ({"root": []}, r"data.root is \[\]; with data.kind=tags"),
        ({"root": [3]}, "data.root holds 3; expected a folder"),
        ({"root": {"rot": "x"}}, "data.root: unknown key 'rot'; expected some of"),
        ({"root": {"images": "x"}}, "names .* together; expected one of root, captions and names"),
        ({"root": {"root": "x", "names": "y"}}, "expected one of root, captions and names"),
        ({"root": {"root": ""}}, "data.root: root is ''; expected a path"),
        ({"root": {"root": "x", "looked_for": ["a"]}}, "looked_for beside root; expected it besid"),
        (
            {"root": {"names": "x", "looked_for": [1]}},
            "looked_for is .1.; expected a list of names",
        ),
    ],
)
def test_bad_options(coco, words, options, message):
    with pytest.raises(ConfigError, match=message):
        create_source(
            load_options({"kind": "tags", "root": str(coco), "words": words, **options}), INPUTS
        )


def broken(change):
    tree = coco_tree()
    change(tree)
    return tree


@pytest.mark.bad_input("data", "captions in JSON")
@pytest.mark.parametrize(
    "tree,message",
    [
        ("{", "is no JSON: .*; expected COCO's form"),
        ("[1, 2]", "holds no list of images; expected COCO's form"),
        ('{"images": [], "annotations": []}', "holds no list of images"),
        (broken(lambda t: t.update(annotations={})), "holds no list of annotations"),
        (
            broken(lambda t: t["images"].append({"id": 7, "file_name": "0.png"})),
            "the image id 7 sta",
        ),
        (
            broken(lambda t: t["annotations"].append(t["annotations"][0])),
            "the annotation id 0 stand",
        ),
        (
            broken(lambda t: t["images"][0].pop("file_name")),
            r"an entry with \['id'\]; expected id a",
        ),
        (
            broken(lambda t: t["images"][0].update(file_name=3)),
            "file_name of image 7 is 3; expected",
        ),
        (broken(lambda t: t["images"][0].update(id=[1])), r"id is \[1\]; expected a number"),
        (
            broken(lambda t: t["annotations"][0].pop("caption")),
            "expected image_id and caption in ea",
        ),
        (broken(lambda t: t["annotations"].append("x")), "holds x; expected image_id and caption"),
        (
            broken(lambda t: t["annotations"][0].update(caption=None)),
            "a caption of image 7 is None",
        ),
        ('{"images": 1, "images": 2}', "key 'images' stands twice"),
    ],
)
def test_bad_captions(coco, words, tree, message):
    write(coco, tree)
    with pytest.raises(DataError, match=message) as raised:
        tags(coco, words)
    assert "\n" not in str(raised.value) and "captions_val2017.json" in str(raised.value)


@pytest.mark.bad_input("data", "captions and names without their pictures")
def test_captions_without_pictures(coco, names, words, caplog, tmp_path):
    with pytest.raises(
        NoData, match=r"data.root '.*nowhere' does not exist; expected a folder with"
    ):
        tags(tmp_path / "nowhere", words)
    with pytest.raises(DataError, match=r"file of captions '.*x.json' does not exist"):
        tags({"captions": str(tmp_path / "x.json")}, words)
    tree = coco_tree()
    tree["annotations"].append({"id": 99, "image_id": 1, "caption": "a stranger"})
    tree["images"] += [{"id": 80, "file_name": "80.png"}, {"id": 81, "file_name": "81.png"}]
    tree["annotations"] += [{"id": 100, "image_id": 80, "caption": "a cat"}]
    write(coco, tree)
    assert len(tags(coco, words)) == 3
    assert "1 captions of images that it does not list are left out" in caplog.text
    assert (
        "of 6 pictures are left out: 1 not in" in caplog.text and "1 without a text" in caplog.text
    )
    write(coco, coco_tree(), "captions_train2017.json")
    with pytest.raises(
        DataError, match=r"holds annotations/captions_train2017.json, .*; expected one"
    ):
        tags(coco, words)
    (coco / "annotations" / "captions_train2017.json").unlink()
    with pytest.raises(
        NoData, match=r"images '.*nowhere' does not exist; expected the pictures of"
    ):
        tags(
            {
                "captions": str(coco / "annotations" / "captions_val2017.json"),
                "images": str(tmp_path / "nowhere"),
            },
            words,
        )
    (coco / "val2017").rename(coco / "elsewhere")
    with pytest.raises(NoData, match=r"lists 6 pictures, the first 0\.png, none of which is in"):
        tags(coco, words)
    (coco / "annotations" / "captions_val2017.json").unlink()
    with pytest.raises(DataError, match=r"holds 4 pictures, 0 of them with a \.txt"):
        tags(coco, words)
    (coco / "elsewhere" / "0.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"no file of captions can be used; the first: .*no UTF-8"):
        tags(coco, words)
    (coco / "elsewhere" / "1.txt").write_text("a dog")
    assert len(tags(coco, words)) == 1 and "1 files of captions are left out" in caplog.text
    with pytest.raises(
        DataError, match="none of 1 pictures has one of 5 words that 2 or more have"
    ):
        tags(coco, words, least=2)


@pytest.mark.bad_input("data", "a table of names")
@pytest.mark.parametrize(
    "text,message",
    [
        ("", "is empty; expected on each line a picture, a tab"),
        ("0.png cat\n", "line 1 is '0.png cat'; expected on each line a picture, a tab"),
        ("0.png\tcat\n1.png\t ,\n", "line 2 is '1.png.*'; expected"),
        ("0.png\tcat\n0.png\tdog\n", "'0.png' stands twice; expected it once"),
        (
            "# looked for: dog\n0.png\tcat\n",
            "names 'cat', which is none of what was looked for: dog",
        ),
        ("# a comment\n", "lists 0 pictures"),
        ("9.png\tcat\n", "lists 1 pictures, the first 9.png, none of which is in"),
        ("0.png\tzebra\n", "none of 1 pictures has one of 5 words"),
    ],
)
def test_bad_names(names, words, text, message):
    (names / "names.tsv").write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        tags(names, words)
    assert "\n" not in str(raised.value)


def test_an_empty_vocabulary(coco, tmp_path):
    for text, message in (("", "holds NoneType|is empty"), ("{}", "is empty")):
        (tmp_path / "none.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            tags(coco, str(tmp_path / "none.yaml"))


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs in {PHOTOS}")
def test_photographs(caplog):
    """Captions of COCO and names of VOC by the list that was made from them."""
    known = sorted({part for name in load_entities("photos").names for part in name.split()})
    inputs = ModelInputs(32, 16, WordTokenizer(known))
    caplog.set_level(logging.INFO)
    roots = [str(PHOTOS / "coco_captions"), str(PHOTOS / "voc_names")]
    source = tags(roots, "photos", inputs, share=0.2, least=10, unsure=["orange"])
    counts = source.describe()["pictures_of_words"]
    assert len(source) == 3645 and len(counts) == 161 and "orange" not in counts
    assert (counts["person"], counts["sheep"], counts["tv monitor"]) == (2532, 209, 97)
    assert "161 of 177 words are shown by 10 or more pictures" in caplog.text
    assert bool((source.positives <= source.counted).all())
