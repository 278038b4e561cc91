"""Is a completion right? Take its final answer out and compare it with the gold answer.

Invariant: the kind of the gold answer (number, choice, letter, truth value, text) decides what is looked for, so that a
stray "no" or number elsewhere in a completion is not taken for the answer. Pure; called by the evaluation.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Literal

Kind = Literal["number", "choice", "letter", "truth", "yes_no", "text"]

_RELATIVE_TOLERANCE = 1e-4
_SIGNS = str.maketrans("\u2212\u00d7\u00f7", "-*/")
_LONGEST_EXPRESSION = 200

_ANSWER_IS = re.compile(r"\banswer\s*(?:is\b|:|=)\s*:?", re.IGNORECASE)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+"
# A sign counts where no number or closing bracket stands before it: in "48-2" the last number is 2.
_NUMBER = re.compile(rf"(?<![\w.])(?:(?<![\w)])-\s?)?\$?\s?(?:\d+\s+\d+/\d+|(?:{_DIGITS})(?:\s?/\s?\d+)?)")
_EQUATION = re.compile(r"^\s*[A-Za-z]\s*=\s*([-+*/(). \d]+?)\s*$", re.MULTILINE)
_EXPRESSION = re.compile(r"[-+*/(). \d]*\d[-+*/(). \d]*")
_PATTERNS: dict[Kind, re.Pattern[str]] = {
    "choice": re.compile(r"\b(answer|option|ending|solution)\s?([1-5])\b", re.IGNORECASE),
    "truth": re.compile(r"\b(true|false)\b", re.IGNORECASE),
    "yes_no": re.compile(r"\b(yes|no)\b", re.IGNORECASE),
    "letter": re.compile(r"(?<![\w'])\(?([A-E])\)?(?![\w'])"),
}
_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def extract_answer(text: str) -> str | None:
    """The final answer that `text` gives, or None.

    What follows the last "answer is" decides; without it an equation line `x = 3*6` is evaluated, and then the last
    choice, number, truth value or letter of the text is taken. Numbers come without $, thousands commas, final dot.
    """
    kinds: tuple[Kind, ...] = ("choice", "number", "truth", "yes_no", "letter")
    tail = _stated(text)
    if tail is not None:
        found = [answer for kind in kinds if (answer := _find(tail, kind, last=False)) is not None]
        return found[0] if found else _plain(tail) or None
    found = [answer for kind in kinds if (answer := _find(text, kind, last=True)) is not None]
    return found[0] if found else None


def matches(completion: str, answer: str) -> bool:
    """Whether the completion's final answer equals `answer`.

    Whole numbers must be equal; others agree within a relative 1e-4. Choices, letters and truth values compare without
    case. Any other answer must equal what follows "answer is", or the whole completion, up to case and spacing.
    """
    kind = _kind(answer)
    tail = _stated(completion)
    if kind == "text":
        return _plain(completion if tail is None else tail) == _plain(answer)
    given = _find(completion, kind, last=True) if tail is None else _find(tail, kind, last=False)
    if given is None:
        return False
    if kind == "number":
        return _same_number(_value(given), _value(answer))
    return given.casefold() == (_find(answer, kind, last=True) or answer).casefold()


def evaluate_expression(text: str) -> float | None:
    """Value of an arithmetic expression of numbers, + - * / and brackets; None for anything else or x / 0."""
    if len(text) > _LONGEST_EXPRESSION:
        return None
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value if math.isfinite(value) else None


def _evaluate(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.operand))
    raise ValueError("not arithmetic")


def _stated(text: str) -> str | None:
    """What stands after the last "answer is", up to the end of the line (of the next line if nothing follows)."""
    ends = [match.end() for match in _ANSWER_IS.finditer(text)]
    return text[ends[-1] :].strip().partition("\n")[0].strip() if ends else None


def _kind(answer: str) -> Kind:
    answer = answer.strip()
    if _value(answer) is not None:
        return "number"
    for kind, pattern in _PATTERNS.items():
        if pattern.fullmatch(answer.upper() if kind == "letter" else answer):
            return kind
    return "text"


def _find(text: str, kind: Kind, *, last: bool) -> str | None:
    """The first or last answer of this kind in `text`, in its plain form."""
    if kind == "number":
        return _find_number(text, last=last)
    if kind == "letter" and len(text.strip(" .()")) == 1:  # a lone "b"; in a sentence only capitals count
        text = text.upper()
    found = list(_PATTERNS[kind].finditer(text))
    if not found:
        return None
    answer = "".join(found[-1 if last else 0].groups())
    return answer if kind == "letter" else answer.lower()


def _find_number(text: str, *, last: bool) -> str | None:
    text = text.translate(_SIGNS)
    if last:
        equations = _EQUATION.findall(text)
        if equations and (value := evaluate_expression(equations[-1])) is not None:
            return _shortest(value)
    else:
        text = text.rsplit("=", 1)[-1]  # "the answer is 3*6 = 18"
        expression = text.strip().rstrip(".")
        if _EXPRESSION.fullmatch(expression) and (value := evaluate_expression(expression)) is not None:
            return _shortest(value)
    found = [match.group() for match in _NUMBER.finditer(text)]
    return re.sub(r"[$,]", "", found[-1 if last else 0]).strip() if found else None


def _value(text: str) -> float | None:
    """Number that `text` is as a whole: 1,234 or $5.00 or 3/4 or 1 1/2 or 50%."""
    plain = re.sub(r"[$,%]", "", text.strip().rstrip(".")).replace("- ", "-")
    mixed = re.fullmatch(r"(-?)(\d+)\s+(\d+)/(\d+)", plain)
    if mixed:
        sign, whole, above, below = mixed.groups()
        return None if not int(below) else (int(whole) + int(above) / int(below)) * (-1 if sign else 1)
    above_text, slash, below_text = plain.partition("/")
    try:
        value = float(above_text) / (float(below_text) if slash else 1.0)
    except (ValueError, ArithmeticError):
        return None
    return value if math.isfinite(value) else None


def _same_number(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return False
    if one.is_integer() and other.is_integer():  # 12345 is not 12346, close as they are
        return one == other
    return math.isclose(one, other, rel_tol=_RELATIVE_TOLERANCE, abs_tol=1e-9)


def _shortest(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .\"'")
