"""Ten kinds of questions about a scene, each asked only where it has exactly one right answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from dropflow_lab.digits.data.scenes import COLORS, COLUMNS, ROWS, Item, Scene

RELATIONS: dict[str, tuple[int, int]] = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
}
"""Step in rows and columns from the named digit to the one that is asked for."""


@dataclass(frozen=True)
class Question:
    """A question, its answer and the digits needed to answer it."""

    text: str
    answer: str
    kind: str
    evidence: tuple[int, ...]
    """Indices into `scene.items`."""


def ask_all(scene: Scene) -> dict[str, list[Question]]:
    """Return every question with an answer in the scene, by kind; a kind may have none."""
    return {kind: ask(scene) for kind, ask in _KINDS.items()}


def _position(item: Item) -> str:
    return f"{ROWS[item.row]} {COLUMNS[item.column]}"


def _unique_digits(scene: Scene) -> list[tuple[int, Item]]:
    times = Counter(item.digit for item in scene.items)
    return [(i, item) for i, item in enumerate(scene.items) if times[item.digit] == 1]


def _pos(scene: Scene) -> list[Question]:
    return [
        Question(f"what digit is at the {_position(item)} ?", str(item.digit), "pos", (i,))
        for i, item in enumerate(scene.items)
    ]


def _where(scene: Scene) -> list[Question]:
    return [
        Question(f"where is the {item.digit} ?", _position(item), "where", (i,)) for i, item in _unique_digits(scene)
    ]


def _exist(scene: Scene) -> list[Question]:
    questions = []
    for digit in range(10):
        places = tuple(i for i, item in enumerate(scene.items) if item.digit == digit)
        evidence = places or tuple(range(len(scene.items)))
        questions.append(Question(f"is there a {digit} ?", "yes" if places else "no", "exist", evidence))
    return questions


def _count(scene: Scene) -> list[Question]:
    number = len(scene.items)
    return [Question("how many digits are there ?", str(number), "count", tuple(range(number)))]


def _c2d(scene: Scene) -> list[Question]:
    times = Counter(item.color for item in scene.items)
    return [
        Question(f"what digit is {item.color} ?", str(item.digit), "c2d", (i,))
        for i, item in enumerate(scene.items)
        if times[item.color] == 1
    ]


def _d2c(scene: Scene) -> list[Question]:
    return [Question(f"what color is the {item.digit} ?", item.color, "d2c", (i,)) for i, item in _unique_digits(scene)]


def _rel(scene: Scene) -> list[Question]:
    cells = {(item.row, item.column): i for i, item in enumerate(scene.items)}
    questions = []
    for i, item in _unique_digits(scene):
        for words, (down, across) in RELATIONS.items():
            other = cells.get((item.row + down, item.column + across))
            if other is not None:
                text = f"what digit is just {words} the {item.digit} ?"
                questions.append(Question(text, str(scene.items[other].digit), "rel", (i, other)))
    return questions


def _maxmin(scene: Scene) -> list[Question]:
    digits, evidence = [item.digit for item in scene.items], tuple(range(len(scene.items)))
    return [
        Question("what is the largest digit ?", str(max(digits)), "maxmin", evidence),
        Question("what is the smallest digit ?", str(min(digits)), "maxmin", evidence),
    ]


def _read(scene: Scene) -> list[Question]:
    answer = " ".join(str(item.digit) for item in scene.items)
    return [Question("read all digits row by row .", answer, "read", tuple(range(len(scene.items))))]


def _sum(scene: Scene) -> list[Question]:
    questions = []
    for row, name in enumerate(ROWS):
        members = tuple(i for i, item in enumerate(scene.items) if item.row == row)
        if members:
            total = sum(scene.items[i].digit for i in members)
            questions.append(Question(f"what is the sum of the {name} row ?", str(total), "sum", members))
    return questions


_KINDS: dict[str, Callable[[Scene], list[Question]]] = {
    "pos": _pos,
    "where": _where,
    "exist": _exist,
    "count": _count,
    "c2d": _c2d,
    "d2c": _d2c,
    "rel": _rel,
    "maxmin": _maxmin,
    "read": _read,
    "sum": _sum,
}
KINDS: tuple[str, ...] = tuple(_KINDS)

SPECIAL_WORDS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_TEXT_WORDS = (
    "user assistant : ? . , what digit digits is are at the where there a an in how many color just of above "
    "below largest smallest read all row by sum which number picture yes no"
)
VOCABULARY: tuple[str, ...] = (
    *SPECIAL_WORDS,
    *_TEXT_WORDS.split(),
    *ROWS,
    *COLUMNS,
    *COLORS,
    *(str(number) for number in range(28)),
)
"""All words, in the order of their ids. Numbers go up to 27, the sum of three nines."""
