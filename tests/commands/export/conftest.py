"""The fixtures of all tests of exports: runs and what they are exported to, made once."""

from tests.support.exports import exports, runs  # noqa: F401
