"""What a call goes by is its own: labels, views and weights of other calls, threads and generators
change nothing in it.
"""

import copy
import itertools
import logging
import pickle
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import ovseg
from ovseg.cli.main import main
from ovseg.errors import CheckpointError, InputError
from ovseg.inference import PatchArgmax, Queries, View
from ovseg.inference.queries import EncodedQueries

LABELS = ["a red seven", "a blue zero", "gravel", "grass"]
SETS = [
    LABELS,
    LABELS[::-1],
    LABELS[1:3],
    ["grass", "sand", "water"],
    ["gravel"],
    ["a red seven", "water"],
]
pytestmark = pytest.mark.third_trial(3)


def picture(seed, side=8):
    return np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)


@pytest.fixture(scope="module")
def trained():
    return ovseg.create_model("pacl_tiny", "digits")


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


def same(found, expected):
    return (
        found.names == expected.names
        and np.array_equal(found.labels, expected.labels)
        and np.array_equal(found.scores, expected.scores)
    )


def test_eight_threads_and_four_generators_on_one_predictor(trained):
    """2 000 answers, each compared with what one thread alone gets."""
    predictor = ovseg.Predictor(trained, LABELS, short_side=8)
    pictures = [picture(seed) for seed in range(6)]
    expected = {
        (i, j): ovseg.Predictor(trained, labels, short_side=8).predict_batch([one])[0]
        for i, one in enumerate(pictures)
        for j, labels in enumerate(SETS)
    }
    wrong, start = [], threading.Barrier(12)

    def calls(number):
        start.wait()
        for k in range(200):
            i, j = (k + number) % len(pictures), (k * 5 + number) % len(SETS)
            one = predictor.predict_batch([pictures[i]], SETS[j])[0]
            wrong.extend([] if same(one, expected[i, j]) else [(number, i, j)])

    def generator(number):
        start.wait()
        for k in range(10):
            j = (k + number) % len(SETS)
            answers = predictor.stream(pictures + pictures[:4], SETS[j], batch=1)
            wrong.extend(
                (number, i, j)
                for i, (_, one) in enumerate(answers)
                if not same(one, expected[i % 6, j])
            )

    def guarded(target, number):
        try:
            target(number)
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=guarded, args=(calls, i)) for i in range(8)]
    threads += [threading.Thread(target=guarded, args=(generator, i)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and predictor.queries.labels.names == tuple(LABELS)


def test_the_labels_of_a_call_are_its_own(trained):
    predictor = ovseg.Predictor(trained, LABELS).set_image(picture(0))
    before, queries = predictor.predict(), predictor.queries
    other = Queries(ovseg.inference.predictor.LabelSet.of(["sand", "water"]), background=("grass",))
    for ask in (
        lambda x: predictor.predict(x),
        lambda x: predictor.predict_batch([picture(1)], x),
        lambda x: predictor.classify(x),
        lambda x: list(predictor.stream([picture(1)], x)),
    ):
        for labels in (["sand"], other, "water"):
            ask(labels)
            assert predictor.queries is queries and same(predictor.predict(), before)
    assert predictor.predict(allowed=["grass"]).labels.min() == 3 and same(
        predictor.predict(), before
    )


@pytest.mark.parametrize(
    "ask",
    [
        lambda p: p.predict(["sand", " "]),
        lambda p: p.predict_batch([picture(1)], ["!?"]),
        lambda p: p.classify([]),
        lambda p: p.predict_batch([b"junk"], ["sand"]),
        lambda p: p.predict_batch([picture(1)], ["sand"], allowed=["cat"]),
        lambda p: p.predict(["sand"], allowed=["cat"]),
        lambda p: p.stream([picture(1)], ["!?"]),
        lambda p: p.set_labels(["sand", "!?"]),
        lambda p: p.set_labels(Queries(background=("grass",))),
        lambda p: p.set_image(b"junk"),
        lambda p: p.set_image(None),
    ],
)
def test_a_failed_call_leaves_everything_as_it_was(trained, ask):
    predictor = ovseg.Predictor(trained, LABELS).set_image(picture(0))
    before, queries = predictor.predict(), predictor.queries
    with pytest.raises(InputError):
        ask(predictor)
    assert predictor.queries is queries and same(predictor.predict(), before)


def test_a_generator_goes_by_what_was_set_when_it_was_called(trained):
    pictures = [picture(seed, 24) for seed in range(4)]
    expected = [one for _, one in ovseg.Predictor(trained, LABELS).stream(pictures, batch=1)]
    predictor = ovseg.Predictor(trained, LABELS)
    found, others = predictor.stream(pictures, batch=1), []
    for i in range(4):
        if i == 1:
            predictor.set_labels(["sand"])
            predictor.view = View(crop=12)
            predictor.decision = PatchArgmax(background_threshold=0.9)
        others.append(predictor.predict_batch([pictures[i]])[0].names)
        assert same(next(found)[1], expected[i])
    assert others == [LABELS, ["sand"], ["sand"], ["sand"]]


def test_generators_in_turn(trained):
    pictures = [picture(seed) for seed in range(3)]
    predictor = ovseg.Predictor(trained, LABELS)
    expected = [[one for _, one in predictor.stream(pictures, labels)] for labels in SETS[:4]]
    running = [predictor.stream(pictures, labels, batch=1) for labels in SETS[:4]]
    for i, j in itertools.product(range(3), range(4)):
        assert same(next(running[j])[1], expected[j][i])


def test_two_threads_encode_the_same_labels_once(model, monkeypatch):
    asked, real, start = [], EncodedQueries.encode, threading.Barrier(4)
    monkeypatch.setattr(
        EncodedQueries, "encode", lambda *arguments: asked.append(1) or real(*arguments)
    )
    predictor = ovseg.Predictor(model)

    def ask():
        start.wait()
        predictor.predict_batch([picture(0)], LABELS)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [1]


def step(model, **options):
    for parameter in model.parameters():
        parameter.requires_grad_(True).grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.05, **options).step()


def weaker(model):
    return {name: 0.7 * x + 0.01 for name, x in model.state_dict().items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict(weaker(m)),
        lambda m: m.load_state_dict(weaker(m), assign=True),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: step(m),
        lambda m: step(m, fused=True),
        lambda m: step(m, foreach=True),
        lambda m: [p.data.mul_(0.7).add_(0.01) for p in m.parameters()],
        lambda m: [setattr(p, "data", 0.7 * p.data + 0.01) for p in m.parameters()],
        lambda m: torch.nn.utils.vector_to_parameters(
            0.7 * torch.nn.utils.parameters_to_vector(m.parameters()) + 0.01, m.parameters()
        ),
    ],
)
def test_nothing_of_earlier_weights_is_remembered(model, change):
    """Neither the embeddings of texts nor the features of the current picture."""
    predictor = ovseg.Predictor(model, LABELS).set_image(picture(0, 24))
    before = predictor.predict()
    with torch.no_grad():
        change(model)
    fresh = ovseg.Predictor(model, LABELS).set_image(picture(0, 24))
    assert same(predictor.predict(), fresh.predict()) and not np.array_equal(
        predictor.predict().scores, before.scores
    )
    assert predictor.classify() == fresh.classify()


def test_the_readout_and_the_mode_of_the_caller_count_too():
    model = ovseg.create_model("clip_dense_tiny", "digits")
    predictor = ovseg.Predictor(model, LABELS).set_image(picture(0, 24))
    before = predictor.predict()
    model.set_readout("naclip")
    changed = predictor.predict()
    assert not same(changed, before) and same(
        changed, ovseg.Predictor(model, LABELS).set_image(picture(0, 24)).predict()
    )
    with torch.autocast("cpu", torch.bfloat16):
        predictor.predict()
    assert same(predictor.predict(), changed)
    with torch.inference_mode():
        made = ovseg.create_model("clip_dense_tiny", "digits")
        predictor = ovseg.Predictor(made, LABELS).set_image(picture(0, 24))
        assert same(predictor.predict(), before)
        made.load_state_dict(weaker(made))
        fresh = ovseg.Predictor(made, LABELS).set_image(picture(0, 24)).predict()
        assert same(predictor.predict(), fresh) and not same(fresh, before)


def test_a_file_of_embeddings_is_read_again_when_it_has_changed(trained, tmp_path):
    rows = trained.encode_labels(LABELS).numpy()
    np.save(tmp_path / "e.npy", rows)
    predictor = ovseg.Predictor(trained, LABELS, embeddings=str(tmp_path / "e.npy")).set_image(
        picture(0, 24)
    )
    before = predictor.predict()
    np.save(tmp_path / "e.npy", rows[::-1])
    assert np.array_equal(predictor.predict().labels, 3 - before.labels)
    (tmp_path / "e.npy").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        predictor.predict()


def test_the_hash_of_a_text_tower_knows_its_weights(model, monkeypatch, tmp_path):
    """What is remembered on disk is found by it."""
    from ovseg.inference import queries as text_cache

    monkeypatch.setenv("OVSEG_CACHE", str(tmp_path))
    monkeypatch.setattr(text_cache, "_FEW", 1)
    first = ovseg.Predictor(model, LABELS)._asked().texts
    assert len(list((tmp_path / "texts").iterdir())) == 1
    step(model, fused=True)
    second = ovseg.Predictor(model, LABELS)._asked().texts
    assert not torch.equal(first, second) and torch.equal(second, model.encode_labels(LABELS))
    assert len(list((tmp_path / "texts").iterdir())) == 2
    pickle.dumps(model)


def test_a_picture_that_another_model_saw_is_seen_again(trained, model):
    with torch.no_grad():
        model.load_state_dict(weaker(model))
    seen = ovseg.Predictor(trained).see([picture(0, 24)])[0]
    expected = ovseg.Predictor(model, LABELS).set_image(picture(0, 24)).predict()
    assert same(ovseg.Predictor(model, LABELS).set_image(seen).predict(), expected)
    prepared = ovseg.Predictor(trained, short_side=12).prepare(picture(0, 24))
    assert same(
        ovseg.Predictor(model, LABELS).set_image(prepared).predict(), expected
    )  # and prepared again for another view


def test_a_predictor_can_be_copied_and_pickled(trained):
    predictor = ovseg.Predictor(trained, LABELS).set_image(picture(0, 24))
    for again in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert same(again.predict(), predictor.predict())


@pytest.mark.third_trial(9)
@pytest.mark.parametrize("name", ["ovsegmentor_tiny", "mgca_tiny", "zegclip_tiny"])
def test_a_model_in_train_mode_is_put_into_eval_mode(name, caplog):
    model = ovseg.create_model(name)
    expected = ovseg.Predictor(model, LABELS).set_image(picture(0, 48)).predict()
    for part in (model, next(iter(model.children()))):
        model.eval()
        predictor = ovseg.Predictor(model, LABELS)
        part.train()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ovseg"):
            assert same(predictor.set_image(picture(0, 48)).predict(), expected)
            part.train()
            assert same(next(predictor.stream([picture(0, 48)]))[1], expected)
            part.train()
            assert same(ovseg.segment(picture(0, 48), LABELS, model=model), expected)
        told = [record.message for record in caplog.records if "train mode" in record.message]
        assert (
            len(told) == 3
            and name in told[0]
            and not any(module.training for module in model.modules())
        )


@pytest.mark.third_trial(9)
@pytest.mark.parametrize(
    "name,options",
    [
        ("pacl_tiny", {}),
        ("pacl_tiny", {"refine": "pamr"}),
        ("pacl_tiny", {"crop": 12, "scale": 40.0, "activation": "softmax"}),
        ("segclip_tiny", {}),
        ("zegclip_tiny", {}),
        ("mgca_tiny", {}),
    ],
)
def test_weights_that_are_no_numbers_are_named(name, options):
    model = ovseg.create_model(name)
    place, tensor = next(
        (key, x)
        for key, x in reversed(list(model.backbone.named_parameters()))
        if "text" in key and x.ndim == 2
    )
    predictor = ovseg.Predictor(model, LABELS, **options)
    with torch.no_grad():
        tensor[0] = float("nan")
    message = f"{name}.*its tensor backbone.{place} holds NaN or an infinity in [1-9]"
    for ask in (
        lambda: predictor.set_image(picture(0, 24)).predict(),
        lambda: predictor.predict_batch([picture(0, 24)]),
        lambda: predictor.classify(),
        lambda: next(predictor.stream([picture(0, 24)])),
        lambda: ovseg.segment(picture(0, 24), LABELS, model=model, **options),
    ):
        with pytest.raises(CheckpointError, match=message):
            ask()


@pytest.mark.third_trial(9)
def test_the_command_names_them_and_ends_with_1(model, tmp_path, capsys):
    with torch.no_grad():
        next(model.embedder.parameters()).fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    Image.fromarray(picture(0, 24)).save(tmp_path / "a.png")
    line = [
        "segment",
        str(tmp_path / "a.png"),
        "--labels",
        "grass,sand",
        "-m",
        str(tmp_path / "model"),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(line) == 1
    assert "embedder." in capsys.readouterr().err and not list(tmp_path.glob("out/*.png"))


@pytest.mark.third_trial(9)
def test_numbers_that_grow_too_large_for_finite_weights_are_said_to(model):
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(1e38)
    with pytest.raises(
        FloatingPointError, match="its weights are finite: numbers on the way exceed float32"
    ):
        ovseg.Predictor(model, LABELS).set_image(picture(0, 24)).predict()


ONE = {
    "an array": picture(0, 48),
    "an array of many": np.stack([picture(0), picture(1)]),
    "a string": "a.jpg",
    "bytes": b"abc",
    "a picture": Image.new("RGB", (8, 8)),
    "nothing": None,
    "a tensor": torch.zeros(3, 8, 8),
    "a number": 3,
    "a mapping": {"a": picture(0)},
}


@pytest.mark.third_trial(9)
@pytest.mark.parametrize("kind", ONE)
def test_one_picture_is_no_list_of_pictures(trained, kind):
    predictor = ovseg.Predictor(trained, LABELS)
    for name, ask in (
        ("images", predictor.predict_batch),
        ("images", predictor.see),
        ("sources", predictor.stream),
    ):
        with pytest.raises(
            InputError,
            match=rf"^{name} (is|has shape) .*expected (a list of pictures or a tensor )?\[B, 3, H, W\]",
        ):
            ask(ONE[kind])


@pytest.mark.third_trial(9)
@pytest.mark.parametrize("batch", [0, -1, True, 2.0, float("nan"), "2"])
def test_a_batch_that_is_no_number_of_pictures(trained, batch):
    with pytest.raises(InputError, match=r"^batch is .*; expected a positive integer"):
        ovseg.Predictor(trained, LABELS).stream([picture(0)], batch=batch)


@pytest.mark.third_trial(9)
@pytest.mark.parametrize(
    "templates,message",
    [
        ([], "templates is empty"),
        ((), "templates is empty"),
        ("", "templates is ''"),
        ("a photo of {}", "expected one of"),
        ([""], "holds 0"),
        ({}, "templates is a dict"),
        (0, "templates is a int"),
        ([None], r"templates\[0\] is a NoneType"),
    ],
)
def test_templates_that_are_none(trained, templates, message):
    for ask in (
        lambda: ovseg.Predictor(trained, LABELS, templates=templates),
        lambda: trained.encode_labels(LABELS, templates),
        lambda: ovseg.segment(picture(0), LABELS, model=trained, templates=templates),
        lambda: Queries(templates=templates),
    ):
        with pytest.raises(InputError, match=message):
            ask()
    with pytest.raises(InputError, match="templates is empty"):
        ovseg.Predictor(trained, ovseg.inference.predictor.LabelSet(("grass",), (("grass",),), ()))


@pytest.mark.third_trial(11)
def test_a_wrapped_model_is_taken_for_the_bare_one(trained, tmp_path):
    """It is unwrapped before it is looked at: a wrapper has no methods of a model."""
    wrapped = torch.nn.DataParallel(trained)
    predictor = ovseg.Predictor(wrapped, LABELS)
    expected = ovseg.Predictor(trained, LABELS).set_image(picture(0)).predict()
    assert same(predictor.set_image(picture(0)).predict(), expected)
    again = ovseg.from_pretrained(ovseg.save_pretrained(wrapped, tmp_path / "model"))
    assert same(ovseg.Predictor(again, LABELS).set_image(picture(0)).predict(), expected)
