"""Where an answer stops: at the first of some strings, of which nothing is ever shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks at one answer's text as it comes.

    Args:
        strings: any of which ends it.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        """The end of the text so far, with which one of them may begin."""
        self.found = False

    def add(self, text: str, maybe: str = "") -> str:
        """What of the text may be shown; once one of the strings is `found`, all that ever may.

        Args:
            text: what has come.
            maybe: what would come behind it if the answer ended here (flowcut.detokenize.TextStream.maybe).
        """
        seen = self._held + text + maybe
        places = [place for string in self._strings if (place := seen.find(string)) >= 0]
        if places:
            self.found, self._held = True, ""
            return seen[: min(places)]
        certain = self._held + text
        kept = self._beginning(certain)
        self._held = certain[len(certain) - kept :]
        return certain[: len(certain) - kept]

    def rest(self) -> str:
        """What was held back, at the end of an answer that does not stop."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which one of the strings begins."""
        longest = max((len(string) for string in self._strings), default=1) - 1
        ends = range(min(longest, len(text)), 0, -1)
        return next((n for n in ends if any(string.startswith(text[-n:]) for string in self._strings)), 0)
