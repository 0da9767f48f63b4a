"""Words of command lines to copy: quoted for a shell, and values quoted for hydra."""

from __future__ import annotations

import re
import shlex

# Text that hydra reads as it is: no number, and none of its words.
_PLAIN = re.compile(r"(?!(null|true|false|nan|inf)$)([A-Za-z_/]|\.\.?/)[\w./@%+-]*", re.IGNORECASE | re.ASCII)

# Characters that a shell reads in double quotes.
_SPECIAL_IN_DOUBLE_QUOTES = re.compile(r'["$`\\!]')


def setting_word(name: str, value: object) -> str:
    """``name=value`` as one word of a shell, which hydra reads as this value."""
    text = str(value)
    if not _PLAIN.fullmatch(text):
        # A backslash counts before a quote only.
        text = "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text) + "'"
    return _shell_word(f"{name}={text}")


def _shell_word(text: str) -> str:
    """``text`` quoted for a shell. In double quotes, single ones can be read."""
    if "'" in text and not _SPECIAL_IN_DOUBLE_QUOTES.search(text):
        return f'"{text}"'
    return shlex.quote(text)
