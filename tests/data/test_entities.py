"""Entities: the list, plurals, questions and answers; sources that add them, pictures two by two;
CC4M and the index of pairs.
"""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import INPUTS, same
from PIL import Image
from safetensors.numpy import load_file, save_file

import ovseg
from ovseg.cli.main import main
from ovseg.data.batches import CrossEntityBatch, EntityBatch, NounBatch
from ovseg.data.benchmark_sets import describe
from ovseg.data.entities import Entities, Mention, load_entities, singulars
from ovseg.data.entity_index import EntityIndex
from ovseg.data.loader import Loader
from ovseg.data.pair_samples import countable_pairs
from ovseg.data.sampling import generator
from ovseg.data.sources import ModelInputs, create_source, load_options
from ovseg.data.words import WordTokenizer
from ovseg.errors import ConfigError, DataError, InputError
from ovseg.systems.objective import Progress, create_objective

EVERYDAY = load_entities("everyday")
VOC_TEXTS = {
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}
CAPTIONS = [
    "two dogs on a sofa",
    "a dog and a cat",
    "the man's cat\nnothing here",
    "an empty street",
    "people with dogs\na cup",
    "a mug",
]


class Words:
    """A tokenizer that can be read back: a word an id, in the order in which they come."""

    def __init__(self):
        self.ids = {}

    def __call__(self, texts):
        rows = [
            [self.ids.setdefault(word, len(self.ids) + 1) for word in text.split()]
            for text in texts
        ]
        return torch.tensor([(row + [0] * 24)[:24] for row in rows])

    def read(self, ids):
        words = {number: word for word, number in self.ids.items()}
        return " ".join(words[i] for i in ids.tolist() if i)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pairs"
    for i, text in enumerate(CAPTIONS):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20 + i, 30, 3), 20 * i, np.uint8)).save(
            root / "ab"[i % 2] / f"{i}.png"
        )
        (root / "ab"[i % 2] / f"{i}.txt").write_text(text + "\n")
    return root


@pytest.fixture
def index(folder, tmp_path):
    assert (
        main(["data", "cross-pairs", str(folder), "--out", str(tmp_path / "index.safetensors")])
        == 0
    )
    return tmp_path / "index.safetensors"


def source_of(inputs=INPUTS, **tree):
    return create_source(load_options(tree), inputs)


def test_the_list():
    """The counts of the published list, and its words that are lost when "'" and "s" are stripped
    off.
    """
    assert len(EVERYDAY) == 73 and len(EVERYDAY.surface) == 100
    lost = {
        name for name in EVERYDAY.names if not EVERYDAY.question(f"a {name}", published=True)[1]
    }
    assert lost == {
        "bus",
        "spoon",
        "glass",
        "sofa",
        "shirt",
        "suitcase",
        "sink",
        "sheep",
        "skateboard",
        "skis",
        "snowboard",
        "surfboard",
        "sandwich",
    }
    assert all(EVERYDAY.question(f"a {name}.")[1] == [i] for i, name in enumerate(EVERYDAY.names))


def test_the_list_of_photographs():
    """Every class of VOC and every thing of COCO is a word of its own; the stuff is a part of it."""
    photos = load_entities("photos")
    assert len(photos) == 177 and set(load_entities("photos_stuff").names) <= set(photos.names)
    assert all(
        photos.find(f"the {name}.") == [Mention(4, 4 + len(name), i)]
        for i, name in enumerate(photos.names)
    )
    for name, texts in (("voc20", VOC_TEXTS), ("coco_object", {})):
        asked = [texts.get(one, one) for one in describe(name).classes if one != "background"]
        found = [photos.index_of(one.split()) for one in asked]
        assert None not in found and len(set(found)) == len(asked)
    said = photos.find(
        "Two ladies' motorcycles by a wine bottle at home plate, skiing in the snowy woods"
    )
    assert [photos.names[one.index] for one in said] == [
        "person",
        "motorbike",
        "bottle",
        "home plate",
        "skis",
        "snow",
        "forest",
    ]


@pytest.mark.parametrize(
    "word,one",
    [
        ("dogs", "dog"),
        ("buses", "bus"),
        ("glasses", "glass"),
        ("knives", "knife"),
        ("women", "woman"),
        ("puppies", "puppy"),
        ("sheep", "sheep"),
        ("sandwiches", "sandwich"),
        ("babies", "baby"),
        ("skis", "skis"),
        ("benches", "bench"),
        ("loaves", "loaf"),
        ("ties", "tie"),
    ],
)
def test_plurals(word, one):
    assert one in singulars(word)
    if one in EVERYDAY.surface:
        assert EVERYDAY.index_of([word]) == EVERYDAY.surface[one]


def test_what_is_no_plural():
    assert singulars("s") == ["s"] and singulars("as") == ["as"]
    assert EVERYDAY.find("a hatter caught a catfish in a busy, carless hats-off street") == []


def test_questions_and_answers():
    text = "Two men's dogs, a T-shirt and SHEEP; people."
    asked, found = EVERYDAY.question(text)
    assert asked == "Two [MASK]'s [MASK], a T-shirt and [MASK]; [MASK]."
    assert [EVERYDAY.names[i] for i in found] == ["person", "dog", "sheep"]
    asked, found = EVERYDAY.question("A man's dogs, sheep and a dog on grass", published=True)
    assert asked == "a [MASK] dogs, heep and a [MASK] on gra" and [
        EVERYDAY.names[i] for i in found
    ] == ["person", "dog"]
    assert EVERYDAY.answer(found, "a photo of a {} here.") == "a photo of a person and dog here."
    assert (
        EVERYDAY.answer(found, "a photo of a {} here.", published=True)
        == "a photo of a person and dog"
    )
    assert EVERYDAY.answer([], "a photo of a {} here.") == "a photo of a "


def test_several_words_and_prompts():
    words = Entities({"traffic light": ["stop light"], "light": ["lamp"]}, {"light": "a light"})
    found = words.find("traffic lights, a light, Stop\n light")
    assert [(m.index, m.start, m.end) for m in found] == [(0, 0, 14), (1, 18, 23), (0, 25, 36)]
    assert words.answer([0, 1], "{}!") == "traffic light and a light!"
    again = pickle.loads(pickle.dumps(words))
    assert (again.names, again.phrases, again.surface) == (
        words.names,
        words.phrases,
        words.surface,
    )


@pytest.mark.parametrize(
    "text,message",
    [
        ("[dog, cat]", "holds list"),
        ("dog: cat", "'dog' is 'cat'"),
        ("dog: [1]", "'dog' is"),
        ("3: [x]", "3 is"),
        ("{}", "is empty"),
        ("dog: [cat]\ncat:", "the word 'cat' stands for 'dog' and 'cat'"),
        ("'...':", "expected letters or digits"),
        ("a: [", "no YAML"),
        ("dog:\ndog:", "stands twice"),
    ],
)
def test_bad_lists(tmp_path, text, message):
    (tmp_path / "list.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_entities(str(tmp_path / "list.yaml"))
    with pytest.raises(
        ConfigError, match=r"does not exist; expected one of \['everyday', 'photos', "
    ):
        load_entities("everday")


@pytest.mark.parametrize(
    "tree,message",
    [
        ({"gives": "all"}, r"data.gives is 'all'; expected one of \['nouns', 'masked', 'cross'\]"),
        ({"templates": "clip81"}, "data.templates is 'clip81'"),
        ({"nouns": 0}, "data.nouns is 0; expected 1 to 100"),
    ],
)
@pytest.mark.parametrize("kind", ["entity_scenes", "entity_folder"])
def test_bad_options(kind, tree, message):
    with pytest.raises(ConfigError, match=message):
        source_of(kind=kind, **tree)


def test_options_that_do_not_go_together(folder, index):
    with pytest.raises(
        ConfigError,
        match=r"data.index is null; with data.gives=cross expected a file of ovseg data cross-pairs",
    ):
        source_of(kind="entity_folder", root=str(folder), gives="cross")
    assert (
        len(source_of(kind="entity_folder", root=str(folder), gives="masked", index=str(index)))
        == 6
    )  # as a stage before needs none
    with pytest.raises(ConfigError, match=r"data.published is true"):
        source_of(kind="entity_scenes", published=True)


def test_nouns(folder):
    words = Words()
    source = source_of(
        ModelInputs(16, 4, words),
        kind="entity_folder",
        root=str(folder),
        gives="nouns",
        nouns=3,
        templates="label",
    )
    batch = source.collate([source.sample(i, 0) for i in range(6)])  # a/0 a/2 a/4 b/1 b/3 b/5
    assert (
        isinstance(batch, NounBatch)
        and batch.noun_ids.shape[:2] == (6, 3)
        and batch.image_entities is None
    )
    said = [[words.read(ids) for ids in row] for row in batch.noun_ids]
    assert (
        sorted(said[0]) == ["dog", "sofa", "two dogs on a sofa"]
        and sorted(said[3][:2]) == ["cat", "dog"]
        and said[5][0] == "cup"
    )
    assert said[4] == ["an empty street"] * 3


@pytest.mark.parametrize("published", [False, True])
def test_questions_of_a_folder(folder, published):
    words = Words()
    source = source_of(
        ModelInputs(16, 4, words),
        kind="entity_folder",
        root=str(folder),
        gives="masked",
        templates="simple",
        published=published,
    )
    batch = source.collate([source.sample(i, 0) for i in range(6)])
    assert isinstance(batch, EntityBatch) and len(batch.question_ids) == len(batch.answer_ids) == 6
    asked, answered = (
        [words.read(ids) for ids in rows] for rows in (batch.question_ids, batch.answer_ids)
    )
    if published:
        assert (
            asked[0] == "two [MASK] on a ofa"
            and answered[3] == "a photo of a dog and cat"
            and answered[4] == "a photo of a"
        )
        assert batch.answer_entities is None and batch.image_entities is None
        return
    assert (
        asked[0] == "two [MASK] on a [MASK]"
        and answered[0] == "a photo of a dog and sofa."
        and answered[4] == "a photo of a"
    )
    named = [
        {EVERYDAY.names[k] for k in row.nonzero().flatten().tolist()}
        for row in batch.image_entities
    ]
    assert named == [
        {"dog", "sofa"},
        {"person", "cat"},
        {"person", "dog", "cup"},
        {"dog", "cat"},
        set(),
        {"cup"},
    ]
    own = torch.eye(6, dtype=torch.bool)
    negatives = countable_pairs(batch.answer_entities, batch.image_entities, own) & ~own
    assert (
        not negatives[:, 4].any() and negatives[1, 0] and not negatives[2, 5]
    )  # "cup" is true of the picture with a cup


def test_every_picture_of_a_pair_shows_the_entity(folder, index):
    words = Words()
    source = source_of(
        ModelInputs(16, 4, words),
        kind="entity_folder",
        root=str(folder),
        gives="cross",
        index=str(index),
        captions=1,
        augment={"scale": [1, 1], "ratio": [1, 1]},
    )
    assert len(source) == 5  # the empty street names nothing
    shown = {
        0: 0,
        1: 2,
        2: 4,
        3: 1,
        4: 3,
        5: 5,
    }  # place in the folder's order -> number of the picture
    names = [{EVERYDAY.names[m.index] for m in EVERYDAY.find(CAPTIONS[shown[i]])} for i in range(6)]
    seen = set()
    for place, seed in itertools.product(range(5), range(40)):
        sample = source.sample(place, seed)
        picture, partner = (
            round(float(image.float().mean()) / 20)
            for image in (sample.image, sample.rows["partner"])
        )
        entity = EVERYDAY.names[int(sample.rows["entity_ids"])]
        assert entity in {EVERYDAY.names[m.index] for m in EVERYDAY.find(CAPTIONS[picture])}
        assert entity in {EVERYDAY.names[m.index] for m in EVERYDAY.find(CAPTIONS[partner])}
        assert words.read(sample.rows["entity_token_ids"]) == f"A photo of {entity}"
        alone = sum(entity in named for named in names) == 1
        assert (picture == partner) == alone
        seen.add((picture, partner))
    assert {(0, 1), (0, 4), (1, 0), (1, 2), (1, 4), (2, 1), (2, 4), (4, 0), (5, 4), (0, 0)} <= seen


def test_partners_are_drawn_evenly():
    named = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 0], [0, 0]])
    index = EntityIndex.of(named)
    assert index.pictures().tolist() == [0, 1, 2, 3]
    found = np.bincount([index.partner(2, 0, generator(seed)) for seed in range(400)], minlength=5)
    assert found[2] == found[1] == found[4] == 0 and 160 < found[0] < 240
    assert index.partner(1, 1, generator(0)) == 2
    assert EntityIndex.of(torch.tensor([[1], [0]])).partner(0, 0, generator(0)) == 0


@pytest.fixture(params=["entity_scenes", "entity_folder"])
def made(request, folder, index):
    if request.param == "entity_scenes":
        return lambda gives: source_of(kind="entity_scenes", gives=gives, train_size=12, captions=2)
    return lambda gives: source_of(
        kind="entity_folder",
        root=str(folder),
        gives=gives,
        index=str(index) if gives == "cross" else None,
    )


def taken(source, steps=4, batch=5, **how):
    with Loader(source, batch, seed=3, **how) as loader:
        return list(itertools.islice(loader, steps))


@pytest.mark.parametrize(
    "gives,kind", [("nouns", NounBatch), ("masked", EntityBatch), ("cross", CrossEntityBatch)]
)
def test_ranks_workers_and_positions(made, gives, kind):
    source = made(gives)
    whole = taken(source)
    assert type(whole[0]) is kind is source.batch_type
    assert all(map(same, whole, taken(source, workers=2)))
    parts = [taken(source, rank=rank, ranks=2) for rank in range(2)]
    per_row = {name for name, x in vars(whole[0]).items() if isinstance(x, torch.Tensor)}
    for step, batch in enumerate(whole):
        for name in per_row:
            rows = [getattr(part[step], name) for part in parts]
            if (
                name.endswith("_ids") and rows[0].ndim > 1
            ):  # padding goes to the longest text of a rank
                rows = [
                    torch.nn.functional.pad(x, (0, getattr(batch, name).shape[-1] - x.shape[-1]))
                    for x in rows
                ]
            assert torch.equal(torch.cat(rows), getattr(batch, name)), name
    loader = Loader(source, 5, seed=3)
    next(iter(loader))
    later = Loader(source, 5, seed=3)
    later.load_state_dict(loader.state_dict())
    assert all(map(same, whole[1:], itertools.islice(later, 3)))
    one, other = source.sample(1, 4), pickle.loads(pickle.dumps(source)).sample(1, 4)
    assert all(torch.equal(x, other.rows[name]) for name, x in one.rows.items()) and torch.equal(
        one.image, other.image
    )


def test_partners_change_with_the_epoch():
    source = source_of(kind="entity_scenes", gives="cross", train_size=12)
    drawn = {}
    with Loader(source, 12, seed=0) as loader:
        for batch in itertools.islice(loader, 3):
            for picture, partner in zip(batch.image_ids.tolist(), batch.partner, strict=True):
                drawn.setdefault(picture, set()).add(partner.numpy().tobytes())
    assert sum(len(found) > 1 for found in drawn.values()) >= 6


def test_scenes_ask_for_what_their_captions_name():
    words = WordTokenizer()
    source = source_of(
        ModelInputs(48, 4, words), kind="entity_scenes", gives="cross", train_size=60
    )
    things = source.scenes.vocabulary.classes
    for i in range(60):
        sample = source.sample(i, 0)
        every = [
            caption
            for caption in source.scenes[i].captions
            if torch.equal(words(caption.text)[0], sample.token_ids[0])
        ]
        named = {things[k] for k in sample.rows["answer_entities"].nonzero().flatten().tolist()}
        assert named == every[0].entities and things[int(sample.rows["entity_ids"])] in named
        assert int((sample.rows["question_ids"] == 3).sum()) == len(
            named
        )  # [MASK] is the unknown word


@pytest.mark.parametrize(
    "name,options,objective,gives",
    [
        ("groupvit_tiny", {"multi_label": True}, {"multi_label": 1.0}, "nouns"),
        ("ovsegmentor_tiny", {"stage": 1}, {}, "masked"),
        ("ovsegmentor_tiny", {"stage": 2}, {}, "cross"),
    ],
)
def test_objectives_take_them(name, options, objective, gives):
    model = ovseg.create_model(name, **options).train()
    made = create_objective(model, None, **objective)
    source = source_of(
        ModelInputs.of(model), kind="entity_scenes", gives=gives, train_size=12, captions=2
    )
    assert issubclass(source.batch_type, made.batch_types)
    losses = made(taken(source, 1)[0], Progress(0, 10, 0, 0))
    losses["total"].backward()
    assert len(losses) == {"nouns": 3, "masked": 3, "cross": 4}[gives] and all(
        torch.isfinite(x) for x in losses.values()
    )


TSV = [
    "http://a\tTwo dogs\n",
    "http://b\ta street\n",
    "\n",
    "http://c\ta Dog\textra\n",
    "only one column\n",
    "http://d\ta dog in a car",
]


def test_cc4m_from_cc12m(tmp_path, capsys):
    source, out = tmp_path / "cc12m.tsv", tmp_path / "cc4m.tsv"
    source.write_text("".join(TSV))
    assert main(["data", "entities", str(source), "--out", str(out)]) == 3
    told = capsys.readouterr()
    assert out.read_text() == TSV[0] + TSV[3] + TSV[5] + "\n"
    assert "3 of 5 captions name one of 73 entities" in told.out and "dog 3, car 1" in told.out
    assert "cc12m.tsv:5: 1 columns; expected a caption in column 1" in told.err
    assert (
        main(["data", "entities", str(source), "--out", str(out), "--exact"]) == 3
        and out.read_text() == TSV[5] + "\n"
    )
    objects = [{"url": "a", "text": "a cat"}, {"url": "b", "text": "grass"}, {"url": "c"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(one) + "\n" for one in objects) + "[[\n")
    assert (
        main(
            [
                "data",
                "entities",
                str(tmp_path / "x.jsonl"),
                "--key",
                "text",
                "--out",
                str(tmp_path / "y.jsonl"),
            ]
        )
        == 3
    )
    assert [
        json.loads(line) for line in (tmp_path / "y.jsonl").read_text().splitlines()
    ] == objects[:1]
    assert len(capsys.readouterr().err.splitlines()) == 2 + 1


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["none.tsv", "--out", "y.tsv"], "does not exist; expected a .tsv or .jsonl file"),
        (["x.tsv", "--out", "x.tsv"], "is the file that is read"),
        (["x.tsv", "--out", "y.txt"], "expected two names that end in one of"),
        (["x.tsv", "--out", "y.tsv", "--column", "-1"], "--column is -1"),
        (["x.tsv", "--out", "y.tsv", "--column", "0"], "none of 2 captions"),
        (["x.tsv", "--out", "y.tsv", "--entities", "no"], "list of entities 'no'"),
    ],
)
def test_bad_lists_of_captions(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("x.tsv").write_text("http://a\ta dog\nhttp://b\ta cat\n")
    assert main(["data", "entities", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err and sorted(
        path.name for path in tmp_path.iterdir()
    ) == ["x.tsv"]


def test_lines_without_an_end_are_not_held(tmp_path):
    from ovseg.data.entity_index import filter_captions

    with (tmp_path / "x.tsv").open("wb") as file:
        file.write(b"u\ta dog\n" + b"u\ta dog " * 400_000 + b"\nu\ta cat\n" + b"\xff\xff\ta dog\n")
    found = filter_captions(tmp_path / "x.tsv", tmp_path / "y.tsv", EVERYDAY)
    assert (found.read, found.kept, len(found.bad)) == (4, 2, 2) and (
        tmp_path / "y.tsv"
    ).read_text() == "u\ta dog\nu\ta cat\n"


def test_index_of_others_is_refused(folder, index, tmp_path, capsys):
    def wanted(path=index, **more):
        return source_of(
            kind="entity_folder", root=str(folder), gives="cross", index=str(path), **more
        )

    wanted()
    (tmp_path / "list.yaml").write_text("dog:\ncat:\n")
    with pytest.raises(
        DataError,
        match=r"is of 73 other entities than the 2 of data.entities; expected ovseg data cross-pairs to be run",
    ):
        wanted(entities=str(tmp_path / "list.yaml"))
    tensors = load_file(index)
    save_file(
        tensors | {"members": tensors["members"] + 100},
        tmp_path / "far.safetensors",
        {"entities": json.dumps(EVERYDAY.names)},
    )
    (tmp_path / "cut.safetensors").write_bytes(index.read_bytes()[:200])
    for name, message in (
        ("far", "names pictures that are not there"),
        ("cut", "is damaged"),
        ("none", "does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            wanted(tmp_path / f"{name}.safetensors")
    (folder / "a" / "0.txt").write_text("nothing any more\n")
    batch = next(iter(Loader(wanted(), 5)))
    assert len(batch) == 5 and "and did when they were indexed" in batch.skipped[0]
    (folder / "a" / "0.png").rename(folder / "a" / "9.png")
    (folder / "a" / "0.txt").rename(folder / "a" / "9.txt")
    with pytest.raises(DataError, match="is of 6 pictures, and the folder holds 6, of other names"):
        wanted()
    (folder / "a" / "2.txt").write_bytes(b"\xff\xff")
    assert main(["data", "cross-pairs", str(folder), "--out", str(index)]) == 3
    assert "2.txt' is no UTF-8" in capsys.readouterr().err
    assert main(["data", "cross-pairs", str(folder), "--out", str(tmp_path / "x.npz")]) == 2


def test_nothing_shared(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dog\n")
    assert (
        main(["data", "cross-pairs", str(tmp_path), "--out", str(tmp_path / "x.safetensors")]) != 0
    )
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(InputError, match="is a folder"):
        from ovseg.data.entity_index import write_index

        write_index(["a"], [["a dog"]], EVERYDAY, tmp_path)
