"""`[Source N]` marks: kept out of an answer where N was never given, and disarmed inside of source text."""

import html
import re
import unicodedata

LONGEST = 600
"""Characters from bracket to bracket: enough for the numbers 1 to 100 in a list. What is longer is cut there."""

SHORTEST = len("source1")
LARGEST = 999_999
MOST_MISCITED = 20

# The corner brackets are what some models write by themselves, the full-width ones come from Asian keyboards.
_BRACKETS = r"\[\]\u3010\u3011\uff3b\uff3d"
_OPEN, _CLOSE = r"[\[\u3010\uff3b]", r"[\]\u3011\uff3d]"
# Zero-width characters, and what Markdown does not show: `\[Source 9\]` and `[**Source 9**]` read as citations, too.
_WS = r"[\s*_`\\\u00ad\u200b-\u200f\u2060\ufeff]{0,32}"
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
_UNFINISHED = re.compile(rf"{_LEAD}(?:(?P<numbers>{_BEGUN})(?P<detail>{_WS}{_DETAIL}))?")
_JOIN = re.compile(rf"[ \t]{{0,4}}(?:[,;&]|and)?[ \t]{{0,4}}(?={_OPEN})")
_UNFINISHED_JOIN = re.compile(r"[ \t]{0,4}(?:[,;&]|an?d?)?[ \t]{0,4}")
_NUMBER = re.compile(rf"\d+|[{_DASH}]|(?ai:to|through)")
_NUMBER_IN_DETAIL = re.compile(rf"(?ai:sources?){_WS}[#№]?{_WS}(\d+)")
# Brackets of source text are looked at more broadly: whatever a reader, or a model, may take for one of ours.
_OPENS = (
    r"\[\u3010\uff3b\u27e6\u2045\u2772\u3014\u301a\u3016\u3018\u300c\u300e\uff62\u27ec\u298b\u298d\u298f\ufe47\ufe5d"
)
_CLOSED = (
    r"\]\u3011\uff3d\u27e7\u2046\u2773\u3015\u301b\u3017\u3019\u300d\u300f\uff63\u27ed\u298c\u298e\u2990\ufe48\ufe5e"
)
_BRACKETED = re.compile(
    rf"\\?(?:[{_OPENS}]|(?i:&(?:#0*91|#x0*5b|lsqb|lbrack);))"
    rf"((?:(?!&(?i:#0*93|#x0*5d|rsqb|rbrack);)[^{_OPENS}{_CLOSED}])*)"
    rf"([{_CLOSED}]|&(?i:#0*93|#x0*5d|rsqb|rbrack);)?"
)
_READS_AS_OURS = re.compile(r"s[o0]urces?(?:n(?:o|r|um(?:ber)?)?)?\d")
_TAG = re.compile(r"<[^<>]{0,100}>")
_NOT_SHOWN = re.compile(r"[\s*_`\\\u115f\u1160\u3164]+")
"""White space, what Markdown does not show, letters that are blank."""
_NO_WORD = re.compile(r"\W+")
_UNSEEN = frozenset(("Cf", "Mn", "Me"))
"""Categories of characters that are not seen, or only on top of another: zero-width ones, accents, variation selectors."""
_ALIKE = {
    "s": "\u0455\ua731\ua7a9\u0282\uabaa",
    "o": "\u043e\u03bf\u0585\u1d0f\u00f8\u0275\u03c3",
    "u": "\u03c5\u057d\u1d1c\u028b",
    "r": "\u0433\u0280\u027e\u1d26",
    "c": "\u0441\u03f2\u1d04",
    "e": "\u0435\u1d07\u04bd",
}
_LOOKS = {ord(other): letter for letter, others in _ALIKE.items() for other in others} | {
    first + at: chr(97 + at)
    for first in (0x1F150, 0x1F170, 0x1F1E6)
    for at in range(26)  # in dark circles and squares
}
_TURNS = re.compile(r"[\u202a-\u202e\u2066-\u2069]")
"""Turn around the order in which what follows is shown: `]9 ecruoS[` reads as a citation then, and ours behind it as another."""
_IMAGE = re.compile(r"!(?=\\?\[)")

_BLANK = " \t\u00a0"
_BLANKS = rf"[{_BLANK}]{{0,8}}"
_OPENED = rf"(?:\(|{_OPEN}{_WS}(?ai:sources?{_LEAD}(?:{_BEGUN})?|s(?:o(?:u(?:rc?)?)?)?)?){_BLANKS}"
_GAP = re.compile(rf"{_BLANKS}(?:{_OPENED})*+\Z")
_NO_SPACE_BEFORE = frozenset(_BLANK + "\r\n.,;:!?)…。、\uff0c")
_CLOSES = {")": "(", "]": "["}


def disarmed(text: str) -> str:
    """The text with what reads like a citation in round brackets, so that no reader takes it for one of ours.

    Letters of other alphabets that look the same count as the same. Markdown images become links: they would be loaded.
    Marks that turn the order of a line around are left out.
    """
    return _IMAGE.sub("! ", _BRACKETED.sub(_disarmed, _TURNS.sub("", text)))


def _disarmed(found: re.Match[str]) -> str:
    if len(found[1]) < SHORTEST:
        return found[0]
    begins = _NOT_SHOWN.sub("", _seen(_TAG.sub("", html.unescape(found[1]))))[:LONGEST]
    shown = _seen(unicodedata.normalize("NFKD", begins)).lower().translate(_LOOKS)
    if not _READS_AS_OURS.match(_NO_WORD.sub("", shown)):
        return found[0]
    return f"({found[1].removesuffix(chr(92))}{')' if found[2] else ''}"


def _seen(text: str) -> str:
    return "".join(each for each in text if unicodedata.category(each) not in _UNSEEN)


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
        self._breaks = ""  # what must not stand directly behind what was written: it would make a link of a citation
        self._miscited: dict[int, None] = {}
        self._out: list[str] = []

    @property
    def cited(self) -> list[int]:
        """Numbers of the sources cited so far, ascending."""
        return sorted(self._cited)

    @property
    def miscited(self) -> list[int]:
        """The first numbers that were cited and not given, ascending. Those beyond LARGEST are told as that."""
        return sorted(self._miscited)

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
        self._miscited |= dict.fromkeys(unknown[: MOST_MISCITED - len(self._miscited)])
        if not known:
            self._kept = self._kept or False
            return True
        self._cited.update(known)
        marks = (
            written if detail.strip(" .*_`\\") and not unknown else "".join(f"[Source {number}]" for number in known)
        )
        before = self._gap + (join if self._kept else "")
        starts_line = self._last == "\n" and not before.strip()
        self._write(before + marks)
        self._breaks = "(:" if starts_line else "("
        self._gap = ""
        self._kept = True
        return True

    def _numbers(self, numbers: str, detail: str) -> tuple[list[int], list[int]]:
        """The sources named that were given, in the order of the text, and the numbers of others; of a range its ends."""
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
        ends = (number for span in spans for number in span)
        return list(known), [min(number, LARGEST) for number in ends if not 1 <= number <= self._given]

    def _write(self, text: str) -> None:
        if text:
            # `![` would be an image, which is loaded unasked; `[Source 1](` and `[Source 1]:` would lead elsewhere.
            if text[0] in self._breaks or (self._last == "!" and text[0] == "["):
                self._out.append(" ")
            self._out.append(text.replace("![", "! ["))
            self._breaks = ""
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
