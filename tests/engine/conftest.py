"""Tiny stock pipelines as fixtures."""

import pytest

import tiny_pipelines as tiny
from sparse_pipelines import built


@pytest.fixture(params=tiny.ALL)
def stock(request) -> tiny.Tiny:
    return built(request.param)


@pytest.fixture
def wan() -> tiny.Tiny:
    return built("wan")
