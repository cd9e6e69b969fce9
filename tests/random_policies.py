"""Random policies over every registered stage, and random damage to the text of a policy."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from tiny import prompt

import dropflow
from dropflow.errors import DropflowError
from dropflow.policy import registry
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape

EXTREMES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "nan", "1e308", "9" * 50, "${name}", "${oc.env:HOME}", [], {}, {"a": 1}, [[1]]),
    *(-1, 0, 1, 2, 2**31 - 1, 2**31, -(2**31), 2**63, 10**30, 10**5000),
    *(0.0, 1e-308, 0.5, 1.0, 1e9, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
)
SHAPES = (BackboneShape(6, 16), BackboneShape(1, 1), BackboneShape(32, 576), BackboneShape(6, None))
LIMIT = 1.0
"""Seconds of CPU that a fault may take to be found."""
LINE = 1_000
"""Characters of one line of a message."""


def schemas() -> dict[str, dict[str, Any]]:
    """JSON Schema of the options of every stage."""
    names = registry.names(registry.STAGES)
    return {name: registry.load(registry.STAGES, name).Options.model_json_schema() for name in names}


def random_policy(chance: random.Random, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A policy of one to three stages whose options are mostly of the right type."""
    stages: dict[Any, Any] = {}
    for number in range(chance.choice((1, 1, 2, 3))):
        use = chance.choice(sorted(options))
        schema = options[use]
        required = schema.get("required", [])
        entry = {
            name: _value(chance, described, schema)
            for name, described in schema["properties"].items()
            if name in required or chance.random() < 0.5
        }
        stages[f"s{number}"] = {"use": use, **entry}
    policy: dict[str, Any] = {"name": "fuzz", "stages": stages}
    if chance.random() < 0.2:
        policy["positions"] = chance.choice(("compact", "persistent", *EXTREMES[:5]))
    if chance.random() < 0.2:
        policy["tuned_for"] = {"layers": chance.choice((6, 3, 32)), "visual_tokens": chance.choice((16, 9, 576))}
        policy["rescale"] = chance.random() < 0.7
    if chance.random() < 0.1:
        stages[chance.choice(("s0", 3, "3", None, "a b", "..", "x" * 5000))] = chance.choice(EXTREMES)
    return policy


def _value(chance: random.Random, described: dict[str, Any], root: dict[str, Any]) -> Any:
    """Mostly what the schema describes; sometimes an extreme."""
    if chance.random() < 0.04:
        return chance.choice(EXTREMES)
    if "$ref" in described:
        described = root["$defs"][described["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in described:
        return _value(chance, chance.choice(described["anyOf"]), root)
    if "enum" in described or "const" in described:
        return chance.choice(described.get("enum", [described.get("const")]))
    return _OF_TYPE[described.get("type", "null")](chance, described, root)


def _integer(chance: random.Random, described: dict[str, Any], _: dict[str, Any]) -> int:
    low = described.get("minimum", described.get("exclusiveMinimum", -4))
    usual = (int(low), chance.randint(0, 7), chance.randint(1, 5), chance.randint(0, 20))
    return 2**31 - 1 if chance.random() < 0.04 else chance.choice(usual)


def _number(chance: random.Random, described: dict[str, Any], _: dict[str, Any]) -> float:
    extreme = (described.get("maximum", 1e-9), 1e-300, 2.0**31 - 1)
    return chance.choice(extreme) if chance.random() < 0.1 else chance.choice((1, 1, 10)) * chance.random()


def _array(chance: random.Random, described: dict[str, Any], root: dict[str, Any]) -> list[Any]:
    if "prefixItems" in described:
        return [_value(chance, part, root) for part in described["prefixItems"]]
    return [_value(chance, described.get("items", {}), root) for _ in range(chance.randint(0, 3))]


def _object(chance: random.Random, described: dict[str, Any], root: dict[str, Any]) -> dict[Any, Any]:
    if "properties" in described:
        return {name: _value(chance, part, root) for name, part in described["properties"].items()}
    keys = [chance.choice((chance.randint(0, 6), chance.randint(1, 5), chance.random())) for _ in range(2)]
    if chance.random() < 0.05:
        keys.append(chance.choice((None, "3", 3, True, "x", float("nan"), 2**70, (1, 2))))
    return {key: _value(chance, described["additionalProperties"], root) for key in keys}


_OF_TYPE: dict[str, Callable[..., Any]] = {
    "integer": _integer,
    "number": _number,
    "array": _array,
    "object": _object,
    "boolean": lambda chance, *_: chance.random() < 0.5,
    "string": lambda chance, *_: chance.choice(("x", "no/such", "")),
    "null": lambda *_: None,
}


def damaged(chance: random.Random, text: str) -> bytes:
    """The text of a policy after a few random edits: bytes, YAML's signs and fragments that are traps."""
    data = bytearray(text, "utf-8")
    traps = ("&a ", "*a", "<<: ", "${", "}", "${name}", "!!int ", *'{[|>%"', "- ", "? ", ": ", "\t", "\n")
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        kind = chance.random()
        if kind < 0.5:
            data[at:at] = chance.choice(traps).encode() * chance.choice((1, 1, 1, 3, 500))
        elif kind < 0.7:
            del data[at : at + chance.choice((1, 5, 100))]
        elif kind < 0.85:
            data[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 8))))
        else:
            data[at:at] = data[: chance.randrange(len(data) + 1)]
    return bytes(data)


def trial(work: Callable[[], object]) -> str:
    """What became of it: `valid`, `refused`, or what is wrong with how it was refused."""
    began = time.process_time()
    try:
        work()
        said = "valid"
    except DropflowError as error:
        lines = str(error).split("\n")
        clear = all(line and line.isprintable() and len(line) <= LINE for line in lines) and len(lines) <= 25
        said = "refused" if clear else f"unclear: {lines[0][:300]!r}"
    except (Exception, RecursionError) as error:  # noqa: BLE001  # what the test is about
        said = f"foreign: {type(error).__name__}: {str(error)[:300]}"
    return said if time.process_time() - began < LIMIT else f"over {LIMIT} s: {said}"


def use(model: Any, policy: dict[str, Any]) -> None:
    """Load a policy, resolve it for several shapes, attach it, and generate three tokens."""
    loaded = dropflow.load_policy(policy)
    for shape in SHAPES:
        try:
            resolve(loaded, shape).schedule(16 if shape.visual_tokens is None else None)
        except DropflowError:
            continue
    with torch.no_grad(), dropflow.attach(model, loaded), dropflow.questions(["what is it?"]):
        model.generate(**prompt([(3, "I", 5)]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
