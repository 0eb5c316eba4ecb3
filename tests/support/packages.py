"""Packages of the extra `dev`, without which `make test` leaves some tests out."""

import os
from importlib.util import find_spec

import pytest


def is_missing(package: str) -> bool:
    """Whether tests that need a package are left out; never in CI."""
    return os.environ.get("CI") != "true" and find_spec(package) is None


def needs(package: str) -> pytest.MarkDecorator:
    """Skip a test where a package is missing."""
    return pytest.mark.skipif(is_missing(package), reason=f"{package} is in the extra dev")
