"""``python -m ovseg``: the command line."""

from .cli.ending import program

program()
