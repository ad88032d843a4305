"""One stack for all crash tests: make test-crash."""

from tests.stack import stack

__all__ = ["stack"]
