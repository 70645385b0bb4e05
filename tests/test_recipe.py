"""Recipes: what is read, what wins, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")  # the `train` extra

from dfengine.settings import to_plain
from training.errors import RecipeError
from training.recipe import Recipe, build_recipe, load_recipe

RECIPES = Path(__file__).parents[1] / "training" / "recipes"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    recipes = load_recipe(write(tmp_path, "[train]\nlr = 0.5\n"))
    assert list(recipes) == ["mine"]
    assert recipes["mine"].train.lr == 0.5
    assert recipes["mine"].model == Recipe().model


def test_overrides_win(tmp_path: Path) -> None:
    path = write(tmp_path, '[train]\nlr = 0.5\n[model]\nbackbone = "resnet18"\n[model.lstm]\nwidth = 4\n')
    changes = ["train.lr=1", "model.input_hw=[8, 9]", "model.backbone=mixnet_s", "model.lstm.layers=2"]
    recipe = load_recipe(path, changes)["mine"]
    assert (recipe.train.lr, recipe.model.input_hw, recipe.model.backbone) == (1.0, (8, 9), "mixnet_s")
    assert (recipe.model.lstm.width, recipe.model.lstm.layers) == (4, 2)


def test_members_differ_in_what_they_say_and_overrides_win_over_them(tmp_path: Path) -> None:
    text = "[train]\nlr = 0.5\n[members.a]\nmodel.weight = 2.0\n[members.b]\ntrain.lr = 0.1\ntrain.seed = 7\n"
    recipes = load_recipe(write(tmp_path, text), ["train.seed=9"])
    assert list(recipes) == ["a", "b"]
    assert [r.train.lr for r in recipes.values()] == [0.5, 0.1]
    assert [r.model.weight for r in recipes.values()] == [2.0, 1.0]
    assert [r.train.seed for r in recipes.values()] == [9, 9]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nepoch = 3\n", r"mine\.toml: \[train\] has an unknown key 'epoch'; the nearest known is 'epochs'"),
        (
            "[trian]\nlr = 3\n",
            r"mine\.toml: \[the top level\] has an unknown key 'trian'; the nearest known is 'train'",
        ),
        (
            "[model.lstm]\nheight = 3\n",
            r"\[model\.lstm\] has an unknown key 'height'; (the nearest known is|known are)",
        ),
        ("[bundle]\naggregation = { frame = 'mean' }\n", r"\[bundle\.aggregation\] has an unknown key 'frame'"),
        ("[members.x]\ntrain.lrr = 3\n", r"mine\.toml: \[train\] has an unknown key 'lrr'; the nearest known is 'lr'"),
        ("[members.x]\ntrain.lrr = 3\n[members.y]\n", r"mine\.toml, member 'x': \[train\] has an unknown key 'lrr'"),
        ("train = 3\n", r"mine\.toml: train must be a table, got 3"),
        ("[train]\nepochs = 'many'\n", r"mine\.toml: train\.epochs must be int, got 'many'"),
        ("[train]\nepochs = 0\n", r"mine\.toml: train\.epochs is 0; it must be at least 1"),
        ("[train]\nlr = -1.0\n", r"train\.lr is -1\.0; it must be positive"),
        ("[train]\nlabel_smoothing = 1.0\n", r"train\.label_smoothing is 1\.0; it must be at least 0 and below 1"),
        ("[train]\noptimizer = 'lion'\n", r"train\.optimizer must be one of adam, adamw, sgd; got 'lion'"),
        ("[model]\npretrained = 3\n", r"model\.pretrained must be bool or str, got 3"),
        ("[model]\nclip_frames = 3\n", r"model\.clip_frames is 3 but lstm\.width is 0; give an LSTM, or one frame"),
        ("[model]\naudio_width = 3\n", r"model\.audio_width needs an LSTM"),
        ("[model]\nmask_head = true\nbackbone = 'resnet18'\n", r"model\.mask_head is for the backbone face_net alone"),
        (
            "[model]\nmask_head = true\nclip_frames = 4\nlstm = { width = 8 }\n",
            r"model\.mask_head is for networks of single frames",
        ),
        (
            "[model]\nmask_head = true\n",
            r"model\.mask_head is True and train\.mask_weight 0\.0; a mask is learned with both",
        ),
        ("[model]\ninput_hw = [0, 9]\n", r"model\.input_hw\[0\] must be int at least 1, got 0"),
        (
            "[bundle]\ndetector = { thresholds = [9, 9, 9] }\n",
            r"bundle\.detector\.thresholds\[0\] must be float .* got 9",
        ),
        ("[train]\nlr = nan\n", r"train\.lr must be finite, got nan"),
        ("[bundle]\nsampling = 'some'\n", r"mine\.toml: .*sampling policy 'some'"),
        ("[train\n", r"mine\.toml: this is no TOML"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epochs", r"--set 'epochs' must have the form table\.key=value"),
        ("train.lrr=3", r"unknown key 'lrr'; the nearest known is 'lr'"),
        ("=3", r"--set '=3' cannot be read"),
    ],
)
def test_refused_overrides(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, ""), [change])


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.toml: the recipe cannot be read"):
        load_recipe(tmp_path / "gone.toml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_the_recipes_of_the_package(path: Path) -> None:
    recipes = load_recipe(path)
    assert len(recipes) == {"ensemble7": 7, "default": 2}.get(path.stem, 1)
    for recipe in recipes.values():
        assert recipe.bundle.name == path.stem
        assert build_recipe(json.loads(json.dumps(to_plain(recipe))), "again") == recipe
