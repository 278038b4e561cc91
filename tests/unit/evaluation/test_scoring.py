"""Final answers: what is taken out of a completion, and which gold answers it meets. Wording as in the public sets' files."""

from __future__ import annotations

from fractions import Fraction

import pytest

from tc_ray.evaluation.answers.numbers import evaluate_expression, number_of
from tc_ray.evaluation.answers.scoring import matches

ARITHMETIC_RIGHT = [  # GSM8K, MAWPS, ASDiv, SVAMP
    ("72", "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether.\nThe answer is 72"),
    ("18", "x = 3*6\nThe answer is 18"),
    ("18", "x = 3*6"),
    ("2", "x = ((22-14)/4)"),
    ("1234.50", "The answer is $1,234.50."),
    ("1234.50", "The answer is 1234.5"),
    ("1,234", "The answer is 1234"),
    ("1234", "The answer is 1,234"),
    ("2", "The answer is 1. No, the answer is 2."),
    ("46", "x = 48-2"),
    ("7", "5 cats and 7 dogs."),
    ("-30", "The answer is -30"),
    ("-5", "The answer is \u22125"),
    ("12", "The answer is:\n12"),
    ("18", "The answer is 3*6 = 18"),
    ("18", "The answer is 3*6"),
    ("18", "The answer is 18, because 3*6 = 18 and 20-2 = 18"),
    ("20", "The answer is 20 because 2+2=4"),
    ("1.833333", "x = (3-1.1666666666666667)\nThe answer is 1.8333333"),
    ("1.833333", "x = 11/6"),
    ("0.666667", "x = 0.333333 + 0.333333"),
    ("0.1", "x = 0.3 - 0.2"),
    ("0.2", "x = 0.3-0.1"),
    ("3.5", "x = 7/2"),
    ("18", "The answer is 18.0"),
    ("12", "So it costs $ 12.00."),
    ("0.75", "The answer is 3/4"),
    ("3/4", "The answer is 0.75"),
    ("1/2", "The answer is 0.50"),
    ("1.5", "The answer is 1 1/2"),
    ("50", "The answer is 50%"),
    ("50%", "The answer is 50"),
    ("72", "Half of 48 is 24. #### 72"),
    ("Half of 48 is 24.\nThe answer is 72", "The answer is 72"),
    ("48/2 = 24\n#### 72", "#### 72"),
    ("1000000000.5", "The answer is 1000000000.5"),
    ("6.02e-23", "The answer is 6.02e-23"),
    ("18", "The answer is **18**."),
]
ARITHMETIC_WRONG = [
    ("10001", "The answer is 10000.5"),
    ("10000.5", "The answer is 10001"),
    ("10000.5", "The answer is 10000.6"),
    ("1000000000.5", "The answer is 1000000001"),
    ("12345", "The answer is 12346"),
    ("18", "The answer is 18.1"),
    ("0.25", "x = 2.99 / 12"),
    ("0.333333", "The answer is 0.3334"),
    ("6.02e-23", "The answer is 0"),
    ("6.02e-23", "The answer is 6.5e-23"),
    ("-5", "The answer is 5"),
    ("7", "x = 1/0"),
    ("0", ""),
    ("3", "The answer is"),
    ("18", "The answer is 1" + "8" * 5000),
    ("1", "The answer is 1e999999999"),
    ("1", "x = __import__('os').getpid()"),
    ("Half of 48 is 24.\nThe answer is 72", "The answer is 24"),
]
CHOICE_RIGHT = [  # OpenBookQA, PIQA, SIQA, WinoGrande, HellaSwag
    ("answer3", "the correct answer is answer3"),
    ("answer3", "The correct answer is Answer 3."),
    ("answer2", "the correct answer is answer2 since answer3 is about cats"),
    ("option2", "the correct answer is Option 2."),
    ("solution1", "Solution1 is right"),
    ("solution2", "Solution2 is correct because solution1 is not"),
    ("solution2", "I choose solution2 because solution1 is wrong"),
    ("ending4", "ending 4"),
    ("ending4", "the correct ending is ending4"),
    ("the correct answer is answer2", "the correct answer is answer2"),
    ("3", "the correct answer is answer3"),
    ("3", "option3"),
    ("answer3", "3"),
    ("answer3", "The answer is (3)"),
    ("answer3", "The answer is 3."),
    ("answer1", "The answer is not answer2 but answer1"),
]
CHOICE_WRONG = [
    ("answer1", "the correct answer is answer2"),
    ("solution1", "the correct answer is option1"),
    ("3", "the correct answer is answer2"),
    ("answer3", "The answer is 30"),
    ("answer3", "2"),
    ("solution1", "Solution2 is correct because solution1 is not"),
]
LETTER_RIGHT = [  # AQuA and other lettered choices
    ("C", "C is correct because A is wrong"),
    ("C", "A is wrong. C is the correct answer. B is close."),
    ("C", "A is wrong, so C"),
    ("C", "C, because A is wrong"),
    ("C", "C because A and B are too small"),
    ("B", "I think B because A is wrong"),
    ("B", "The answer is (B)."),
    ("B", "The answer is **B**"),
    ("B", "The correct option is B, not D"),
    ("B", "not A but B"),
    ("B", "It is a dog, so B"),
    ("B", "A dog barks, so B"),
    ("B", "B is a good pick. A dog barks."),
    ("C", "(c)"),
    ("c", "The answer is C) red"),
    ("(C)", "C"),
    ("C.", "The answer is C"),
]
LETTER_WRONG = [
    ("A", "C is correct because A is wrong"),
    ("A", "The answer is C because A is wrong"),
    ("B", "The answer is A"),
    ("A", "a dog"),
    ("A", "The answer is not A but B"),
    ("D", "B is correct, D is close"),
]
TRUTH_RIGHT = [  # BoolQ
    ("true", "the correct answer is true"),
    ("True", "it is true"),
    ("False", "it is false"),
    ("no", "No."),
    ("no", "No it is not."),
    ("yes", "true"),
    ("true", "Yes"),
    ("true", "Yes, because no other country does"),
    ("no", "the correct answer is false"),
    ("false", "The answer is no"),
    ("yes", "There is no doubt: true"),
    ("false", "That is not true"),
]
TRUTH_WRONG = [
    ("false", "true"),
    ("no", "true"),
    ("yes", "The answer is false"),
    ("true", "That is not true"),
    ("no", "There is no doubt: true"),
    ("true", "I do not know"),
]
TEXT_RIGHT = [
    ("paris", "The answer is Paris."),
    ("Paris", "  paris "),
    ("['1', '2']", "['1', '2']"),
    ("no way", "No way."),
]
TEXT_WRONG = [("no way", "There is no doubt: true"), ("Paris", "The answer is Rome"), ("Paris", "")]


@pytest.mark.parametrize(
    ("gold", "completion"), ARITHMETIC_RIGHT + CHOICE_RIGHT + LETTER_RIGHT + TRUTH_RIGHT + TEXT_RIGHT
)
def test_right(gold: str, completion: str) -> None:
    """Fault 14: gold 3 against "answer3", "yes" against true, and "C is correct because A is wrong" were counted as wrong."""
    assert matches(completion, gold)


@pytest.mark.parametrize(
    ("gold", "completion"), ARITHMETIC_WRONG + CHOICE_WRONG + LETTER_WRONG + TRUTH_WRONG + TEXT_WRONG
)
def test_wrong(gold: str, completion: str) -> None:
    """Fault 14: 10000.5 was counted as 10001, and "C is correct because A is wrong" as A."""
    assert not matches(completion, gold)


def test_expressions_are_arithmetic_only() -> None:
    assert evaluate_expression("-(2+3)*4/8") == -2.5
    assert evaluate_expression("0.1+0.2") == Fraction(3, 10)
    for text in (
        "9**9",
        "a+1",
        "1 if 1 else 2",
        "[1]",
        "'x'*3",
        "(" * 150,
        "1" * 300,
        "1/0",
        "1e308*1e308",
        "True",
        "",
    ):
        assert evaluate_expression(text) is None, text


@pytest.mark.parametrize(
    "text", ["", "x", "1_000", "nan", "inf", "1e9999999", "9" * 5000, "1/0", "1 1/0", "--5", "1/2/3"]
)
def test_what_is_no_number(text: str) -> None:
    assert number_of(text) is None
