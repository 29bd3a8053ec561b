r"""Text from files, models and arguments, made safe to show on a terminal.

Such text may hold escape sequences that recolour the screen or move the cursor, marks that reverse
the order of letters, line breaks that forge a row of a table, and half a surrogate pair that no
encoding can write. They are shown as Python would write them in a string: ``\x1b``, ``\u202e``.
"""

from __future__ import annotations

import unicodedata

# Control and format characters, surrogates, line and paragraph separators.
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# The joiners change how letters and emoji beside them look, and nothing else.
_JOINERS = "\u200c\u200d"


def printable(text: str, keep: str = "") -> str:
    """`text` with every unsafe character escaped, except those in `keep`."""
    if text.isprintable():
        return text
    keep += _JOINERS
    return "".join(
        _escaped(char) if unicodedata.category(char) in _UNSAFE and char not in keep else char
        for char in text
    )


def shorten(text: str, width: int) -> str:
    """One safe line of at most `width` characters, for tables."""
    # A safe character stays one character or becomes several, so the rest is cut off anyway.
    flat = printable(" ".join(text[: 16 * width + 4096].split()))
    return flat if len(flat) <= width else flat[: width - 3].rstrip() + "..."


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
