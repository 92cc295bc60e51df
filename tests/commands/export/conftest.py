"""The fixtures of all tests of exports: runs and their exports, made once."""

from tests.support.exports import exports, runs  # noqa: F401
