"""Is a completion right? Extract its final answer and compare it with the gold answer.

Invariant: the kind of the gold answer (number, choice, letter, truth value, text) decides what is searched for, so a stray
"no" or number elsewhere in a completion is not taken for the answer. A stated answer ("the answer is X", "X is correct") has
priority over a mentioned one. Pure; called by `metric`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from tc_ray.evaluation.answers.numbers import first_number, last_number, number_of, same_number

Kind = Literal["number", "choice", "letter", "truth", "text"]

_ANSWER_IS = re.compile(
    r"\b(?:answer|(?:correct|right|best)\s+(?:option|choice|solution|ending|one))\s*(?:is\b|:|=)\s*:?|####",
    re.IGNORECASE,
)
# "A" is an article before a small letter, unless a verb or conjunction follows: "A is wrong", "A dog"
_LETTER = r"(?<![\w'])\(?([B-E]|A(?!\s+(?!is\b|was\b|because\b|since\b|as\b|and\b|or\b|but\b)[a-z]))\)?(?![\w'])"
_PATTERNS: dict[Kind, re.Pattern[str]] = {
    "choice": re.compile(r"\b((?:answer|option|ending|solution|choice)\s?[1-5])\b", re.IGNORECASE),
    # "no" between words denies a noun: "there is no doubt"
    "truth": re.compile(r"\b(true|false|yes|(?<!\w )no|no(?!\s*[a-z]))\b", re.IGNORECASE),
    "letter": re.compile(_LETTER),
}
_CORRECT = re.compile(
    r"[\"'*)\]]*\s*(?:is|was|must be|seems|looks)\s+(?:the\s+)?(?:most\s+|only\s+|one\s+)?"
    r"(?:correct|right|best|true|answer|it)\b",
    re.IGNORECASE,
)
_WRONG = re.compile(
    r"[\"'*)\]]*\s*(?:is|was|are|seems|looks)(?:n't|\s+not|\s+\w*\s*(?:wrong|incorrect|false))\b", re.IGNORECASE
)
_DENIED = re.compile(r"\b(?:not|neither|nor|n't)\s+(?:the\s+)?[\"'*(\[]*$", re.IGNORECASE)
_LEADING = re.compile(r"\s*(?:[.):,;!*]|$|(?:because|since|as|for)\b)", re.IGNORECASE)
_BARE_CHOICE = re.compile(r"\W*([1-5])\W*(?:$|[.):,;]|\s)")
_DENIAL = 20
"""Characters before an answer that are searched for a denial."""
_SAME_TRUTH = {"yes": "true", "no": "false"}
_OTHER_TRUTH = {"true": "false", "false": "true"}


def matches(completion: str, answer: str) -> bool:
    """Whether the completion's final answer equals `answer`, or the answer that `answer` states.

    Numbers are equal within 1e-6 (`numbers.same_number`). Choices, letters and truth values compare without case; yes is true
    and no is false; the number alone matches a gold choice such as `answer3`, and "answer3" matches a gold `3`. Any other
    answer must equal the text after "answer is", or the whole completion, up to case and spacing.
    """
    stated_gold = _stated(answer)
    gold = (answer if stated_gold is None else stated_gold).strip().rstrip(".")
    kind, tail = _kind(gold), _stated(completion)
    if kind == "text":
        return _plain(completion if tail is None else tail) == _plain(gold)
    if kind == "number":
        return _is_number(completion, tail, gold)
    given = _find(completion, kind, tail)
    if given is None and kind == "choice":
        bare = _BARE_CHOICE.match(completion if tail is None else tail)
        return bare is not None and bare[1] == gold[-1]
    return given is not None and given == _form(gold, kind)


def _is_number(completion: str, tail: str | None, gold: str) -> bool:
    value = number_of(gold)
    given = last_number(completion) if tail is None else first_number(tail)
    if given is None:  # one of several numbered choices
        choice = _find(completion, "choice", tail)
        given = None if choice is None else Fraction(choice[-1])
    return given is not None and value is not None and same_number(given, value, gold)


def _stated(text: str) -> str | None:
    """The text after the last "answer is", up to the end of the line (of the next line if nothing follows)."""
    ends = [match.end() for match in _ANSWER_IS.finditer(text)]
    return text[ends[-1] :].strip().partition("\n")[0].strip() if ends else None


def _kind(gold: str) -> Kind:
    if number_of(gold) is not None:
        return "number"
    for kind, pattern in _PATTERNS.items():
        if pattern.fullmatch(gold.upper() if kind == "letter" else gold):
            return kind
    return "text"


def _find(text: str, kind: Kind, tail: str | None) -> str | None:
    """The answer of this kind that a completion gives, in its plain form.

    The first in the stated answer; else the first that is called correct; else the one that the text begins with; else the
    last. Answers called wrong do not count; a denied truth value is the opposite one.
    """
    place = text if tail is None else tail
    if kind == "letter" and len(place.strip(" .()*")) == 1:  # a lone "b"; in a sentence only capitals count
        place = place.upper()
    found: list[re.Match[str]] = []
    for match in _PATTERNS[kind].finditer(place):
        denied = _DENIED.search(place[max(0, match.start() - _DENIAL) : match.start()]) is not None
        if denied and kind == "truth":
            return _OTHER_TRUTH[_form(match[1], kind)]
        if not denied and not _WRONG.match(place, match.end()):
            found.append(match)
    if not found:
        return None
    correct = [match for match in found if _CORRECT.match(place, match.end())]
    if tail is not None:
        chosen = found[0]
    elif correct:
        chosen = correct[0]
    elif not place[: found[0].start()].strip(" *\"'\n") and _LEADING.match(place, found[0].end()):
        chosen = found[0]
    else:
        chosen = found[-1]
    return _form(chosen[1], kind)


def _form(answer: str, kind: Kind) -> str:
    if kind == "letter":
        return answer.strip("() ").upper()
    plain = re.sub(r"\s", "", answer.lower())
    return _SAME_TRUTH.get(plain, plain)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .\"'*`")
