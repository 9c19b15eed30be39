"""Generated tasks: right answers, splits that cannot overlap, demonstrations with the stated imperfections."""

import re
from collections import Counter

import pytest

from recipes.data import tasks
from recipes.data.tasks import chain_demonstration, chain_problem, word_problem


def solve_chain(prompt: str) -> str:
    """Independent solution: ignore the labels and evaluate from left to right."""
    words = [word for word in prompt.split() if word not in "ABC="]
    value = int(words.pop(0))
    while words:
        operator, operand = words.pop(0), int(words.pop(0))
        value = {"+": value.__add__, "-": value.__sub__, "*": value.__mul__}[operator](operand) % 10
    return str(value)


def test_chain_answers_are_right_and_all_digits_occur() -> None:
    problems = [chain_problem(3, index) for index in range(500)]
    assert all(problem.answer == solve_chain(problem.prompt) for problem in problems)
    assert len({problem.answer for problem in problems}) == 10
    assert re.fullmatch(r"\d A [-+*] \d B [-+*] \d C [-+*] \d =", problems[0].prompt)
    assert len({problem.id for problem in problems}) == 500


def test_solver_of_this_test() -> None:
    assert solve_chain("7 A + 5 B * 4 C - 9 =") == "9"


def test_problems_are_pure_functions_of_seed_and_index() -> None:
    forwards = [chain_problem(0, index) for index in range(20)]
    assert [chain_problem(0, index) for index in reversed(range(20))] == forwards[::-1]
    assert [chain_problem(1, index).prompt for index in range(20)] != [problem.prompt for problem in forwards]


def test_the_stream_of_problems_is_the_published_one() -> None:
    # Journals and results name problems by seed and index: a change of these texts invalidates them.
    assert chain_problem(0, 0).prompt == "0 A - 2 B * 0 C + 3 ="
    assert chain_problem(0, 1).prompt == "1 A * 5 B + 5 C * 0 ="


@pytest.mark.parametrize("generate", [chain_problem, word_problem])
def test_splits_are_disjoint_for_all_seeds(generate) -> None:
    train = {generate(seed, index).prompt for seed in range(2) for index in range(600)}
    heldout = {generate(seed, index, split="heldout").prompt for seed in range(2) for index in range(100)}
    assert not train & heldout
    assert all(tasks.split_of(text) == "heldout" for text in heldout)


def test_share_of_the_heldout_split() -> None:
    share = sum(tasks.split_of(f"text {i}") == "heldout" for i in range(8000)) / 8000
    assert abs(share - 1 / 16) < 0.01


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of train, heldout"):
        chain_problem(0, 0, split="test")
    with pytest.raises(ValueError, match="index must be >= 0"):
        word_problem(0, -1)


def test_demonstrations_use_training_problems_and_known_words() -> None:
    for index in range(300):
        prompt, response = chain_demonstration(0, index)
        assert prompt == chain_problem(0, index).prompt
        assert set(f"{prompt} {response}".split()) <= set(tasks.CHAIN_WORDS)
        assert re.fullmatch(r"((so|then|next|now|thus|hence) [ABC] ([-+*] \d )?\d ){1,3}# \d", response)
        assert " C " in response, "the last step is never merged away"


def test_demonstrations_are_as_wrong_and_as_varied_as_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    def accuracy(n: int = 1500) -> float:
        return sum(chain_demonstration(0, i)[1].split()[-1] == chain_problem(0, i).answer for i in range(n)) / n

    shown = [chain_demonstration(0, index)[1] for index in range(3000)]
    steps = Counter(response.count(" A ") + response.count(" B ") + response.count(" C ") for response in shown)
    assert abs((3 - sum(k * v for k, v in steps.items()) / 3000) - (0.1 + 0.9 * 0.1)) < 0.03  # two chances to merge
    connectors = Counter(word for response in shown for word in response.split() if word in tasks.CONNECTORS)
    assert max(connectors.values()) < 1.2 * min(connectors.values())
    assert 0.5 < accuracy() < 0.8
    for noise in ("P_STEP_WRONG", "P_COPY_WRONG", "P_MISCONCEPTION"):
        monkeypatch.setattr(tasks, noise, 0.0)
    assert accuracy() == 1.0, "without noise the teacher is right"


def test_misconceptions_are_fixed_wrong_facts() -> None:
    facts = [(x, operator, d) for x in range(10) for operator in tasks.OPERATORS for d in range(10)]
    believed = {fact: tasks.misconception(5, *fact) for fact in facts}
    wrong = {fact: value for fact, value in believed.items() if value is not None}
    assert all(value != tasks.apply_operator(*fact) and 0 <= value < 10 for fact, value in wrong.items())
    assert 15 <= len(wrong) <= 50  # 30 of 300 expected
    assert believed == {fact: tasks.misconception(5, *fact) for fact in facts}


def _by_hand(text: str) -> int:
    """Solve a story from its numbers, by its wording: a second implementation of every template."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    rules = [
        ("gives", "now", lambda a, b: a + b),
        ("lost", "", lambda a, b: a - b),
        ("boxes", "", lambda a, b: a * b),
        ("packs", "keep", lambda a, b, c: a * b - c),
        ("times as many", "together", lambda a, b: a * (1 + b)),
        ("equally", "", lambda total, friends, new: total / friends + new),
        ("an hour", "gift", lambda a, b, c, d: a * b * c - d),
        ("Wednesday", "", lambda a, b: a + 3 * (a + b)),
        ("train", "miles", lambda a, b, c, d: a * b + c * d),
    ]
    (solve,) = [rule for first, second, rule in rules if first in text and second in text]
    return solve(*numbers)


def test_word_problems_have_right_positive_answers_in_every_template() -> None:
    problems = [word_problem(1, index) for index in range(200)]
    assert all(int(problem.answer) == _by_hand(problem.prompt) for problem in problems)
    assert all(int(problem.answer) > 0 for problem in problems)
    assert len({re.sub(r"\d+|[A-Z][a-z]+", "", problem.prompt)[:20] for problem in problems}) >= 9
    assert not any("{" in problem.prompt for problem in problems)
