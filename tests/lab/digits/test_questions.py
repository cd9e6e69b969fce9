"""Every answer is derived a second time, from the facts of the scene and the words of the question."""

import re

import pytest

from dropflow_lab.digits.checkpoints.model import build_processor
from dropflow_lab.digits.data.dataset import examples, question_at
from dropflow_lab.digits.data.questions import KINDS, VOCABULARY, ask_all
from dropflow_lab.digits.data.scenes import draw_scene

NAMES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]


def solve(scene, text):
    """Return all right answers to `text`, by rules of their own."""
    board = {NAMES[3 * item.row + item.column]: (item.digit, item.color) for item in scene.items}
    digits = [digit for digit, _ in board.values()]
    asked = [int(word) for word in text.split() if word.isdigit()]
    if found := re.fullmatch(r"what digit is at the (.+) \?", text):
        return {str(board[found[1]][0])}
    if text.startswith("where"):
        return {name for name, (digit, _) in board.items() if digit == asked[0]}
    if text.startswith("is there"):
        return {"yes" if asked[0] in digits else "no"}
    if text.startswith("how many"):
        return {str(len(board))}
    if text.startswith("what color"):
        return {color for digit, color in board.values() if digit == asked[0]}
    if found := re.fullmatch(r"what digit is just (left of|right of|above|below) the (\d) \?", text):
        jump = {"left of": -1, "right of": 1, "above": -3, "below": 3}[found[1]]
        answers = set()
        for name, (digit, _) in board.items():
            if digit == int(found[2]):
                here = NAMES.index(name)
                there = here + jump
                same_row = here // 3 == there // 3
                assert 0 <= there < 9
                assert abs(jump) == 3 or same_row
                answers.add((name, str(board[NAMES[there]][0])))
        assert len(answers) == 1
        return {answer for _, answer in answers}
    if found := re.fullmatch(r"what digit is (\w+) \?", text):
        matches = [str(digit) for digit, color in board.values() if color == found[1]]
        assert len(matches) == 1
        return set(matches)
    if "largest" in text or "smallest" in text:
        return {str(sorted(digits)[-1 if "largest" in text else 0])}
    if text.startswith("read"):
        return {" ".join(str(board[name][0]) for name in NAMES if name in board)}
    row = re.fullmatch(r"what is the sum of the (\w+) row \?", text)[1]
    return {str(sum(digit for name, (digit, _) in board.items() if name.startswith(row)))}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_question_has_exactly_the_answer_it_states(split):
    seen = dict.fromkeys(KINDS, 0)
    for seed in range(150):
        scene = draw_scene(split, seed, (3, 9))
        for kind, questions in ask_all(scene).items():
            for question in questions:
                assert question.kind == kind
                assert solve(scene, question.text) == {question.answer}
                seen[kind] += 1
    assert min(seen.values()) > 100


def test_questions_about_one_scene_differ():
    for seed in range(50):
        texts = [q.text for questions in ask_all(draw_scene("test", seed)).values() for q in questions]
        assert len(texts) == len(set(texts))


def test_evidence_names_the_digits_in_question():
    scene, question = question_at("test", 6)
    assert question.kind == "rel"
    first, second = (scene.items[index] for index in question.evidence)
    assert f"the {first.digit} ?" in question.text
    assert str(second.digit) == question.answer
    assert abs(first.row - second.row) + abs(first.column - second.column) == 1


def test_vocabulary_is_closed():
    tokenizer = build_processor().tokenizer
    assert len(VOCABULARY) == len(set(VOCABULARY)) == len(tokenizer) == 82
    for index in range(2000):
        question = question_at("test", index, seed=3)[1]
        for text in (question.text, question.answer):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_examples_repeat_and_a_longer_draw_only_appends():
    short, long = list(examples("test", 12, 4)), list(examples("test", 20, 4))
    assert [(e.question, e.answer, e.image.tobytes()) for e in short] == [
        (e.question, e.answer, e.image.tobytes()) for e in long[:12]
    ]
    assert [example.kind for example in long] == [*KINDS, *KINDS]
    assert long[0].image.size == (96, 96)
    other = list(examples("test", 12, 5))
    assert [e.image.tobytes() for e in short] != [e.image.tobytes() for e in other]


def test_exist_is_balanced():
    answers = [question_at("test", index)[1].answer for index in range(2, 2000, 10)]
    assert 80 <= answers.count("yes") <= 120
    assert set(answers) == {"yes", "no"}
