"""Recipes: every shipped one loads; typos and wrong values are named."""

import re
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest

from ovseg.data.benchmark_sets import describe
from ovseg.data.entities import load_entities
from ovseg.data.labels import LabelSet
from ovseg.errors import ConfigError, DataError, InputError
from ovseg.evaluation.protocols import read_protocol
from ovseg.training.recipe import Recipe, list_recipes, load_recipe, save_recipe, stages_of


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes(name, tmp_path):
    recipe = load_recipe(name, ["optim.lr=0.5", "train.seed=7"])
    assert recipe.optim.lr == 0.5 and recipe.train.seed == 7
    save_recipe(recipe, tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.bad_input("training", "an override that cannot be followed")
@pytest.mark.parametrize(
    "overrides,message",
    [
        (["optim.lrr=1"], r"optim\.lrr: unknown key, did you mean optim\.lr\?"),
        (["modle.name=x"], r"modle: unknown key, did you mean model\?"),
        (["optim.zzz=1"], r"optim\.zzz: unknown key, expected one of"),
        (["optim.lr=fast"], r"optim\.lr: Value 'fast'"),
        (["train.steps=0"], r"train\.steps is 0; expected a positive number"),
        (["train.precision=fp8"], r"train\.precision is 'fp8'; expected one of"),
        (["optim"], r"override 'optim'; expected key=value"),
        (["optim=3"], r"optim is 3; expected a mapping"),
        (["optim.warmup_steps=-1"], r"optim\.warmup_steps: unknown key"),
        (
            ["init.backbone="],
            r"override 'init\.backbone=' has no value; expected key=value, or init\.backbone=null for none",
        ),
        (["model.name="], r"override 'model\.name=' has no value"),
        (["stages[0].train.steps=5"], r"stages is \{'0': .*\}; expected a list"),
        (["stages=[1]"], r"stages\[0\] is 1; expected a mapping"),
        (["stages=3"], r"stages: "),
        (["init=[1]"], r"init is \[1\]; expected a mapping"),
        (["optim.betas={a: 1}"], r"optim\.betas is \{'a': 1\}; expected a list"),
        (["model.options=[1]"], r"override 'model\.options=\[1\]' does not fit the recipe"),
        (["optim.lr={a"], r"override 'optim\.lr=\{a' is no YAML"),
        (["optim.lr.x=1"], r"optim\.lr: Value"),
    ],
)
def test_bad_overrides(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("pacl_scenes", overrides)


@pytest.mark.third_trial(15)
@pytest.mark.parametrize(
    "override,message",
    [
        (
            "wandb=true",
            r"^wandb: unknown key, expected one of \['checkpoint', 'data', .*'validation'\]$",
        ),
        ("optim.lrr=1", r"did you mean optim\.lr\? Expected one of \['betas', .*'weight_decay'\]$"),
        ("data.sizes=3", r"^data\.sizes: unknown key, expected one of \['captions', "),
        ("train.name=x", r"^train\.name: unknown key, expected one of"),
    ],
)
def test_only_what_is_close_is_suggested(override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("pacl_scenes", [override])


@pytest.mark.third_trial(15)
@pytest.mark.parametrize(
    "text", ["model: [unclosed", "a: 1\nb: {c: 1\nd: 2\n", "a: 'x\n", "\ta: 1\n", "a: *b\n"]
)
def test_yaml_errors_are_one_line(tmp_path, text):
    """In a recipe, a label file, a protocol, a description of a set, a list of entities."""
    path = tmp_path / "bad.yaml"
    path.write_text(text)

    def override(_):
        return load_recipe("pacl_scenes", [f"data={text}"])

    for read in (load_recipe, LabelSet.read, read_protocol, describe, load_entities, override):
        with pytest.raises(
            (ConfigError, InputError, DataError), match=r"no YAML: line \d, column \d+: \w+"
        ) as caught:
            read(str(path))
        assert len(str(caught.value).splitlines()) == 1, read


def test_overrides_of_a_stage():
    """By its number, the rest of it as it was; mappings are laid over each other, lists replaced."""
    given = [
        "stages[0].train.steps=5",
        "stages[1].model={options: {backbone: {pool: max}}}",
        "train.batch_size=7",
        "optim.betas[0]=0.5",
    ]
    found = load_recipe("ovsegmentor_scenes", given)
    first, second = stages_of(found)
    assert (first.train.steps, first.train.batch_size, first.model.options) == (5, 7, {"stage": 1})
    assert (second.train.steps, second.train.batch_size, second.optim.lr) == (100, 7, 2e-4)
    assert second.model.options == {
        "stage": 2,
        "backbone": {"pool": "max"},
    } and found.optim.betas == (0.5, 0.98)
    assert len(stages_of(load_recipe("ovsegmentor_scenes", ["stages=[]"]))) == 1
    for key in ("stages[2].train.steps", "stages.x"):
        with pytest.raises(
            ConfigError, match=re.escape(f"override '{key}=5' does not fit the recipe")
        ):
            load_recipe("ovsegmentor_scenes", [f"{key}=5"])


OUT_OF_RANGE = [
    ("train.seed", "-1", "expected 0 to 9223372036854775807"),
    ("train.seed", str(2**63), "expected 0 to"),
    ("optim.betas", "[2,3]", "expected two decays of 0 to below 1"),
    ("optim.betas", "[0.9,1]", "expected two decays"),
    ("optim.betas", "[-0.1,0.9]", "expected two decays"),
    ("optim.lr", "0", "expected a positive number"),
    ("optim.lr", "-1", "expected a positive number"),
    ("optim.eps", "0", "expected a positive number"),
    ("optim.eps", "-1e-8", "expected a positive number"),
    ("optim.weight_decay", "-0.1", "expected 0 or more"),
    ("optim.momentum", "1", "expected 0 to below 1"),
    ("optim.momentum", "-0.5", "expected 0 to below 1"),
    ("optim.lower_lr", "-1", "expected a positive number"),
    ("optim.clip_grad", "0", "expected a positive number"),
    ("schedule.warmup_steps", "-1", "expected 0 or more"),
    ("schedule.warmup_share", "2", "expected a share between 0 and 1"),
    ("schedule.warmup_start", "-1", "expected a share of 0 to 1"),
    ("schedule.min_lr", "-1", "expected 0 to optim.lr"),
    ("schedule.min_lr", "9", "expected 0 to optim.lr"),
    ("schedule.power", "0", "expected a positive number"),
    ("schedule.kind", "zigzag", "expected one of"),
    ("schedule.warmup_mode", "never", "expected one of"),
    ("train.steps", "-5", "expected a positive number"),
    ("train.epochs", "0", "expected a positive number"),
    ("train.batch_size", "0", "expected a positive number"),
    ("train.chunk", "0", "expected a positive number"),
    ("train.ema", "1", "expected a decay between 0 and 1"),
    ("train.parallel", "magic", "expected one of"),
    ("optim.name", "adam2", "expected one of"),
    ("checkpoint.keep", "0", "expected a positive number"),
    ("checkpoint.every_steps", "0", "expected a positive number"),
    ("log.every_steps", "0", "expected a positive number"),
    ("validation.every_steps", "0", "expected a positive number"),
    ("validation.limit", "0", "expected a positive number"),
]


@pytest.mark.bad_input("training", "a value of a recipe beyond its ends")
@pytest.mark.parametrize("key,value,message", OUT_OF_RANGE)
def test_values_have_ends(key, value, message):
    with pytest.raises(ConfigError, match=rf"^{key} is .*; {message}"):
        load_recipe("pacl_scenes", [f"{key}={value}"])


def floats(schema=Recipe, prefix=""):
    """The keys of a recipe that hold a float."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        if is_dataclass(hints[field.name]):
            yield from floats(hints[field.name], f"{prefix}{field.name}.")
        elif hints[field.name] is float or float in get_args(hints[field.name]):
            yield f"{prefix}{field.name}"


UNTYPED = (
    "model.options.temperature",
    "objective.options.tau",
    "model.options.backbone.width",
)  # YAML says what kind these are


@pytest.mark.bad_input("training", "a number of a recipe that is not finite")
@pytest.mark.parametrize(
    "key,number",
    [
        *((key, number) for key in floats() for number in (".inf", "-.inf", ".nan", "inf", "nan")),
        *((key, number) for key in UNTYPED for number in (".inf", "-.inf", ".nan")),
    ],
)
def test_numbers_are_finite(key, number):
    given = f"[{number},0.9]" if key == "optim.betas" else number
    with pytest.raises(ConfigError, match=rf"^{key} is .*; expected finite numbers"):
        load_recipe("pacl_scenes", [f"{key}={given}"])


def test_the_floats_are_all_there():
    assert {"optim.lr", "optim.betas", "schedule.min_lr", "train.ema"} < set(floats()) and len(
        set(floats())
    ) == 12


@pytest.mark.bad_input("training", "an empty recipe")
@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n", "{}", "\n\n", "null"])
@pytest.mark.parametrize("overrides", [[], ["optim.lr=1e-3"]])
def test_empty_recipes(tmp_path, text, overrides):
    (tmp_path / "empty.yaml").write_text(text)
    with pytest.raises(
        ConfigError,
        match=r"^recipe .*empty\.yaml is empty; expected a mapping with some of \['name', 'model', ",
    ):
        load_recipe(tmp_path / "empty.yaml", overrides)


@pytest.mark.bad_input("training", "a recipe file that cannot be read")
def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="recipe is 'nothing'; expected a YAML file or one of"):
        load_recipe("nothing")
    path = tmp_path / "bad.yaml"
    path.write_text("model: [unclosed")
    with pytest.raises(ConfigError, match="is no YAML"):
        load_recipe(path)
    path.write_text("model: !!python/object/apply:os.system ['true']")
    with pytest.raises(ConfigError):
        load_recipe(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError):
        load_recipe(path)
