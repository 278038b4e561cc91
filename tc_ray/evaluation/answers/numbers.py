"""Numbers in text, exactly: the number that a text is, the value of its arithmetic, and when two numbers are the same.

Invariant: values are fractions, so that 0.3 - 0.1 is 0.2 and 10000.5 is not 10001. Work is bounded: no text of a model makes a
number of millions of digits. Called by `evaluation.answers.scoring`.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)
"""Gold answers of arithmetic sets are rounded to six decimals (11/6 is 1.833333), and so are numbers in their equations:
0.333333 + 0.333333 stands for 0.666667."""

_LONGEST_EXPRESSION = 200
_LARGEST = Fraction(10**308)
_SIGNS = str.maketrans("\u2212\u00d7\u00f7", "-*/")
_DECIMAL = re.compile(r"[-+]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][-+]?\d{1,3})?", re.ASCII)
_MIXED = re.compile(r"(-?)(\d{1,400})\s+(\d{1,400})/(\d{1,400})", re.ASCII)
_THOUSANDS = re.compile(r"(?<!\d)\d{1,3}(?:,\d{3})+(?!\d)", re.ASCII)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+"
# A sign counts only if no number or closing bracket precedes it: in "48-2" the last number is 2.
_NUMBER = re.compile(
    rf"(?<![\w.])(?:(?<![\w)])-\s?)?\$?\s?(?:\d+\s+\d+/\d+|(?:{_DIGITS})(?:\s?/\s?\d+(?!\.?\d))?)", re.ASCII
)
_EQUATION = re.compile(r"^\s*[A-Za-z]\s*=\s*([-+*/(). \d]+?)\s*$", re.MULTILINE)
_EXPRESSION = re.compile(r"[-+*/(). \d]*\d[-+*/(). \d]*")
_WORKING = re.compile(r"^\s*(?:[A-Za-z]\s*=)?(?:[-+*/(). $\d]*\d[-+*/(). $\d]*=)+\s*(?=[-$\d.])")
_OPERATORS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def number_of(text: str) -> Fraction | None:
    """The number that the whole of `text` is: 1,234 or $5.00 or 3/4 or 1 1/2 or 50% (which is 50); else None."""
    plain = re.sub(r"[$%]", "", _without_commas(text.translate(_SIGNS)).strip().rstrip(".")).replace("- ", "-").strip()
    mixed = _MIXED.fullmatch(plain)
    if mixed:
        sign, whole, above, below = mixed.groups()
        return None if not int(below) else (int(whole) + Fraction(int(above), int(below))) * (-1 if sign else 1)
    above, slash, below = plain.partition("/")
    numerator, denominator = _decimal(above.strip()), _decimal(below.strip()) if slash else Fraction(1)
    return numerator / denominator if numerator is not None and denominator else None


def last_number(text: str) -> Fraction | None:
    """Value of the last equation line `x = 3*6`; without one, the last number in the text."""
    text = _without_commas(text.translate(_SIGNS))
    equations = _EQUATION.findall(text)
    if equations and (value := evaluate_expression(equations[-1])) is not None:
        return value
    return _numbers(text, -1)


def first_number(text: str) -> Fraction | None:
    """The number that a statement begins with or results in: 18 in "3*6 = 18", in "3*6" and in "18, because 3*6 = 18"."""
    text = _WORKING.sub("", _without_commas(text.translate(_SIGNS)))
    expression = text.strip().rstrip(".")
    if _EXPRESSION.fullmatch(expression) and (value := evaluate_expression(expression)) is not None:
        return value
    return _numbers(text, 0)


def same_number(given: Fraction, gold: Fraction, gold_text: str) -> bool:
    """Equal within TOLERANCE, or within the last decimal of a gold answer with more than six."""
    decimals = re.search(r"\.(\d+)(?:[eE]([-+]?\d{1,3}))?|\d[eE]([-+]?\d{1,3})", gold_text)
    places = 0
    if decimals:
        places = len(decimals[1] or "") - int(decimals[2] or decimals[3] or 0)
    return abs(given - gold) <= min(TOLERANCE, Fraction(1, 10 ** max(0, places)))


def evaluate_expression(text: str) -> Fraction | None:
    """Value of an arithmetic expression of numbers, + - * / and brackets; None for anything else or x / 0."""
    if len(text) > _LONGEST_EXPRESSION:
        return None
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value if abs(value) < _LARGEST else None


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return Fraction(repr(node.value))  # the decimal as written, not the nearest binary number
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.operand))
    raise ValueError("not arithmetic")


def _numbers(text: str, place: int) -> Fraction | None:
    found = _NUMBER.findall(text)
    return number_of(found[place]) if found else None


def _decimal(text: str) -> Fraction | None:
    return Fraction(text) if _DECIMAL.fullmatch(text) else None


def _without_commas(text: str) -> str:
    return _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
