"""`python -m dropflow` runs the installed `dropflow` command, which is found by its entry point."""

import sys
from importlib.metadata import entry_points

for command in entry_points(group="console_scripts", name="dropflow"):
    sys.exit(command.load()())
sys.exit("error: the `dropflow` command is not installed; pip install dropflow")
