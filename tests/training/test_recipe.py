"""Recipes: every shipped one loads; typos and wrong values are named."""

import pytest

from ovseg.errors import ConfigError
from ovseg.training.recipe import list_recipes, load_recipe, save_recipe


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes(name, tmp_path):
    recipe = load_recipe(name, ["optim.lr=0.5", "train.seed=7"])
    assert recipe.optim.lr == 0.5 and recipe.train.seed == 7
    save_recipe(recipe, tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize("overrides,message", [
    (["optim.lrr=1"], r"optim\.lrr: unknown key, did you mean optim\.lr\?"),
    (["modle.name=x"], r"modle: unknown key, did you mean model\?"),
    (["optim.zzz=1"], r"optim\.zzz: unknown key, expected one of"),
    (["optim.lr=fast"], r"optim\.lr: Value 'fast'"),
    (["train.steps=0"], r"train\.steps is 0; expected a positive number"),
    (["train.precision=fp8"], r"train\.precision is 'fp8'; expected one of"),
    (["optim"], r"override 'optim'; expected key=value"),
    (["optim=3"], r"optim is 3; expected a mapping"),
])
def test_bad_overrides(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("pacl_scenes", overrides)


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
