"""A folder in memory for tests that mostly wait for the disk."""

from tests.faults.conftest import folder

__all__ = ["folder"]
