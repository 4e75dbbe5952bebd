"""Words that messages share: a few of many names, and the name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

MOST = 5
"""Names that a message lists."""


def some(names: Collection[str], most: int = MOST) -> str:
    """The first few of some names, and how many there are besides: `a, b and 3 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.4) -> str | None:
    """The known name that is most like another one, if any is."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def hint(name: str, known: Collection[str]) -> str:
    """What to tell who gave an unknown name: `did you mean 'conv1'?`, or the names that there are."""
    near = nearest(name, known)
    return f"did you mean {near!r}?" if near else f"known: {some(known) or 'none'}"
