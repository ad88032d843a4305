"""One stack for all crash tests: make test-crash."""

from tests.factories.stack import stack

__all__ = ["stack"]
