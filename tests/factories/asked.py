"""Which cases a session was asked for, where one fixture does the work of many tests."""

from __future__ import annotations

from typing import Any

import pytest


def asked(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """Tell the values of a parameter with which tests of this file are to run, in their order."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    return [each.params[name] for each in parameters if each and name in each.params]
