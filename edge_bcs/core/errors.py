"""The one exception, and the warnings, that reach users."""

from __future__ import annotations


class EdgeBcsError(ValueError):
    """A request that cannot be met, explained in one sentence that says what to do next.

    The command line prints the sentence and exits with status 1; nothing that was on disk before is lost.
    """


class EdgeBcsWarning(UserWarning):
    """Something that a user should know and that stops nothing: one sentence, told once."""


class EdgeBcsDeprecationWarning(EdgeBcsWarning, DeprecationWarning):
    """A spelling that still works, and what takes its place; see docs/compatibility.md."""
