"""Recipe files: what they give `prepare` and `train`, and what is wrong with them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from training_cases import options_for, tiny_cache, tiny_model

from fastunlearn.cli import main
from fastunlearn.training.cache import TeacherCache
from fastunlearn.training.data.recipe import read_recipe, target_groups, with_recipe
from fastunlearn.training.data.requests import Request, read_requests
from fastunlearn.training.options import PrepareOptions, TargetGroup, TrainingOptions
from fastunlearn.training.train import train

RECIPE = """
[prepare]
concept = "circle"            # a reason
kept_prompts = "kept.txt"
output_dir = "cache"
num_trajectories = 2
guidance_scale = 3            # an integer where a number is expected
mask_layers = [0, 1]
follow_replacement = 0.0

[train]
max_train_steps = 3
gradient_checkpointing = true
negative_guidance_scale = 2.5
loss_type = "l1"
pretrained_model_name_or_path = "models"
resume_from_checkpoint = "latest"

[[targets]]
name = "alone"
prompts = ["a red circle", "a circle\\ta star"]
negative_guidance_scale = 1
steps = [0, 0.5]

[[targets]]
name = "beside"
target_prompts = "beside.txt"
replacement = "dog"
follow_replacement = 1
num_trajectories = 1
share = 3.0
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe of two groups, in a folder with the files that it names."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "kept.txt").write_text("a square\n")
    (tmp_path / "beside.txt").write_text("a red circle and a square\n")
    (tmp_path / "models").mkdir()
    return tmp_path / "recipe.toml"


def test_a_recipe_gives_defaults_and_what_is_given_comes_first(recipe):
    options = with_recipe(PrepareOptions, recipe, pretrained_model_name_or_path="m", num_trajectories=5)
    assert options == PrepareOptions(
        "m",
        recipe.parent / "cache",
        "circle",
        kept_prompts=recipe.parent / "kept.txt",
        num_trajectories=5,
        guidance_scale=3.0,
        mask_layers=(0, 1),
        follow_replacement=0.0,
        recipe=recipe,
    )
    assert isinstance(options.guidance_scale, float)
    options = with_recipe(TrainingOptions, str(recipe), cache_dir=Path("c"), output_dir=Path("o"), loss_type="l2")
    assert options == TrainingOptions(
        str(recipe.parent / "models"),
        Path("c"),
        Path("o"),
        max_train_steps=3,
        gradient_checkpointing=True,
        negative_guidance_scale=2.5,
        resume_from_checkpoint="latest",  # there is no such file beside the recipe
        recipe=recipe,
    )
    assert (
        with_recipe(PrepareOptions, None, output_dir=Path("o"), concept="c", pretrained_model_name_or_path="m").seed
        == 0
    )
    with pytest.raises(ValueError, match="required, here or in a recipe: --pretrained-model-name-or-path$"):
        with_recipe(PrepareOptions, recipe)


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "recipe.toml").write_text("\ufeff[prepare]\nheight = 16\n", encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.toml").prepare == {"height": 16}


def test_a_folder_is_not_a_recipe(tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: expected a file, got a folder$"):
        read_recipe(tmp_path)


def test_a_text_without_letters_is_not_the_folder_of_the_recipe(tmp_path):
    (tmp_path / "recipe.toml").write_text("[train]\nresume_from_checkpoint = ''\n")
    assert read_recipe(tmp_path / "recipe.toml").train == {"resume_from_checkpoint": ""}


def test_groups_have_prompts_trajectories_and_steps_of_their_own(recipe):
    options = with_recipe(PrepareOptions, recipe, pretrained_model_name_or_path="m")
    assert read_requests(options) == [
        Request("a red circle", "alone", "a red", steps=(0, 0.5)),
        Request("a circle", "alone", "a star", steps=(0, 0.5)),
        Request("a red circle and a square", "beside", "a red dog and a square", follow="instead"),
        Request("a square", "kept"),
        Request("a square", "kept"),
    ]
    with pytest.raises(
        ValueError, match=r"target_prompts: expected none beside the \[\[targets\]\] of .*recipe.toml, got"
    ):
        read_requests(dataclasses.replace(options, target_prompts=recipe.parent / "beside.txt"))
    videos = dataclasses.replace(options, data=recipe.parent, kept_prompts=None)
    with pytest.raises(ValueError, match=r"^data: expected no videos beside the .* of .*recipe.toml, .* got"):
        read_requests(videos)
    recipe.write_text(RECIPE.replace('"dog"', '"circles"'))
    with pytest.raises(ValueError, match="beside replacement: expected a prompt without 'circle', got"):
        read_requests(options)
    recipe.write_text(RECIPE)
    (recipe.parent / "beside.txt").write_text("two circles\n")
    with pytest.raises(ValueError, match="beside.txt: expected 'circle' as a word of its own"):
        read_requests(options)
    recipe.write_text(RECIPE.replace('"a red circle"', '"two circles"'))
    with pytest.raises(ValueError, match=r"recipe.toml: \[\[targets\]\] alone: expected 'circle' as a word of its own"):
        read_requests(options)


def test_training_has_the_groups_of_the_recipe(recipe, tmp_path):
    options = with_recipe(TrainingOptions, recipe, cache_dir=Path("c"), output_dir=Path("o"))
    groups = (TargetGroup("alone", 1.0, 1.0), TargetGroup("beside", 2.5, 3.0))
    assert target_groups(options, ["beside", "kept", "alone"]) == groups
    assert target_groups(dataclasses.replace(options, recipe=None), []) == (TargetGroup(guidance_scale=2.5),)
    with pytest.raises(ValueError, match=r"^recipe: expected the one that .* groups are \['alone'\], got none$"):
        target_groups(dataclasses.replace(options, recipe=None), ["alone", "kept"])
    with pytest.warns(UserWarning, match="only the group 'target' is trained on, not \\['beside'\\]"):
        target_groups(dataclasses.replace(options, recipe=None), ["target", "beside", "kept"])
    model = tiny_model()
    with pytest.raises(ValueError) as error:
        train(model, tiny_cache(model), tmp_path / "out", options_for(tmp_path / "out", recipe=recipe))
    assert str(error.value) == (
        f"recipe: expected the target groups of the cache, ['other', 'target'], got ['alone', 'beside'] in {recipe}; "
        "give train the recipe that the cache was prepared with"
    )


def test_prepare_and_train_with_a_recipe(recipe, tmp_path, tiny_pipeline):
    size = ("--height=32", "--width=32", "--num-frames=9", "--num-inference-steps=4", "--timesteps-per-trajectory=2")
    model = f"--pretrained-model-name-or-path={tiny_pipeline('cogvideox')}"
    common = (model, f"--recipe={recipe}", "--mixed-precision=no", "--device=cpu")
    main(["prepare", *common, *size])
    cache = TeacherCache.open(tmp_path / "cache")
    assert {name: len(points) for name, points in cache.groups.items()} == {"alone": 4, "beside": 2, "kept": 4}
    assert all(t >= 500 for t in cache.groups["alone"].t)  # the first half of the steps
    output = tmp_path / "out"
    more = (f"--cache-dir={tmp_path / 'cache'}", f"--output-dir={output}", "--rank=2", "--no-gradient-checkpointing")
    main(["train", *common, *more, "--max-train-steps=1"])
    settings = json.loads((output / "erasers/training.json").read_text())["settings"]
    assert settings["targets"] == [
        {"name": "alone", "guidance_scale": 1.0, "share": 1.0},
        {"name": "beside", "guidance_scale": 2.5, "share": 3.0},
    ]
    assert settings["loss_type"] == "l1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[prepare", "expected a recipe in TOML, got Expected"),
        ("a = " + "9" * 5000, "expected a recipe in TOML, got Exceeds the limit"),
        ("a = " + "[" * 5000, "expected a recipe in TOML, got "),
        ("[prepare]\nseed = 1\nseed = 2", "expected a recipe in TOML, got Cannot overwrite a value"),
        ("[trian]", "unknown table 'trian'; did you mean train?"),
        ("[evaluate]", "unknown table 'evaluate'; there are prepare, train, targets"),
        ("prepare = 3", "[prepare]: expected a table, got 3"),
        ("targets = 3", "expected groups that are headed [[targets]], got 3"),
        ("targets = [3]", "[[targets]] 1: expected a table, got 3"),
        ("[prepare]\nsede = 3", "[prepare]: unknown option 'sede'; did you mean seed?"),
        ("[prepare]\nrank = 3", "[prepare]: unknown option 'rank'"),
        ("[train]\nrecipe = 'a'", "[train]: unknown option 'recipe'"),
        ("[train]\nrank = '3'", "[train] rank: expected a whole number, got '3'"),
        ("[train]\nrank = 3.0", "[train] rank: expected a whole number, got 3.0"),
        ("[train]\nrank = true", "[train] rank: expected a whole number, got True"),
        ("[train]\nrank = 0", "[train] rank: expected a whole number from 1 to 65536, got 0"),
        ("[train]\nlearning_rate = nan", "[train] learning_rate: expected a number from 0 to 1000, got nan"),
        (
            "[train]\nlearning_rate = " + "9" * 400,
            "[train] learning_rate: expected a number from 0 to 1000, got a longer number",
        ),
        (
            "[train]\nlearning_rate = -" + "9" * 400,
            "[train] learning_rate: expected a number from 0 to 1000, got a longer number",
        ),
        ("[train]\nfsdp = 1", "[train] fsdp: expected true or false, got 1"),
        ("[train]\ncache_dir = 3", "[train] cache_dir: expected a string, got 3"),
        ("[train]\nloss_type = 'l3'", "[train] loss_type: expected one of 'l2', 'l1', got 'l3'"),
        ("[prepare]\nmask_layers = 3", "[prepare] mask_layers: expected an array, got 3"),
        ("[prepare]\nmask_layers = [-1]", "[prepare] mask_layers: expected a whole number from 0 to"),
        ("[prepare]\nseed = 2000-01-01", "[prepare] seed: expected a whole number, got datetime.date(2000, 1, 1)"),
        ("[[targets]]\nprompts = ['a']", "[[targets]] 1: expected a name, got none"),
        ("[[targets]]\nname = ' '", "[[targets]] 1 name: expected one or more words, got ' '"),
        ("[[targets]]\nname = 'kept'", "[[targets]] 1 name: expected another name than 'kept'"),
        ("[[targets]]\nname = 'a'", "[[targets]] 1 prompts: expected either prompts or target_prompts, got neither"),
        ("[[targets]]\nname = 'a'\nprompts = ['a']\ntarget_prompts = 'b'", "or target_prompts, got both"),
        ("[[targets]]\nname = 'a'\nshare = 0", "[[targets]] 1 share: expected a number from 1e-06 to 1e+06, got 0.0"),
        ("[[targets]]\nname = 'a'\nprompts = ['a']\nsteps = [0.5, 0.5]", "steps: expected a start below an end"),
        (
            "[[targets]]\nname = 'a'\nprompts = ['a']\n" * 2,
            "[[targets]]: expected groups of different names, got ['a', 'a']",
        ),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_by_its_table_and_option(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}") as error:
        read_recipe(path)
    assert len(str(error.value)) < 500 + len(str(path))
    with pytest.raises(FileNotFoundError, match="nowhere.toml: expected a recipe, but there is no such file"):
        read_recipe(tmp_path / "nowhere.toml")


def test_what_is_required_may_stand_in_the_recipe_only(tmp_path):
    with pytest.raises(
        SystemExit, match="required, here or in a recipe: --pretrained-model-name-or-path, --cache-dir$"
    ):
        main(["train", f"--output-dir={tmp_path}"])
