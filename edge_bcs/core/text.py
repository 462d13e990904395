"""Text from files and file names, which must not act on the terminal that shows it.

Not to be shown as they are: control characters (an escape sequence moves the cursor, changes the title or
what was printed before), line and paragraph separators, marks that reverse the direction of the rest of a
line, and halves of surrogate pairs, which no output can encode.
"""

from __future__ import annotations

import re
from typing import Any

from edge_bcs.core.errors import EdgeBcsError

_ACTING = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """Return ``text`` as one line in which such characters are escapes such as ``\\x1b``."""
    return _ACTING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def check_text(content: Any, source: str) -> None:
    """Refuse what a file holds (JSON or TOML, parsed) if a text in it could act on a terminal.

    Raises:
        EdgeBcsError: a key or a value, however deep, has such a character; ``source`` is named.
    """
    left = [content]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left.extend(item)
            left.extend(item.values())
        elif isinstance(item, list | tuple):
            left.extend(item)
        elif isinstance(item, str) and _ACTING.search(item):
            raise EdgeBcsError(
                f"{source} holds the text '{shown(item[:40])}', whose control characters could act on a "
                "terminal; it is refused."
            )
