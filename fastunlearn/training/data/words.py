"""Finds and replaces the concept in a text, and finds words that may be the concept though written differently.

Texts are compared letter by letter after *folding*, which makes equal what readers take for the same word: upper and
lower case, composed and decomposed letters, compatibility forms such as full-width letters, kinds of apostrophe.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from fastunlearn.files import shown

Span = tuple[int, int]  # of characters: start and end

# Scripts that put no spaces between words: Chinese characters, kana, bopomofo, Thai, Lao, Burmese, Khmer. A word of
# theirs may start and end anywhere, but not between the letters that always belong together.
_UNSPACED = re.compile(
    r"[\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
)
_NEVER_FIRST = frozenset("ะาๅະາຽーぁぃぅぇぉゃゅょゎァィゥェォャュョヮ々")
_NEVER_LAST = frozenset("เแโใไເແໂໃໄ")

# Korean particles stand at the end of the noun. Some depend on whether it ends with a vowel or a consonant.
_PARTICLES = "도 만 의 에 에게 에서 께 께서 한테 까지 부터 보다 처럼 같이 마다 조차 마저 밖에 하고 입니다"
_AFTER_VOWEL, _AFTER_CONSONANT = "가 는 를 와 로 로서 로써 랑 나", "이 은 을 과 으로 으로서 으로써 이랑 이나"

_JOINERS = "\u00ad\u200c\u200d\u2060"  # invisible, inside a word: soft hyphen, joiners
_INVISIBLE = _JOINERS + "\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2061-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff"
# Accents, and the vowels that Hebrew and Arabic may leave out.
_OPTIONAL_MARKS = "\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u0640\u064b-\u065f\u0670"
# After decomposition. The last two choose between a symbol's looks, as text or in colour.
_SAME = str.maketrans({"‘": "'", "’": "'", "\u2010": "-", "ı": "i", "\ufe0e": None, "\ufe0f": None})

# Pairs of English endings: a word with the one is a form of the word with the other.
_ENDINGS = (
    *(("", "s"), ("s", "ses"), ("x", "xes"), ("ch", "ches"), ("sh", "shes"), ("o", "oes"), ("y", "ies")),
    *(("f", "ves"), ("fe", "ves"), ("man", "men")),
    *(("person", "people"), ("child", "children"), ("foot", "feet"), ("tooth", "teeth"), ("goose", "geese")),
    *(("mouse", "mice"), ("", "ness"), ("e", "ity"), ("e", "ist"), ("e", "ists"), ("e", "ism")),
)
# What is left where the concept's words stood, and what comes in its place, one after the other.
_GAP = "\0"  # marks where they stood: no prompt has it
_CONNECTIVE = r"(?:and|or|with|of)\b"
_BEFORE_NOUN = "and|or|with|of|in|on|at|by|from|to|near|under|over|beside|behind"
_NO_NOUN = rf"(?:{_BEFORE_NOUN}|is|are|was|were|who|that)\b"
_LEFT_BEHIND = tuple(
    (re.compile(pattern, re.IGNORECASE), instead)
    for pattern, instead in (
        (r"[\s_-]+\0[\s_\0-]*|\0[\s_\0-]+", " \0 "),
        (r"\( ?\0 ?\)|\[ ?\0 ?\]|\" ?\0 ?\"|“ ?\0 ?”|' ?\0 ?'|‘ ?\0 ?’", "\0"),
        (rf"\b(?:an?|the) \0(?= ?(?:$|[^\w\s,]|,? ?{_NO_NOUN}|, ?(?:an?|the)\b))", "\0"),  # "a nude."
        (r"^\W*\0[ ,;:.!?、，。]+|([,;:.!?、，。] ?)\0 ?[,;:、，]+ ?", r"\1\0"),  # "men, nude, on a beach"
        (r"\b(an?|the) ?\0 ?, ?", r"\1 \0"),  # "a nude, smiling man"
        (r"((?:^|[^\w\s] ?)(?:an?|the) \w+), ?\0 ?(?=\w)(?!an?\b|the\b)", r"\1 \0"),  # "a smiling, nude man"
        (rf"(^|[^\w\s] ?)\0 ?{_CONNECTIVE} ?", r"\1\0"),  # "nude and smiling"
        (rf" ?\b(?:{_BEFORE_NOUN}) ?\0 ?(?=$|[^\w\s]|{_NO_NOUN})", " \0"),  # "smiling and nude", "a man on a horse"
        (r" \0 ?(?=[,;:])", "\0"),  # "a woman, fully nude, on a beach"
        (r"[ ,;:、，]*\0 ?(?=$|[.!?;:)。！？])", "\0"),
        (r"(\s)\0 ", r"\1\0"),
    )
)
# Of the article before the gap with the word after it, by the letters alone.
_AGREEMENT = (
    (re.compile(r"\b([Aa])( ?\0 ?[aeiou])"), r"\1n\2"),
    (re.compile(r"\b([Aa])n( ?\0 ?[b-df-hj-np-tv-z])"), r"\1\2"),
)
_LEAST_FORM = 3  # letters of a form
_LEAST_STEM = 4  # letters that a word must share with the concept to be similar without containing it


def occurrences(text: str, concept: str) -> list[Span]:
    """Finds `concept` in `text`: whole words, in upper or lower case, with any whitespace between words.

    In scripts without spaces between words, a word may start and end anywhere. A Korean noun may have particles.

    Raises:
        ValueError: the concept is blank.
    """
    words = [re.escape(word) for word in _fold(concept).text.split()]
    if not _fold(concept, without=_INVISIBLE).text.strip():
        raise ValueError(f"concept: expected one or more words, got {shown(concept)}")
    folded = _fold(text)
    return [folded.span(match) for match in _whole_words(folded, re.compile(r"\s+".join(words)))]


def other_forms(text: str, concept: str) -> list[str]:
    """The words of `text` that are `concept` in another form: "dogs", "hot-dog" for "hot dog", with invisible letters.

    Only English forms are known. What `occurrences` finds is not among them.
    """
    return _distinct_words(text, _spans_of_other_forms(text, concept))


def replace_concept(text: str, concept: str, replacement: str = "") -> str:
    """The text with `replacement` wherever `occurrences` and `other_forms` find the concept; dropped if that is empty.

    Dropping also removes what the words leave behind: blanks, commas, empty brackets, a possessive ending, Korean
    particles, and English articles, conjunctions and prepositions that have nothing to refer to any more.
    What is left may be empty.

    Raises:
        ValueError: the concept is blank.
    """
    spans = sorted(occurrences(text, concept) + _spans_of_other_forms(text, concept))
    for start, end in reversed(spans):
        after = text[end:] if replacement else _without_ending(text[start:end], text[end:])
        text = text[:start] + _GAP + replacement + after
    for pattern, instead in _AGREEMENT if replacement else (*_LEFT_BEHIND, *_AGREEMENT):
        text = pattern.sub(instead, text)
    return text.replace(_GAP, "").strip()


def similar_words(text: str, concept: str) -> list[str]:
    """The words of `text` that may have to do with `concept`: "hotdog" with "dog", "cafe" with "café".

    They contain its letters, with or without accents, or start with all of them but the last, or but "ing". What
    `occurrences` finds is not among them.
    """
    found = occurrences(text, concept)
    parts = _fold(concept, without=_INVISIBLE + _OPTIONAL_MARKS).text.split()
    if not parts:  # a concept of accents
        return []
    folded = _fold(text, without=_INVISIBLE + _OPTIONAL_MARKS)
    pattern = r"\s+".join(map(re.escape, parts))
    if _is_in_word(parts[-1][-1]) and len(parts[-1]) > _LEAST_STEM:
        ending = 3 if parts[-1].endswith("ing") and len(parts[-1]) >= _LEAST_STEM + 3 else 1
        pattern = rf"{pattern}|(?<!\w){pattern[:-ending]}"
    spans = [_widened(text, folded.span(match)) for match in re.finditer(pattern, folded.text)]
    return _distinct_words(text, [span for span in spans if not _overlaps(span, found)])


def has_unspaced_script(text: str) -> bool:
    """Whether a text has letters of a script that puts no spaces between words, such as Chinese."""
    return _UNSPACED.search(text) is not None


def _spans_of_other_forms(text: str, concept: str) -> list[Span]:
    found = occurrences(text, concept)
    parts = [part for part in re.split(r"[\s_-]+", _fold(concept, without=_INVISIBLE).text) if part]
    if not parts:  # a concept of hyphens
        return []
    pattern = r"[\s_-]*".join("(?:" + "|".join(map(_spelling, _forms(part))) + ")" for part in parts)
    folded = _fold(text, without=_INVISIBLE)
    spans = [folded.span(match) for match in _whole_words(folded, re.compile(pattern))]
    return [span for span in spans if not _overlaps(span, found)]


def _without_ending(word: str, after: str) -> str:
    """What comes after a word, without its possessive ending or its Korean particles."""
    last, folded = _fold(word).text[-1], _fold(after)
    possessive = re.compile(r"'s?(?!\w)" if last == "s" else r"'s(?!\w)")
    ending = (_particles_after(last) if _is_hangul(last) else possessive).match(folded.text)
    return after[folded.span(ending)[1] :] if ending is not None and ending.group() else after


class _Folded(NamedTuple):
    """A folded text, and for each of its characters the letter with its marks, in the original, that it comes from."""

    text: str
    origins: list[Span]

    def span(self, match: re.Match[str]) -> Span:
        return self.origins[match.start()][0], self.origins[match.end() - 1][1]


@lru_cache(maxsize=16)
def _fold(text: str, without: str = "") -> _Folded:
    """Folds a text. Characters in `without`, written as in a regular expression's [], are left out."""
    removed = re.compile(f"[{without}]") if without else None
    characters: list[str] = []
    origins: list[Span] = []
    start = 0
    for end in range(1, len(text) + 1):
        if end < len(text) and _is_mark(text[end]):
            continue
        letter = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text[start:end]).casefold())
        letter = letter.translate(_SAME).replace("i\u0307", "i")  # İ, as if it were I
        if removed is not None:
            letter = removed.sub("", letter)
        characters.append(letter)
        origins.extend([(start, end)] * len(letter))
        start = end
    return _Folded("".join(characters), origins)


def _whole_words(folded: _Folded, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
    position = 0
    while (match := pattern.search(folded.text, position)) is not None:
        if _starts_word(folded, match.start()) and _ends_word(folded, match.end()):
            yield match
            position = match.end()
        else:
            position = match.start() + 1


def _starts_word(folded: _Folded, start: int) -> bool:
    if start == 0:
        return True
    before, first = folded.text[start - 1], folded.text[start]
    if folded.origins[start - 1] == folded.origins[start] or before in _NEVER_LAST:
        return False
    return not _is_in_word(before) or _changes_word(before, first)


def _ends_word(folded: _Folded, end: int) -> bool:
    if end == len(folded.text):
        return True
    last, after = folded.text[end - 1], folded.text[end]
    if folded.origins[end - 1] == folded.origins[end] or after in _NEVER_FIRST:
        return False
    if not _is_in_word(after) or _changes_word(last, after):
        return True
    return _is_hangul(last) and _particles_after(last).match(folded.text, end) is not None


def _changes_word(left: str, right: str) -> bool:
    """Whether a word may end between two letters because of their scripts."""
    return bool(_UNSPACED.match(left) or _UNSPACED.match(right)) or _is_hangul(left) != _is_hangul(right)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _is_in_word(character: str) -> bool:
    return character.isalnum() or _is_mark(character) or character in _JOINERS


def _is_hangul(character: str) -> bool:
    return "\u1100" <= character <= "\u11ff"  # folding takes syllables apart


def _particles_after(letter: str) -> re.Pattern[str]:
    return _PARTICLES_AFTER_CONSONANT if "\u11a8" <= letter <= "\u11ff" else _PARTICLES_AFTER_VOWEL


def _particles(own: str) -> re.Pattern[str]:
    """Matches the plural's ending and up to two particles, at the end of a word. `own` are those of the noun."""
    noun, plural, further = (
        "|".join(_fold(f"{particles} {_PARTICLES}").text.split()) for particles in (own, _AFTER_CONSONANT, "는 은")
    )
    return re.compile(rf"(?:{noun}|{_fold('들').text}(?:{plural})?)(?:{further})?(?![^\W_])")


_PARTICLES_AFTER_VOWEL, _PARTICLES_AFTER_CONSONANT = _particles(_AFTER_VOWEL), _particles(_AFTER_CONSONANT)


def _forms(word: str) -> list[str]:
    """The word and its forms by `_ENDINGS`, the longest first; of other letters than a to z, the word alone."""
    forms = {word}
    if re.fullmatch(r"[a-z\u0300-\u036f]+", word):
        for pair in _ENDINGS:
            for ending, other in (pair, pair[::-1]):
                form = word.removesuffix(ending) + other
                if word.endswith(ending) and len(form) >= _LEAST_FORM:
                    forms.add(form)
    return sorted(forms, key=lambda form: (-len(form), form))


def _spelling(word: str) -> str:
    """Matches the word with or without hyphens between its letters."""
    return "-?".join(map(re.escape, word))


def _widened(text: str, span: Span) -> Span:
    """The whole words that a span is part of."""
    start, end = span
    while start > 0 and _is_in_word(text[start - 1]) and not _UNSPACED.match(text[start - 1]):
        start -= 1
    while end < len(text) and _is_in_word(text[end]) and not _UNSPACED.match(text[end]):
        end += 1
    return start, end


def _overlaps(span: Span, others: list[Span]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in others)


def _distinct_words(text: str, spans: list[Span]) -> list[str]:
    return list(dict.fromkeys(text[start:end] for start, end in spans))
