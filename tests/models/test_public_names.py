"""Every public name exists and has a docstring."""

import inspect
import typing

import pytest

import fastunlearn
from fastunlearn import erasers, families, functional, losses, testing
from fastunlearn.testing import tiny_pipelines
from fastunlearn.training import cache

MODULES = (fastunlearn, cache, erasers, families, functional, losses, testing, tiny_pipelines)


def members(cls):
    """The methods and properties that a class and its bases in this library define, by name."""
    definitions = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("fastunlearn."):
            definitions |= vars(base)
    for name, value in definitions.items():
        is_function = inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod, property))
        if is_function and not name.startswith("_"):
            yield name, value


def public_objects():
    for module in MODULES:
        yield module.__name__, module
        for name in module.__all__:
            value = getattr(module, name, None)
            if typing.get_origin(value) is not None:  # an alias such as Callable[...] cannot have a docstring
                continue
            yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for member, definition in members(value):
                    yield f"{module.__name__}.{name}.{member}", definition


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_name_in_all_exists(module):
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert len(set(module.__all__)) == len(module.__all__)


def test_every_public_name_has_a_docstring():
    objects = dict(public_objects())
    assert "fastunlearn.T2VUnlearningLoss.forward" in objects
    assert "fastunlearn.testing.compare" in objects
    undocumented = [name for name, value in objects.items() if not (value.__doc__ or "").strip()]
    assert undocumented == []


def test_a_class_has_a_docstring_of_its_own():
    """`__doc__` of a NamedTuple or a dataclass is generated if none is written."""
    classes = {name: value for name, value in public_objects() if inspect.isclass(value)}
    assert classes
    assert [name for name, cls in classes.items() if cls.__doc__.startswith(f"{cls.__name__}(")] == []


def test_former_names_lead_to_the_same_objects():
    from fastunlearn import backbones, velocity_model
    from fastunlearn.training import pipelines, train, trainer
    from fastunlearn.training.model import loading, text

    assert backbones.Backbone is families.Family and backbones.backbone_of is families.family_of
    assert backbones.as_velocity_model is velocity_model.as_velocity_model
    assert trainer.train is train.train and trainer.run is train.run
    assert pipelines.load_model is loading.load_model and pipelines.encode_prompts is text.encode_prompts
