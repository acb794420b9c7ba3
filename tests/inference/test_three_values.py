"""View, Queries and Decision: frozen, found by their names, replaced at any time; a rule of
labelling from a file of its own.
"""

from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

import ovseg
from ovseg.cli.main import main
from ovseg.data.labels import LabelSet
from ovseg.data.scenes import Scenes
from ovseg.errors import InputError
from ovseg.inference import Queries, View
from ovseg.inference import rules as decisions
from ovseg.inference.flat_options import option_names, route
from ovseg.inference.queries import EncodedQueries
from ovseg.inference.rules import rule, rule_names
from ovseg.inference.rules.groups import GroupTables
from ovseg.inference.rules.masks import ClassMasks
from ovseg.inference.rules.patches import PatchArgmax
from ovseg.inference.rules.units import SemanticUnits

LABELS = ["a red seven", "a blue zero", "gravel", "grass"]


@pytest.fixture(scope="module")
def model():
    return ovseg.create_model("pacl_tiny", "digits")


@pytest.fixture(scope="module")
def grouping():
    return ovseg.create_model("segclip_tiny", "digits")


@pytest.fixture(scope="module")
def picture():
    return Scenes("digits", "val", 1)[0].image


def test_values_are_frozen_and_found_by_name(model, grouping):
    assert rule_names() == ["groups", "masks", "patches", "units"]
    assert [rule(name) for name in rule_names()] == [
        GroupTables,
        ClassMasks,
        PatchArgmax,
        SemanticUnits,
    ]
    for value in (View(), Queries(), PatchArgmax(), GroupTables(), ClassMasks(), SemanticUnits()):
        with pytest.raises(FrozenInstanceError):
            setattr(value, fields(value)[0].name, 1)
    assert (
        type(ovseg.Predictor(model).decision) is PatchArgmax
        and type(ovseg.Predictor(grouping).decision) is GroupTables
    )
    with pytest.raises(
        InputError,
        match=r"decision is 'votes'; expected one of \['groups', 'masks', 'patches', 'units'\]",
    ):
        rule("votes")
    own = [option_names(value) for value in (View, Queries)]
    assert not set(own[0]) & set(own[1]) and all(
        not set(own[0] + own[1]) & set(option_names(rule(name))) for name in rule_names()
    )


def test_flat_options_go_to_the_value_that_has_them(model):
    options = {"crop": 24, "templates": ["{}"], "background": "sand", "background_threshold": 0.2}
    predictor = ovseg.Predictor(model, LABELS, view=View(stride=None, short_side=60), **options)
    assert predictor.view == View(short_side=60, crop=24)
    assert predictor.queries == Queries(LabelSet.of(LABELS), ("{}",), background=("sand",))
    assert predictor.decision == PatchArgmax(background_threshold=0.2)
    again = ovseg.Predictor(
        model, predictor.queries, view=predictor.view, decision=predictor.decision
    )
    assert (again.view, again.queries, again.decision) == (
        predictor.view,
        predictor.queries,
        predictor.decision,
    )
    assert route({}, *(View(), Queries(), GroupTables())) == (View(), Queries(), GroupTables())


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"refine": "pamr"},
            "refine is 'pamr', an option of the rule of labelling patches and units; this model "
            "labels by groups, whose options are",
        ),
        ({"top_class": 3}, "unknown option 'top_class'; did you mean 'top_classes'"),
        ({"labels_file": "x"}, "unknown option 'labels_file'"),
        (
            {"background_threshold": 1.5},
            r"background_threshold is 1\.5; expected what group tables hold, 0 \.\. 1",
        ),
        ({"background_threshold": -0.1}, "expected what group tables hold"),
        ({"top_classes": 0}, "top_classes is 0; expected a positive integer"),
    ],
)
@pytest.mark.bad_input("inference", "an option that the rule of labelling does not have")
def test_what_the_rule_of_groups_refuses(grouping, options, message):
    with pytest.raises(InputError, match=message):
        ovseg.Predictor(grouping, LABELS, **options)


@pytest.mark.bad_input("inference", "an option that the rule of labelling does not have")
def test_the_rule_of_patches_has_no_top_classes(model):
    with pytest.raises(
        InputError,
        match="top_classes is 3, an option of the rule of labelling groups; this model labels by "
        "patches",
    ):
        ovseg.Predictor(model, LABELS, top_classes=3)


def test_embeddings_follow_the_queries(model, picture):
    """Changed templates, label sets with templates of their own, or templates of the model: nothing
    stale is asked.
    """
    predictor = ovseg.Predictor(model, LABELS).set_image(picture)
    before = predictor.predict()
    predictor.queries = replace(predictor.queries, templates=("the {} there",))
    changed = predictor.predict()
    assert not np.array_equal(changed.scores, before.scores)
    expected = (
        ovseg.Predictor(model, LABELS, templates=("the {} there",)).set_image(picture).predict()
    )
    assert np.array_equal(changed.scores, expected.scores)
    predictor.queries = replace(predictor.queries, templates=None)
    assert np.array_equal(predictor.predict().scores, before.scores)
    of_labels = LabelSet(tuple(LABELS), tuple((label,) for label in LABELS), ("the {} there",))
    assert np.array_equal(predictor.predict(of_labels).scores, expected.scores)
    other = ovseg.create_model("pacl_tiny", "digits")
    predictor = ovseg.Predictor(other, LABELS).set_image(picture)
    assert np.array_equal(predictor.predict().scores, before.scores)
    other.templates = ("the {} there",)
    assert np.array_equal(predictor.predict().scores, expected.scores)


def test_embeddings_are_remembered_and_bounded(model, picture, monkeypatch):
    asked = []
    real = EncodedQueries.encode
    monkeypatch.setattr(
        EncodedQueries, "encode", lambda *arguments: asked.append(1) or real(*arguments)
    )
    predictor = ovseg.Predictor(model, LABELS).set_image(picture)
    for labels in (LABELS, LABELS[:2], LABELS, LABELS[:2]):
        predictor.predict(labels)
    assert len(asked) == 2
    for i in range(70):
        predictor.set_labels([f"label {i}", "grass"])
    assert len(predictor._encoded) == 64
    predictor.predict(LABELS)
    assert len(asked) == 73  # the first set had been forgotten


def test_another_decision_or_view_acts_on_the_current_picture(model, picture):
    predictor = ovseg.Predictor(model, LABELS).set_image(picture)
    predictor.predict()
    predictor.decision = replace(predictor.decision, background_threshold=0.4)
    expected = ovseg.segment(picture, LABELS, model=model, background_threshold=0.4)
    assert (
        np.array_equal(predictor.predict().labels, expected.labels)
        and (expected.labels == -1).any()
    )
    predictor.view = View(crop=24)
    expected = ovseg.segment(picture, LABELS, model=model, background_threshold=0.4, crop=24)
    assert np.array_equal(predictor.predict().labels, expected.labels)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop": 24},
        {"scale": 40.0, "activation": "softmax", "crop": 24, "background_threshold": 0.2},
        {"background": ("brick",)},
        {"refine": "pamr"},
        {"area_threshold": 0.1},
    ],
)
def test_allowed_is_the_argmax_among_the_allowed(model, picture, options):
    """Scores and probabilities stay those among all labels; a bias that nothing can overcome gives
    the same.
    """
    predictor = ovseg.Predictor(model, LABELS, **options).set_image(picture)
    found = predictor.predict(allowed=["a blue zero", "gravel"])
    bias = {"a red seven": -1e4, "grass": -1e4}
    expected = ovseg.Predictor(model, LABELS, bias=bias, **options).set_image(picture).predict()
    assert np.array_equal(found.labels, expected.labels) and set(np.unique(found.labels)) <= {
        -1,
        1,
        2,
    }
    assert len(np.unique(found.labels)) > 1 or "area_threshold" in options
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
    assert np.array_equal(
        predictor.predict().labels, ovseg.segment(picture, LABELS, model=model, **options).labels
    )  # this once only


@pytest.mark.bad_input("inference", "labels that are not asked for")
def test_allowed_none_at_all_and_unknown(model, grouping, picture):
    for one in (model, grouping):
        predictor = ovseg.Predictor(one, LABELS).set_image(picture)
        assert (predictor.predict(allowed=[]).labels == -1).all()
        assert set(np.unique(predictor.predict(allowed=LABELS[2:]).labels)) <= {2, 3}
        assert (predictor.predict(allowed="grass").labels == 3).all()
        with pytest.raises(InputError, match="allowed names 'cat'; expected some of the labels"):
            predictor.predict(allowed=["cat"])
    only = (
        ovseg.Predictor(grouping, LABELS, background_threshold=0.9)
        .set_image(picture)
        .predict(allowed=["grass"])
    )
    assert set(np.unique(only.labels)) <= {-1, 3}


RULE = '''
from dataclasses import dataclass
import torch
import ovseg_kernels as ok
from ovseg.inference.rules import Decision
from ovseg.bounds import bounded

@dataclass(frozen=True)
class Lowered(Decision):
    """Mask logits of each class, [n, C, h, w]: sigmoid in the windows, seen classes lowered at the end."""
    lowered: float = bounded(0.0, help="taken off the masks of seen classes")
    seen: tuple[str, ...] = ()

    def label_map(self, model, features, queries, placement, *, allowed=None, picture=None):
        masks = model.segment_logits(features, queries.texts)
        offsets = queries.offsets({name: -self.lowered for name in self.seen}, allowed, torch.float32)
        origins, *sizes = placement.windows
        return ok.window_argmax(masks, origins.to(masks.device), *sizes, activation="sigmoid", stage="window", bias=offsets,
                                class_labels=queries.owners, label_type=torch.int16, return_value=True)

    def describe(self):
        return {"scores": "sigmoid of masks"}

Rule = Lowered
'''


@pytest.fixture
def throw_away_rule(tmp_path, monkeypatch):
    """A file beside the rules, and a model that names it."""
    import sys

    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "lowered.py").write_text(RULE)
    monkeypatch.setattr(decisions, "__path__", [*decisions.__path__, str(tmp_path / "rules")])
    model = ovseg.create_model("pacl_tiny", "digits")
    model.decision = "lowered"
    yield model
    sys.modules.pop("ovseg.inference.rules.lowered", None)


def test_a_new_rule_is_one_file(throw_away_rule, picture, tmp_path, capsys):
    """Predictor, its options and errors, protocols, evaluation and the command line take it as it
    is. Its arithmetic is ZegCLIP's.
    """
    from ovseg.evaluation.evaluate import evaluate
    from ovseg.evaluation.protocols import protocol
    from ovseg.evaluation.scenes import SceneSet

    model = throw_away_rule
    assert rule_names() == ["groups", "lowered", "masks", "patches", "units"]
    options = {"crop": 24, "lowered": 0.02, "seen": ("gravel", "grass")}
    found = ovseg.segment(picture, LABELS, model=model, **options)
    model.decision = "patches"
    bias = {"gravel": -0.02, "grass": -0.02}
    expected = ovseg.segment(
        picture, LABELS, model=model, crop=24, activation="sigmoid", stage="window", bias=bias
    )
    assert np.array_equal(found.labels, expected.labels) and len(np.unique(found.labels)) > 1
    with pytest.raises(
        InputError,
        match="lowered is 1, an option of the rule of labelling lowered; this model labels by "
        "patches",
    ):
        ovseg.Predictor(model, lowered=1)
    model.decision = "lowered"
    data = SceneSet("digits", 2)
    chosen = protocol("plain", data.description, model, lowered=0.1)
    assert (
        chosen.choices(model, data.description)["settings"]["lowered"] == 0.1
        and chosen.label == "plain v1*"
    )
    assert evaluate(model, data, chosen).pictures == 2
    with pytest.raises(SystemExit):
        main(["segment", "--help"])
    assert (
        "--lowered LOWERED" in (printed := capsys.readouterr().out)
        and "taken off the masks of seen classes" in printed
    )
