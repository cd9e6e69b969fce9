"""Print the constraints of an environment: those of constraints.txt, with the lines of environments/NAME.txt instead.

A line `package==version` takes the place of the one for the same package, or is added; a bare `package` lifts its pin.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent


def pins(path: Path) -> dict[str, str]:
    """Requirement lines of a file, by normalised package name."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {re.split(r"[=<>! ]", line)[0].lower().replace("_", "-"): line for line in lines if line}


def merged(name: str) -> list[str]:
    """The constraints of an environment; those of constraints.txt where the folder has no such file."""
    path = HERE / f"{name}.txt"
    found = pins(HERE.parent / "constraints.txt") | (pins(path) if path.is_file() else {})
    return [line for line in found.values() if re.search(r"[=<>!]", line)]


if __name__ == "__main__":
    print("\n".join(merged(sys.argv[1])))
