"""`erasers_disabled` holds in its own thread, and for what gradient checkpointing computes again in any thread."""

import copy
import threading
from contextlib import ExitStack, nullcontext

import pytest
import torch
from eraser_cases import in_another_thread, velocity_of, with_two_sets
from tiny_models import FAMILIES, cogvideox, inputs, train_a_little
from torch.utils.checkpoint import checkpoint

from fastunlearn import (
    EraserOutputsCapture,
    as_velocity_model,
    attach_erasers,
    erasers_disabled,
    set_eraser_scale,
)

every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


def test_erasers_are_disabled_in_one_thread_only():
    plain = velocity_of(cogvideox())
    model, _ = with_two_sets(cogvideox())
    both = velocity_of(model)
    with erasers_disabled(model, "a"):
        only_b = velocity_of(model)
        assert torch.equal(in_another_thread(lambda: velocity_of(model)), both)

        def without_b():
            with erasers_disabled(model, "b"):
                return velocity_of(model)

        only_a = in_another_thread(without_b)
        assert torch.equal(velocity_of(model), only_b)
        with erasers_disabled(model, "b"):
            assert torch.equal(velocity_of(model), plain)
    assert torch.equal(without_b(), only_a)
    assert len({velocity.sum().item() for velocity in (plain, both, only_a, only_b)}) == 4
    assert torch.equal(velocity_of(model), both)


def test_two_threads_take_turns_inside_their_contexts():
    model, _ = with_two_sets(cogvideox())
    both = velocity_of(model)
    with erasers_disabled(model):
        plain = velocity_of(model)
    entered, ended = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

    def other():
        with erasers_disabled(model):
            entered.wait()
            ended.wait()
            return velocity_of(model)

    results = []
    thread = threading.Thread(target=lambda: results.append(other()))
    thread.start()
    entered.wait()
    with erasers_disabled(model):
        pass
    assert torch.equal(velocity_of(model), both)
    ended.wait()
    thread.join()
    assert torch.equal(results[0], plain)


def test_contexts_may_end_in_any_order():
    model, _ = with_two_sets(cogvideox())
    both = velocity_of(model)
    first, second = ExitStack(), ExitStack()
    first.enter_context(erasers_disabled(model, "a"))
    second.enter_context(erasers_disabled(model, "b"))
    first.close()
    with erasers_disabled(model, "b"):
        only_a = velocity_of(model)
    assert torch.equal(velocity_of(model), only_a)
    second.close()
    assert torch.equal(velocity_of(model), both)


def test_a_scale_is_a_setting_of_the_model_for_all_threads():
    model, _ = with_two_sets(cogvideox())
    with erasers_disabled(model, "b"):
        only_a = velocity_of(model)
    in_another_thread(lambda: set_eraser_scale(model, "b", 0))
    assert torch.equal(velocity_of(model), only_a)
    assert torch.equal(in_another_thread(lambda: velocity_of(model)), only_a)


def test_replicas_of_data_parallelism_follow_the_thread_that_made_them():
    model, _ = with_two_sets(cogvideox())
    stack = model.transformer_blocks[0].attn1.erasers
    with erasers_disabled(model, "a"):
        replica, clone = stack._replicate_for_data_parallel(), copy.deepcopy(stack)
        assert in_another_thread(replica.disabled) == ("a",)
    assert replica.disabled() == ("a",)
    assert stack.disabled() == clone.disabled() == in_another_thread(stack.disabled) == ()


def gradients(family, *, forward_in=None, backward_in=None, checkpointing=None, elsewhere=False):
    """Of a loss at the inputs and the parameters of the erasers, of which `*_in` names those to disable."""
    model, erasers = with_two_sets(family.make())
    if checkpointing is not None:
        model.enable_gradient_checkpointing(
            lambda block, *args: checkpoint(block.__call__, *args, use_reentrant=checkpointing == "reentrant")
        )
    x_t, t, condition = family.inputs()
    x_t.requires_grad_(True)
    forward, backward = (
        nullcontext() if name is None else erasers_disabled(model, name) for name in (forward_in, backward_in)
    )
    with forward:
        loss = as_velocity_model(model)(x_t, t, condition).square().mean()

    def run():
        with backward:
            loss.backward()

    in_another_thread(run) if elsewhere else run()
    return [x_t.grad, *(parameter.grad for eraser in erasers for parameter in eraser.parameters())]


def equal(some, others):
    return all(a is b or torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(("forward_in", "backward_in"), [("a", None), (None, "a"), ("a", "a"), ("a", "b")])
@every_family
def test_checkpointing_computes_again_what_the_forward_pass_computed(family, forward_in, backward_in, elsewhere):
    expected = gradients(family, forward_in=forward_in)
    contexts = {"forward_in": forward_in, "backward_in": backward_in}
    got = gradients(family, **contexts, checkpointing="not reentrant", elsewhere=elsewhere)
    assert equal(got, expected)
    assert not equal(got, gradients(family, forward_in=None if forward_in else "a"))


@every_family
def test_reentrant_checkpoints_cannot_remember_and_refuse(family):
    expected = gradients(family)
    assert equal(gradients(family, checkpointing="reentrant", backward_in="a", elsewhere=True), expected)
    with pytest.raises(RuntimeError, match=r"expected use_reentrant=False while erasers are disabled \(a\)"):
        gradients(family, forward_in="a", checkpointing="reentrant")


def test_two_passes_with_other_erasers_in_one_graph():
    def gradients(checkpointing):
        model, erasers = with_two_sets(cogvideox())
        if checkpointing:
            model.enable_gradient_checkpointing()
        velocity_model, (x_t, t, condition) = as_velocity_model(model), inputs()
        with erasers_disabled(model, "a"):
            x_t = velocity_model(x_t, t, condition)
        x_t = velocity_model(x_t, t, condition)
        with erasers_disabled(model, "b"):
            x_t = velocity_model(x_t, t, condition)
        x_t.square().mean().backward()
        return [parameter.grad for eraser in erasers for parameter in eraser.parameters()]

    assert equal(gradients(True), gradients(False))


@pytest.mark.parametrize("low_rank", [False, True])
def test_captured_outputs_are_computed_again_with_the_same_erasers(low_rank):
    def gradients(checkpointing):
        model = cogvideox()
        train_a_little(attach_erasers(model, rank=4, name="a"))
        erasers = attach_erasers(model, rank=4, name="b")
        train_a_little(erasers, seed=5)
        if checkpointing:
            model.enable_gradient_checkpointing()
        outputs = {}
        with erasers_disabled(model, "a"), EraserOutputsCapture(model, erasers, outputs, low_rank=low_rank):
            as_velocity_model(model)(*inputs())
        sum((output.hidden if low_rank else output).square().mean() for output in outputs.values()).backward()
        return [eraser.down.weight.grad for eraser in erasers.values()]

    assert equal(gradients(True), gradients(False))


def test_a_checkpointed_function_that_calls_the_teacher_itself():
    def gradients(**checkpointing):
        model, erasers = with_two_sets(cogvideox())
        velocity_model, (x_t, t, condition) = as_velocity_model(model), inputs()

        def loss(x_t):
            with torch.no_grad(), erasers_disabled(model):
                target = velocity_model(x_t, t, condition)
            return (velocity_model(x_t, t, condition) - target).square().mean()

        x_t.requires_grad_(True)
        (checkpoint(loss, x_t, **checkpointing) if checkpointing else loss(x_t)).backward()
        return [parameter.grad for eraser in erasers for parameter in eraser.parameters()]

    expected = gradients()
    assert all(gradient.any() for gradient in expected)
    assert equal(gradients(use_reentrant=False), expected)
    assert equal(gradients(use_reentrant=True), expected)


def test_notes_at_the_graph_go_with_it():
    from fastunlearn.erasers import switches

    model, _ = with_two_sets(cogvideox())
    velocity_model = as_velocity_model(model)
    velocity_model(*inputs()).sum()
    assert not switches._noted
    with erasers_disabled(model, "a"):
        loss = velocity_model(*inputs()).sum()
        assert switches._noted
        loss.backward()
    del loss
    assert not switches._noted
