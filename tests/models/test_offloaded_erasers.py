"""Erasers on models that Accelerate or diffusers offloads: they compute, and are saved, as if all were in memory."""

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from eraser_cases import fingerprint, same, velocity_of
from tiny_models import LAYERS, cogvideox, family_of, train_a_little

from fastunlearn.capture import EraserOutputsCapture
from fastunlearn.erasers import attach_erasers, erasers_disabled, load_erasers, save_erasers
from fastunlearn.functional import localization_loss
from fastunlearn.offloading import computing_device, loaded_parameters
from fastunlearn.velocity_model import as_velocity_model

CPU = torch.device("cpu")
GROUPS = {"onload_device": CPU, "num_blocks_per_group": 1}


def dispatch(model, folder):
    places = {name: "cpu" for name, _ in model.named_children() if name != "transformer_blocks"}
    places |= {"transformer_blocks.0": "disk", "transformer_blocks.1": "cpu"}
    accelerate.dispatch_model(model, places, "cpu", offload_dir=folder, force_hooks=True)


OFFLOAD = {
    "sequential": lambda model, folder: accelerate.cpu_offload(model, CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, CPU),
    "device map": dispatch,
    "whole model": lambda model, folder: accelerate.cpu_offload_with_hook(model, CPU),
    "blocks": lambda model, folder: model.enable_group_offload(**GROUPS, offload_type="block_level"),
    "leaves": lambda model, folder: model.enable_group_offload(**GROUPS, offload_type="leaf_level"),
    "blocks to disk": lambda model, folder: model.enable_group_offload(
        **GROUPS, offload_type="block_level", offload_to_disk_path=str(folder)
    ),
    "leaves to disk": lambda model, folder: model.enable_group_offload(
        **GROUPS, offload_type="leaf_level", offload_to_disk_path=str(folder)
    ),
}
every_way = pytest.mark.parametrize("way", OFFLOAD)
meta_ways = pytest.mark.parametrize("way", ["sequential", "disk"])


def erased(model=None):
    """A model with erasers that have an effect, and the erasers."""
    model = cogvideox() if model is None else model
    erasers = attach_erasers(model, rank=4)
    train_a_little(erasers)
    return model, erasers


@every_way
def test_erasers_attached_to_an_offloaded_model_compute_and_train(way, tmp_path):
    expected = velocity_of(erased()[0])
    model = cogvideox()
    OFFLOAD[way](model, tmp_path / "offloaded")
    plain = velocity_of(model)
    _, erasers = erased(model)
    assert {parameter.device for eraser in erasers.values() for parameter in eraser.parameters()} == {CPU}
    assert torch.equal(velocity_of(model), expected)
    with erasers_disabled(model):
        assert torch.equal(velocity_of(model), plain)
    save_erasers(model, tmp_path / "erasers")
    load_erasers(model, tmp_path / "erasers", "again", scale=0.0)
    assert torch.equal(velocity_of(model), expected)
    outputs = {}
    with EraserOutputsCapture(model, erasers, outputs, low_rank=True):
        as_velocity_model(model)(*family_of(model).inputs())
    localization_loss(outputs, torch.zeros(2, 48)).loss.backward()
    assert all(parameter.grad.any() for parameter in erasers[LAYERS[1]].parameters())


@every_way
def test_erasers_that_are_offloaded_with_the_model_are_saved_as_they_were(way, tmp_path):
    model, _ = erased()
    expected = velocity_of(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    OFFLOAD[way](model, tmp_path / "offloaded")
    for _ in range(2):
        save_erasers(model, tmp_path / "erasers")
        other = cogvideox()
        load_erasers(other, tmp_path / "erasers")
        assert torch.equal(velocity_of(other), expected)
        assert torch.equal(velocity_of(model), expected)
    loaded = dict(loaded_parameters(model, lambda name: "norm" not in name))
    assert loaded.keys() == {name for name in weights if "norm" not in name}
    assert all(torch.equal(value, weights[name]) for name, value in loaded.items())


def test_parameters_that_a_module_around_them_fetches_are_found():
    model, _ = erased()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    accelerate.cpu_offload(model, CPU, preload_module_classes=["Attention"])
    loaded = dict(loaded_parameters(model, lambda name: True))
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.items())


@pytest.mark.parametrize("way", ["sequential", "leaves"])
def test_erasers_go_where_the_attention_computes(way, tmp_path):
    model = cogvideox()
    OFFLOAD[way](model, tmp_path)
    attention = model.get_submodule(LAYERS[0])
    assert computing_device(attention, model) == CPU
    for module in model.modules():  # as if this were an accelerator
        if way == "sequential" and hasattr(module, "_hf_hook"):
            for hook in getattr(module._hf_hook, "hooks", [module._hf_hook]):
                hook.execution_device = torch.device("meta")
        elif way == "leaves" and hasattr(module, "_diffusers_hook"):
            module._diffusers_hook.get_hook("group_offloading").group.onload_device = torch.device("meta")
    assert computing_device(attention, model) == computing_device(model, model) == torch.device("meta")


def test_a_model_without_weights_gets_no_erasers(tmp_path):
    save_erasers(erased()[0], tmp_path)
    model = cogvideox().to("meta")
    before = sorted(model.state_dict())
    for attach in (lambda: attach_erasers(model, rank=4), lambda: load_erasers(model, tmp_path)):
        with pytest.raises(ValueError, match="model: expected loaded weights, got some on the meta device; load the"):
            attach()
        assert sorted(model.state_dict()) == before


def test_blocks_that_move_through_a_stream_get_no_erasers():
    model = cogvideox()
    OFFLOAD["blocks"](model, None)
    before = fingerprint(model)
    group = model.transformer_blocks[0]._diffusers_hook.get_hook("group_offloading").group
    group.cpu_param_dict = {parameter: parameter.data for parameter in model.transformer_blocks[0].parameters()}
    with pytest.raises(ValueError, match=r"attach or load erasers before enable_group_offload\(use_stream=True\)"):
        attach_erasers(model, rank=4)
    assert same(before, fingerprint(model))


@meta_ways
def test_erasers_that_are_offloaded_with_the_model_cannot_be_trained_by_mistake(way, tmp_path):
    model, erasers = erased()
    OFFLOAD[way](model, tmp_path)
    velocity = as_velocity_model(model)(*family_of(model).inputs())
    with pytest.raises(RuntimeError, match="erasers: expected parameters that stay in memory.*offload the model first"):
        velocity.sum().backward()
    outputs = {}
    with EraserOutputsCapture(model, erasers, outputs):
        velocity_of(model)
    assert list(outputs) == LAYERS
    with (
        pytest.raises(RuntimeError, match=f"eraser '{LAYERS[0]}' are offloaded .* capture it with low_rank=False"),
        EraserOutputsCapture(model, erasers, outputs, low_rank=True),
    ):
        velocity_of(model)


@meta_ways
def test_erasers_whose_values_nobody_has_are_not_saved(way, tmp_path):
    model, _ = erased()
    save_erasers(model, tmp_path / "erasers")
    before = {path.name: path.read_bytes() for path in (tmp_path / "erasers").iterdir()}
    OFFLOAD[way](model, tmp_path / "offloaded")
    eraser = model.get_submodule(f"{LAYERS[1]}.erasers.default")
    eraser.up._hf_hook.offload = False  # so that removing the hook leaves the weights where they are not
    remove_hook_from_module(eraser.up)
    with pytest.raises(ValueError, match=f"{LAYERS[1]}.erasers.default.up.weight: expected loaded weights, got"):
        save_erasers(model, tmp_path / "erasers")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "erasers").iterdir()}
