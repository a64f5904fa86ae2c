"""What tests of erasers compare: a model's output, and everything that attaching erasers could change."""

import threading

import torch
from tiny_models import family_of, train_a_little

from fastunlearn.erasers import attach_erasers
from fastunlearn.velocity_model import as_velocity_model


def velocity_of(model, dtype=torch.float32):
    """The velocity that a tiny transformer predicts for its family's inputs."""
    with torch.no_grad():
        return as_velocity_model(model)(*family_of(model).inputs(dtype=dtype))


def fingerprint(model):
    """All that attaching could change: attributes, hooks, values, and what is trainable."""
    modules = [(name, sorted(vars(m)), len(m._forward_hooks)) for name, m in model.named_modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return modules, state, [p.requires_grad for p in model.parameters()]


def same(before, after):
    """Whether two fingerprints are equal, bit for bit."""
    return (
        before[0] == after[0]
        and before[1].keys() == after[1].keys()
        and all(torch.equal(before[1][name], after[1][name]) for name in before[1])
        and before[2] == after[2]
    )


def with_two_sets(model):
    """`model` with trained erasers called a and b; also all erasers, in order."""
    a, b = (attach_erasers(model, rank=4, name=name) for name in "ab")
    train_a_little(a)
    train_a_little(b, seed=5)
    return model, [*a.values(), *b.values()]


def in_another_thread(function):
    """What `function` returns, or raises, in a thread of its own."""
    results, errors = [], []

    def run():
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
