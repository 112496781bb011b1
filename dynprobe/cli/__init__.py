"""The command line: parse, build a typed configuration, call one protocol. No logic of its own."""

from dynprobe.cli._main import main

__all__ = ["main"]
