"""``models`` and ``sample``: which models there are, and how one continues a prompt."""

from __future__ import annotations

import argparse

from reflowlens.cli.arguments import Commands, add_command, add_device, add_model
from reflowlens.errors import ReflowlensError


def add_commands(commands: Commands) -> None:
    _add_models(commands)
    _add_sample(commands)


def _add_models(commands: Commands) -> None:
    add_command(commands, "models", _models, "list the packaged models and the presets")


def _models(options: argparse.Namespace) -> None:
    from reflowlens.checkpoints import list_models, read_manifest
    from reflowlens.config import PRESETS
    from reflowlens.models import build_model

    print("packaged models (load_model, reflowlens run)")
    for name in list_models():
        facts = read_manifest(name)
        print(f"  {name:20} {facts['tokens_seen'] / 1e6:6.1f}M tokens seen, validation loss {facts['val_loss']:.3f}")
    print("presets (build_model, [model] preset = ...)")
    for name in PRESETS:
        print(f"  {name:20} {build_model(name, device='meta').n_parameters:>13,} parameters")


def _add_sample(commands: Commands) -> None:
    parser = add_command(commands, "sample", _sample, "continue a prompt")
    add_model(parser)
    parser.add_argument("prompt", nargs="+", help="one or more prompts, each quoted")
    parser.add_argument("--tokens", type=int, default=60, help="how many to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token")
    parser.add_argument("--top-k", type=int, help="sample among the k most probable tokens")
    parser.add_argument("--top-p", type=float, help="sample among the fewest tokens that reach this probability")
    parser.add_argument("--seed", type=int, default=0, help="prompt i draws with seed + i")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="answer each prompt as a question: of an instruct model, or after finetune on chats",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the system message says, with --chat")
    add_device(parser)


def _sample(options: argparse.Namespace) -> None:
    from reflowlens.checkpoints import load_model

    model = load_model(options.model, device=options.device)
    settings = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "seed")}
    if options.chat:
        from pretraining.chat import chat, recorded_template

        template = recorded_template(options.model, model.tokenizer)
        texts = chat(model, template, options.prompt, options.tokens, system=options.system, **settings)
    elif options.system is not None:
        raise ReflowlensError("--system is said in a chat: give --chat too")
    else:
        texts = model.generate(options.prompt, options.tokens, **settings)
    print("\n---\n".join(texts))
