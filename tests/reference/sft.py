"""What a fine-tuned model should learn to write, byte by byte, without anything of reflowlens."""

from __future__ import annotations

from typing import Any

END = "end of document"
Unit = tuple["int | str", bool]  # a byte or END, and whether it is to be learned


def units(record: dict[str, Any]) -> list[Unit]:
    """A record's text: prompts are read, completions and answers learned, each with the document end behind it."""
    out: list[Unit] = []

    def say(text: str, learned: bool) -> None:
        for byte in text.encode("utf8"):
            out.append((byte, learned))

    if "prompt" in record:
        say(record["prompt"], False)
        say(record["completion"], True)
        out.append((END, True))
        return out
    speaker = "gpt"
    for turn in record["messages"] if "messages" in record else record["conversations"]:
        if isinstance(turn, str):
            speaker, text = ("human" if speaker == "gpt" else "gpt"), turn
        else:
            speaker = turn["role"] if "role" in turn else turn["from"]
            text = turn["content"] if "content" in turn else turn["value"]
        if speaker == "system":
            say(f"System: {text}\n\n", False)
        elif speaker in ("user", "human"):
            say(f"User: {text}\n\n", False)
        else:
            say("Assistant:", False)
            say(f" {text}", True)
            out.append((END, True))
    while out[-1][0] != END:
        out.pop()
    return out


def first_fit(lengths: list[int], width: int) -> list[list[int]]:
    """Bins filled one item after another, each into the first bin where it fits."""
    bins: list[list[int]] = []
    for length in lengths:
        for bin in bins:
            if sum(bin) + length <= width:
                bin.append(length)
                break
        else:
            bins.append([length])
    return bins
