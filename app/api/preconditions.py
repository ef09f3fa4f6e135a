"""If-Match and If-None-Match: which stored state a request may act on (RFC 9110 §13.1)."""

import re

from app.errors import BadInput

ANY = "*"
_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_STATE = re.compile(r'\.(?:pending|failed)"$')
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")


class Precondition:
    """Holds (`in`) the tags that may be stored for the request to act, and None where there may be no document.

    A document that becomes ready, or is given up, keeps its tag for writers: what was told while it was pending
    (`"1-6422f0a1.pending"`) names the same text. `reading`: for readers it does not, who would miss the change.

    Raises BadInput for a header that is neither `*` nor quoted tags with commas between them.
    """

    def __init__(self, if_match: str | None = None, if_none_match: str | None = None, *, reading: bool = False) -> None:
        # If-Match compares strongly: a weak tag never matches. If-None-Match does not look at weakness.
        only = None if if_match is None else {t for t in _tags("If-Match", if_match) if t[:2] != "W/"}
        but = None if if_none_match is None else {t.removeprefix("W/") for t in _tags("If-None-Match", if_none_match)}
        self._only = only if only is None or reading else {_STATE.sub('"', t) for t in only}
        self._but = but if but is None or reading else {_STATE.sub('"', t) for t in but}

    def __contains__(self, stored: object) -> bool:
        matched = {ANY, quoted(stored)} if isinstance(stored, str) else set()
        return (self._only is None or not matched.isdisjoint(self._only)) and (
            self._but is None or matched.isdisjoint(self._but)
        )


def quoted(tag: str, state: str = "ready") -> str:
    """The tag as it stands in ETag and If-Match; until the document is ready, with its state."""
    return f'"{tag}"' if state == "ready" else f'"{tag}.{state}"'


def _tags(name: str, header: str) -> list[str]:
    if header.strip() == ANY:
        return [ANY]
    if not _TAGS.fullmatch(header):
        raise BadInput(
            name,
            f'{header[:60]!r} is not allowed; allowed: * or quoted ETags with commas between them, as "1-6422f0a1"',
        )
    return re.findall(_TAG, header)
