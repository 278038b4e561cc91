"""Extraction and comparison of final answers."""

from __future__ import annotations

import pytest

from tc_ray.evaluation.scoring import evaluate_expression, extract_answer, matches


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("x = 3*6\nThe answer is 18", "18"),
        ("x = 3*6", "18"),
        ("x = ((22-14)/4)", "2"),
        ("The answer is $1,234.50.", "1234.50"),
        ("The answer is 1. No, the answer is 2.", "2"),
        ("He had 48-2", "2"),
        ("5 cats and 7 dogs.", "7"),
        ("the correct answer is answer3", "answer3"),
        ("the correct answer is Option 2.", "option2"),
        ("the correct answer is true", "true"),
        ("Yes", "yes"),
        ("The answer is (B).", "B"),
        ("The answer is -30", "-30"),
        ("The answer is:\n12", "12"),
        ("The answer is 3*6 = 18", "18"),
        ("The answer is 3*6", "18"),
        ("I do not know", None),
        ("", None),
        ("The answer is Paris.", "paris"),
    ],
)
def test_extract(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("x = (3-1.1666666666666667)\nThe answer is 1.8333333", "1.833333"),
        ("The answer is 18.0", "18"),
        ("The answer is 1,234", "1234"),
        ("So it costs $ 12.00.", "12"),
        ("The answer is 3/4", "0.75"),
        ("The answer is 1 1/2", "1.5"),
        ("The answer is 0.5", "1/2"),
        ("x = 7/2", "3.5"),
        ("x = 0.3-0.1", "0.2"),
        ("The answer is \u22125", "-5"),
        ("The answer is 50%", "50"),
        ("the correct answer is answer2", "answer2"),
        ("Solution1 is right", "solution1"),
        ("ending 4", "ending4"),
        ("it is false", "False"),
        ("No.", "no"),
        ("(c)", "C"),
        ("The answer is C) red", "c"),
        ("It is a dog, so B", "B"),
        ("The answer is Paris", "paris"),
        ("['1', '2']", "['1', '2']"),
    ],
)
def test_matches(completion: str, answer: str) -> None:
    assert matches(completion, answer)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("The answer is 12346", "12345"),
        ("The answer is 18.1", "18"),
        ("The answer is 5", "-5"),
        ("x = 1/0", "7"),
        ("", "0"),
        ("The answer is", "3"),
        ("the correct answer is answer2", "answer1"),
        ("the correct answer is answer2", "2"),
        ("the correct answer is option1", "solution1"),
        ("true", "false"),
        ("There is no doubt: true", "no way"),
        ("The answer is A", "B"),
        ("a dog", "A"),
        ("x = __import__('os').getpid()", "1"),
    ],
)
def test_does_not_match(completion: str, answer: str) -> None:
    assert not matches(completion, answer)


def test_expressions_are_arithmetic_only() -> None:
    assert evaluate_expression("-(2+3)*4/8") == -2.5
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
