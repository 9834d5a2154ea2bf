"""The README's blocks, and how one is run: code in one namespace, commands by the command line's own parser."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretraining.command import add_arguments
from pretraining.config import load_config
from reflowlens.cli import build_parser, main
from tests.support import ROOT

README = (ROOT / "README.md").read_text(encoding="utf8")
_TRAIN = "torchrun --nproc_per_node=4 -m pretraining.train "


@dataclass(frozen=True)
class Block:
    """A fenced block. ``condition`` is what its first line says it needs or takes, or empty: it runs anywhere."""

    text: str
    python: bool

    @property
    def condition(self) -> str:
        first = self.text.splitlines()[0]
        return first.removeprefix("# ") if re.match("# (needs|takes|in) ", first) else ""

    @property
    def commands(self) -> list[str]:
        return [line for line in self.text.splitlines() if not line.startswith("#")]

    def run(self, namespace: dict[str, Any], brief: bool = False) -> None:
        """In the working directory. A command that fails is an AssertionError.

        Args:
            brief: with fewer steps of training, and less to read of the example texts that are written first.
        """
        if self.python:
            exec(compile(self.text, "README.md", "exec"), namespace)
            return
        for command in self.commands:
            words = shlex.split(command, comments=True)
            if words[0] == "reflowlens":
                assert main([*words[1:], *(_fewer_steps(words) if brief else [])]) == 0, command
                if brief and words[1] == "examples":
                    text = Path(words[2]) / "val.txt"
                    text.write_text(text.read_text(encoding="utf8")[:15_000], encoding="utf8")
            else:
                subprocess.run(["bash", "-ec", command], check=True)

    def check(self) -> None:
        """That every command is one, with arguments and configurations that exist; nothing is run."""
        for command in self.commands:
            words = shlex.split(command, comments=True)
            if words[0] == "make":
                assert re.search(f"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE), command
                continue
            if command.startswith(_TRAIN):
                parser = argparse.ArgumentParser()
                add_arguments(parser)
                options = parser.parse_args(shlex.split(command.removeprefix(_TRAIN), comments=True))
            else:
                assert words[0] == "reflowlens", command
                options = build_parser().parse_args(words[1:])
            if words[1] == "train" or command.startswith(_TRAIN):
                load_config(options.config, options.set)


def _fewer_steps(words: list[str]) -> list[str]:
    """Arguments that make a command's training short, where it does not say itself how long it is."""
    if words[1] == "finetune":
        return ["--epochs", "1"]  # of two, the last counts
    says = "--dry-run" in words or any(word.startswith("run.steps=") for word in words)
    return ["--set", "run.steps=40"] if words[1] == "train" and not says else []


def blocks(text: str = README) -> list[Block]:
    """All of them, in order."""
    return [Block(found[2], found[1] == "python") for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)]
