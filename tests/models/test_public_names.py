"""Every public name exists and has a docstring."""

import inspect

import pytest

import fastunlearn
from fastunlearn import functional, testing

MODULES = (fastunlearn, functional, testing)


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
