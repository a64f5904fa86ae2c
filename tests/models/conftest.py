"""Fixtures for tests of the models, the losses and the erasers."""

import pytest
from loss_cases import Table


@pytest.fixture
def student() -> Table:
    return Table(0)


@pytest.fixture
def teacher() -> Table:
    return Table(100)
