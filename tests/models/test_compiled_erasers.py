"""Erasers on models that torch.compile compiled: switched, and attached or detached afterwards."""

import pytest
import torch
from eraser_cases import in_another_thread, velocity_of, with_two_sets
from tiny_models import cogvideox, train_a_little, wan, wan_inputs

from fastunlearn import (
    AttnMapsCapture,
    EraserOutputsCapture,
    as_velocity_model,
    attach_erasers,
    detach_erasers,
    erasers_disabled,
    load_erasers,
    save_erasers,
    set_eraser_scale,
)


def compiled(form, model):
    """`model`, compiled in one of several forms, as a function that returns a velocity; and a list of compilations."""
    torch.compiler.reset()
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph

    options, velocity_model = {"backend": backend, "fullgraph": True}, as_velocity_model(model)
    if form == "torch.compile":
        velocity_model = as_velocity_model(torch.compile(model, **options))
    elif form == "model.compile":
        model.compile(**options)
    elif form == "repeated blocks":
        model.compile_repeated_blocks(**options)
    else:
        velocity_model = torch.compile(lambda *given: as_velocity_model(model)(*given), **options)

    def run():
        with torch.no_grad():
            return velocity_model(*wan_inputs())

    return run, compilations


def test_compiled_erasers_are_switched_per_thread():
    model, _ = with_two_sets(wan())
    plain, both = velocity_of(wan()), velocity_of(model)
    with erasers_disabled(model, "a"):
        only_b = velocity_of(model)
    run, compilations = compiled("repeated blocks", model)
    assert torch.equal(run(), both)
    assert len(compilations) == 1  # the blocks share it
    with erasers_disabled(model):
        assert torch.equal(run(), plain)
        assert torch.equal(in_another_thread(run), both)
    with erasers_disabled(model, "a"):
        assert torch.equal(run(), only_b)
    set_eraser_scale(model, "a", 0)
    assert torch.equal(run(), only_b)
    known = len(compilations)
    with erasers_disabled(model):
        assert torch.equal(run(), plain)
    assert len(compilations) == known


@pytest.mark.parametrize("form", ["torch.compile", "model.compile", "repeated blocks", "function"])
def test_erasers_reach_a_model_that_was_compiled_before(form):
    model, expected = wan(num_layers=1), wan(num_layers=1)
    run, _ = compiled(form, model)
    assert torch.equal(run(), velocity_of(expected))
    for each in (model, expected):
        train_a_little(attach_erasers(each, rank=4))
    assert torch.equal(run(), velocity_of(expected))


def test_all_that_changes_erasers_reaches_a_model_that_was_compiled_before(tmp_path):
    model, expected = wan(num_layers=1), wan(num_layers=1)
    train_a_little(attach_erasers(expected, rank=4))
    save_erasers(expected, tmp_path)
    detach_erasers(expected)
    run, _ = compiled("repeated blocks", model)
    plain = run()
    for change in (
        lambda each: load_erasers(each, tmp_path, "a"),
        lambda each: load_erasers(each, tmp_path, "b", scale=0.5),
        lambda each: detach_erasers(each, "a"),
    ):
        change(model)
        change(expected)
        assert torch.equal(run(), velocity_of(expected))
        assert not torch.equal(run(), plain)
    detach_erasers(model)
    assert torch.equal(run(), plain)


def test_eraser_outputs_of_a_part_that_was_compiled_before_are_refused():
    model, outputs = wan(), {}
    erasers = attach_erasers(model, rank=4)
    torch.compiler.reset()
    model.blocks[1].attn2.compile(backend="eager")
    velocity_of(model)
    with pytest.raises(RuntimeError, match=r"nothing of layers blocks\.1\.attn2: they were compiled before"):  # noqa: SIM117
        with EraserOutputsCapture(model, erasers, outputs):
            velocity_of(model)
    assert list(outputs) == ["blocks.0.attn2"]


def test_attention_maps_of_a_part_that_was_compiled_before_are_right():
    model, plain, maps, expected = wan(), wan(), {}, {}
    torch.compiler.reset()
    model.blocks[1].attn2.compile(backend="eager")
    velocity_of(model)
    for each, filled in ((model, maps), (plain, expected)):
        with AttnMapsCapture(each, filled, token_indices=[1]):
            velocity_of(each)
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_was_compiled_inside_a_capture_is_not_captured_after_it():
    model, outputs = wan(num_layers=1), {}
    erasers = attach_erasers(model, rank=4)
    run, _ = compiled("torch.compile", model)
    with EraserOutputsCapture(model, erasers, outputs):
        run()
    (kept,) = outputs.values()
    run()
    assert outputs["blocks.0.attn2"] is kept
    with (
        pytest.raises(RuntimeError, match="compiled before the capture began"),
        EraserOutputsCapture(model, erasers, {}),
    ):
        run()


def test_models_in_cuda_graphs_are_refused():
    model = cogvideox()

    def forward(*args):
        """Stands for what torch.cuda.make_graphed_callables puts in place of a forward method."""

    forward.__module__ = "torch.cuda.graphs"
    model.transformer_blocks[1].forward = forward
    with pytest.raises(ValueError, match=r"a CUDA graph in 'transformer_blocks\.1'.*attach erasers before"):
        attach_erasers(model, rank=4)
    assert not any("erasers" in name for name in model.state_dict())
