"""`[Source N]` marks: kept out of an answer where N was never given, and disarmed inside of source text."""

import re

LONGEST = 600
"""Characters from bracket to bracket: enough for the numbers 1 to 100 in a list. What is longer is cut there."""

# The corner brackets are what some models write by themselves, the full-width ones come from Asian keyboards.
_BRACKETS = r"\[\]\u3010\u3011\uff3b\uff3d"
_OPEN, _CLOSE = r"[\[\u3010\uff3b]", r"[\]\u3011\uff3d]"
_WS = r"\s{0,32}"
_DASH = "\\-\u2010\u2011\u2012\u2013\u2014"
_LEAD = rf"{_WS}[:#№.]?{_WS}"
_BETWEEN = rf"(?:[\s,;/&+#№{_DASH}]|(?ai:and|or|to|through|sources?))"
# `[Source 2, p. 4]`, `[Source 2: its title]`, `[Source 2.]`; a word right after the number makes it ordinary text.
_DETAIL = rf"(?:[,:;({_DASH}][^{_BRACKETS}\n]{{0,80}}|\.)?"

_CITATION = re.compile(
    rf"{_OPEN}{_WS}(?ai:sources?){_LEAD}(?P<numbers>(?>\d++(?:{_BETWEEN}*+\d++)*))(?P<detail>{_WS}{_DETAIL}){_CLOSE}"
)
_WORD = re.compile(rf"{_OPEN}{_WS}(?P<word>(?ai:[a-z]*))")
# Starts of what may follow `Source` before the closing bracket: all that _CITATION takes there, and little more.
_BEGUN = rf"\d(?:\d|{_BETWEEN})*(?ai:an?|o|t(?:h(?:r(?:o(?:ug?)?)?)?)?|s(?:o(?:u(?:rc?)?)?)?)?"
_UNFINISHED = re.compile(rf"{_LEAD}(?:(?P<numbers>{_BEGUN})(?P<detail>{_DETAIL}))?")
_JOIN = re.compile(rf"[ \t]{{0,4}}(?:[,;&]|and)?[ \t]{{0,4}}(?={_OPEN})")
_UNFINISHED_JOIN = re.compile(r"[ \t]{0,4}(?:[,;&]|an?d?)?[ \t]{0,4}")
_NUMBER = re.compile(rf"\d+|[{_DASH}]|(?ai:to|through)")
_NUMBER_IN_DETAIL = re.compile(rf"(?ai:sources?){_WS}[#№]?{_WS}(\d+)")
_ARMED = re.compile(rf"{_OPEN}(\s*(?ai:sources?)[\s:#№.]*\d[^{_BRACKETS}]*)({_CLOSE}?)")

_BLANK = " \t\u00a0"
_BLANKS = rf"[{_BLANK}]{{0,8}}"
_OPENED = rf"(?:\(|{_OPEN}{_WS}(?ai:sources?{_LEAD}(?:{_BEGUN})?|s(?:o(?:u(?:rc?)?)?)?)?){_BLANKS}"
_GAP = re.compile(rf"{_BLANKS}(?:{_OPENED})*+\Z")
_NO_SPACE_BEFORE = frozenset(_BLANK + "\r\n.,;:!?)…。、\uff0c")
_CLOSES = {")": "(", "]": "["}


def disarmed(text: str) -> str:
    """The text with what reads like a citation in round brackets, so that no reader takes it for one of ours."""
    return _ARMED.sub(lambda found: f"({found[1]}{')' if found[2] else ''}", text)


class Citations:
    """Passes an answer through, piece by piece, and keeps out each citation of a source that was not given.

    Sources 1 to `given` were. What is kept reads `[Source N]`, one bracket for each number. The result does not depend
    on how the answer was cut into pieces; only what may still become a citation is held back, at most LONGEST characters.
    """

    def __init__(self, given: int) -> None:
        self._given = given
        self._cited: set[int] = set()
        self._held = ""
        # Whether the citation that stands directly before `_held` was kept; None where no citation stands there.
        self._kept: bool | None = None
        self._gap = ""  # blanks and opening brackets, written as soon as it is known what follows them
        self._last = "\n"
        self._out: list[str] = []

    @property
    def cited(self) -> list[int]:
        """Numbers of the sources cited so far, ascending."""
        return sorted(self._cited)

    def feed(self, text: str) -> str:
        """What may be shown now; the empty text where nothing may yet."""
        self._held += text
        while self._held and self._advance():
            pass
        return self._taken()

    def close(self) -> str:
        """The rest: what was held back and did not become a citation."""
        while self._held:
            if self._advance():
                continue
            if self._kept is False:
                self._tidy()
            else:
                self._end_unfinished()
        if self._kept is None:
            self._write(self._gap)
        return self._taken()

    def _advance(self) -> bool:
        """Decide on the start of what is held; False where that needs more text."""
        joined = None
        if self._kept is not None:
            if _UNFINISHED_JOIN.fullmatch(self._held):
                return False
            joined = _JOIN.match(self._held)
            if not joined and self._kept is False:
                self._tidy()
                return True
        if joined:
            return self._bracket(joined.end())
        found = _WORD.search(self._held)
        if found and found.start() == 0:
            return self._bracket(0)
        return self._text(found.start() if found else len(self._held))

    def _bracket(self, start: int) -> bool:
        """The same for a bracket that opens at `start`, behind what joins it to the citation before."""
        bracket = self._held[start : start + LONGEST]
        if citation := _CITATION.match(bracket):
            return self._citation(start, start + citation.end(), citation["numbers"], citation["detail"])
        if not (unfinished := _unfinished(bracket)):
            return self._text(start + 1)
        if len(bracket) < LONGEST:
            return False
        return self._citation(start, start + LONGEST, unfinished["numbers"], "")

    def _end_unfinished(self) -> None:
        found = _WORD.search(self._held)
        unfinished = found and _unfinished(self._held[found.start() :])
        if found and unfinished and unfinished["numbers"]:
            numbers, detail = unfinished["numbers"], unfinished["detail"]
            if self._numbers(numbers, detail)[1]:
                self._citation(found.start(), len(self._held), numbers, detail)
                return
        self._text(len(self._held))

    def _tidy(self) -> None:
        """Take away a sign of the citation that was taken out: the bracket around it, a blank beside it."""
        first, opening = self._held[0], _CLOSES.get(self._held[0])
        if opening and opening in self._gap:
            self._gap = self._gap.rpartition(opening)[0]
            self._held = self._held[1:]
        elif first in _BLANK and not self._gap and self._last == "\n":
            self._held = self._held[1:]
        else:
            # Read again from the gap on: what stood around the citation may be one itself.
            self._held = (self._gap.rstrip(_BLANK) if first in _NO_SPACE_BEFORE else self._gap) + self._held
            self._gap = ""
            self._kept = None

    def _text(self, end: int) -> bool:
        text, self._held = self._gap + self._held[:end], self._held[end:]
        gap = _GAP.search(text)
        cut = gap.start() if gap and len(gap[0]) < LONGEST else len(text)
        self._write(text[:cut])
        self._gap = text[cut:]
        self._kept = None
        return True

    def _citation(self, start: int, end: int, numbers: str, detail: str) -> bool:
        join, written, self._held = self._held[:start], self._held[start:end], self._held[end:]
        known, unknown = self._numbers(numbers, detail)
        if not known:
            self._kept = self._kept or False
            return True
        self._cited.update(known)
        marks = written if detail.strip(" .") and not unknown else "".join(f"[Source {number}]" for number in known)
        self._write(self._gap + (join if self._kept else "") + marks)
        self._gap = ""
        self._kept = True
        return True

    def _numbers(self, numbers: str, detail: str) -> tuple[list[int], bool]:
        """The sources named that were given, in the order of the text, and whether others are named too."""
        spans: list[tuple[int, int]] = []
        ranged = False
        for token in _NUMBER.findall(numbers):
            if not token.isdecimal():
                ranged = True
                continue
            number = int(token)
            if ranged:
                low, high = spans[-1]
                spans[-1] = min(low, number), max(high, number)
            else:
                spans.append((number, number))
            ranged = False
        spans += [(int(number), int(number)) for number in _NUMBER_IN_DETAIL.findall(detail)]
        known = {number: None for low, high in spans for number in range(max(low, 1), min(high, self._given) + 1)}
        return list(known), any(low < 1 or high > self._given for low, high in spans)

    def _write(self, text: str) -> None:
        if text:
            self._out.append(text)
            self._last = text[-1]

    def _taken(self) -> str:
        text = "".join(self._out)
        self._out.clear()
        return text


def _unfinished(bracket: str) -> re.Match[str] | None:
    """The part after the word where a text that starts with a bracket may still become a citation, else None."""
    found = _WORD.match(bracket)
    if found is None:
        return None
    word, rest = found["word"].lower(), bracket[found.end() :]
    begins = word in ("source", "sources") if rest else "sources".startswith(word)
    return _UNFINISHED.fullmatch(rest) if begins else None
