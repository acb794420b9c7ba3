"""Extension points: what a registry finds, what callers add, and what is said of a name that is
none.
"""

import sys
from pathlib import Path

import pytest

import ovseg
from ovseg.data.benchmark_sets import SETS
from ovseg.data.entities import ENTITY_LISTS
from ovseg.data.sources import SOURCES
from ovseg.errors import ConfigError, InputError
from ovseg.evaluation.protocols import PROTOCOLS
from ovseg.inference.rules import RULES
from ovseg.nn.readout import READOUTS
from ovseg.registration import Registry, folders, modules, named, table, yaml_files
from ovseg.systems import registry
from ovseg.systems.backbones import BACKBONES, TEXTS
from ovseg.systems.objective import OBJECTIVES
from ovseg.training.recipe import RECIPES

ALL = {
    "systems": registry.SYSTEMS,
    "models": registry.MODELS,
    "objectives": OBJECTIVES,
    "sources": SOURCES,
    "rules": RULES,
    "readouts": READOUTS,
    "backbones": BACKBONES,
    "texts": TEXTS,
    "recipes": RECIPES,
    "protocols": PROTOCOLS,
    "sets": SETS,
    "entity lists": ENTITY_LISTS,
}


@pytest.mark.parametrize("known", ALL.values(), ids=ALL)
def test_every_extension_point(known):
    """One way for all: names in order, loaded when asked for, one sentence for a name that does not
    exist, additions that go again.
    """
    names = list(known)
    assert names == sorted(names) and len(known) == len(names) > 0
    assert all(name in known for name in names) and None not in known and "nothing" not in known
    with pytest.raises(
        known.error, match=rf"{known.what} is '{names[0]}x'; expected one of .* \(did you mean '"
    ):
        known[f"{names[0]}x"]
    entry = object()
    try:
        assert known.register("throw_away", entry) is entry
        assert known["throw_away"] is entry and set(known) == {*names, "throw_away"}
        with pytest.raises(
            ValueError, match="'throw_away' is registered already; pass override=True to replace it"
        ):
            known.register("throw_away", None)
        known.register("throw_away", None, override=True)
        assert known["throw_away"] is None
    finally:
        known.unregister("throw_away")
    assert list(known) == names


def test_what_the_package_holds_is_back_when_an_override_goes():
    own = READOUTS["clip"]
    with pytest.raises(ValueError, match="readout 'clip' is registered already"):
        READOUTS.register("clip", None)
    READOUTS.register("clip", None, override=True)
    assert READOUTS["clip"] is None and list(READOUTS).count("clip") == 1
    READOUTS.unregister("clip")
    assert READOUTS["clip"] == own


@pytest.mark.bad_input("models", "an entry of a registry that does not exist")
@pytest.mark.parametrize(
    "name,message",
    [
        (
            "thinn",
            r"kind is 'thinn'; expected one of \['thick', 'thin'\] \(did you mean 'thin'\?\)",
        ),
        ("other", r"kind is 'other'; expected one of \['thick', 'thin'\]$"),
        (None, "kind is None"),
        ({}, r"kind is \{\}"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(InputError, match=message):
        Registry("kind", lambda: table({"thin": 1, "thick": 2}), InputError)[name]
    with pytest.raises(ConfigError):
        Registry("kind", lambda: table({}))[name]


def test_nothing_is_imported_before_it_is_asked_for(tmp_path, monkeypatch):
    package = tmp_path / "found_late"
    (package / "inner").mkdir(parents=True)
    for file in ("__init__.py", "base.py", "inner/__init__.py"):
        (package / file).write_text("")
    (package / "one.py").write_text("Rule = 'of one'")
    (package / "broken.py").write_text("raise ImportError('a library is missing')")
    (package / "a.yaml").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        rules = Registry("rule", lambda: modules("found_late", "Rule"))
        assert list(rules) == ["broken", "one"] and "found_late.one" not in sys.modules
        assert rules["one"] == "of one" and "found_late.broken" not in sys.modules
        with pytest.raises(ImportError, match="a library is missing"):
            rules["broken"]
        assert list(Registry("folder", lambda: folders("found_late"))) == ["inner"]
        places = Registry(
            "place", lambda: named({"rule": "found_late.one:Rule", "gone": "found_late.gone:Rule"})
        )
        assert list(places) == ["gone", "rule"] and places["rule"] == "of one"
        files = Registry("file", lambda: yaml_files(package, tmp_path / "nowhere"))
        assert files["a"] == package / "a.yaml" and isinstance(files["a"], Path)
        (package / "late.py").write_text("Rule = 'of later'")  # the folder is looked at anew
        assert rules["late"] == "of later"
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "found_late"]:
            del sys.modules[name]


def test_registered_models():
    @ovseg.register_model("throw_away")
    def build(temperature=0.5):
        return ovseg.create_model("pacl_tiny", temperature=temperature)

    try:
        assert "throw_away" in ovseg.list_models() and callable(registry.MODELS["throw_away"])
        assert ovseg.create_model("throw_away", temperature=0.25).temperature == 0.25
        with pytest.raises(ValueError, match="model 'throw_away' is registered already"):
            ovseg.register_model("throw_away")(build)
        ovseg.register_model("throw_away", override=True)(
            lambda: ovseg.create_model("clip_dense_tiny")
        )
        assert ovseg.create_model("throw_away").objective == "clip_dense"
    finally:
        registry.MODELS.unregister("throw_away")
    assert "throw_away" not in ovseg.list_models()
