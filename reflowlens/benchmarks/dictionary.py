"""A training step of transcoders whose gradients touch active features alone, against dense autograd.

Six layers of width 256 as reflow-nano has them, 32 active features, 2,048 positions: the forward pass, both gradients
of encoder and decoder, and Adam. The dense step is what one writes first: every pre-activation, TopK scattered into a
matrix of zeros, two products, autograd. Where eai-sparsify is installed (``pip install --no-deps eai-sparsify==1.3.3
simple-parsing natsort schedulefree``), the step of its transcoder, of the same sizes, stands beside them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reflowlens.benchmarks.peak_memory import forget_peak, peak_resident
from reflowlens.benchmarks.table import Row
from reflowlens.benchmarks.timing import alternate, ratio
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary, DictionaryLayer
from reflowlens.dictionaries.sparse import decode, encode, largest
from reflowlens.errors import ReflowlensError

N_LAYERS, WIDTH, K, POSITIONS = 6, 256, 32, 2048
VARIANTS = ("dense", "sparse", "sparse, compared in bfloat16")
SPARSIFY = "eai-sparsify"


def bench_dictionary(n_features: Sequence[int] = (2048, 16384), rounds: int = 5) -> Iterator[Row]:
    """Time a step of each variant, in turns in one process, and measure its memory, each in a process of its own.

    Yields:
        One row a variant: ``features`` a layer, ``step``, ``tokens_per_s`` (of the median round), ``against_dense``
        (the median of the rounds' ratios: above 1 it is faster), ``peak_mb`` (weights, optimiser and the step together)
        and ``loss``, the same in ours up to rounding.
    """
    for features in n_features:
        steps = {variant: training_step(variant, features) for variant in _present()}
        losses = {variant: step() for variant, step in steps.items()}
        times = alternate(steps, rounds)
        for variant, seconds in times.items():
            yield {
                "features": features,
                "step": variant,
                "tokens_per_s": round(POSITIONS / statistics.median(seconds)),
                "against_dense": round(ratio(times["dense"], seconds), 2),
                "peak_mb": round(_peak_memory(variant, features) / 2**20),
                "loss": round(losses[variant], 5),
            }


def training_step(variant: str, n_features: int) -> Callable[[], float]:
    """A step of a variant, which returns its loss before the step, per component of the target."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(N_LAYERS, POSITIONS, WIDTH, generator=generator) for _ in range(2))
    layers, reconstruct = (_sparsify if variant == SPARSIFY else partial(_ours, variant))(n_features)
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.zeros(())
        for layer, read, target in zip(layers, x, y, strict=True):
            loss = loss + (reconstruct(layer, read) - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _ours(variant: str, n_features: int) -> tuple[nn.ModuleList, Callable[[Any, Tensor], Tensor]]:
    reads, writes = (tuple(f"blocks.{layer}.{point}" for layer in range(N_LAYERS)) for point in ("x", "y"))
    layers = Dictionary.fresh(DictionaryConfig(reads, writes, WIDTH, WIDTH, n_features, "topk", K)).layers
    dtype = torch.bfloat16 if "bfloat16" in variant else torch.float32

    def sparse(layer: DictionaryLayer, x: Tensor) -> Tensor:
        active = largest(x, layer.W_enc, layer.b_enc, K, dtype)
        return decode(encode(x, layer.W_enc, layer.b_enc, active).relu(), layer.W_dec[:, 0], active) + layer.b_dec

    def dense(layer: DictionaryLayer, x: Tensor) -> Tensor:
        return layer.write(layer.encode(x)) + layer.b_dec

    return layers, dense if variant == "dense" else sparse


def _sparsify(n_features: int) -> tuple[nn.ModuleList, Callable[[Any, Tensor], Tensor]]:
    """Transcoders of eai-sparsify, and its own forward pass."""
    with contextlib.redirect_stdout(io.StringIO()):  # it says which kernels it has
        from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[import-not-found]

    cfg = SparseCoderConfig(num_latents=n_features, k=K, transcode=True)
    layers = nn.ModuleList(SparseCoder(WIDTH, cfg) for _ in range(N_LAYERS))
    return layers, lambda layer, x: layer(x).sae_out


def _present() -> tuple[str, ...]:
    return (*VARIANTS, SPARSIFY) if importlib.util.find_spec("sparsify") else VARIANTS


def _peak_memory(variant: str, n_features: int) -> int:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    call = "import sys; from reflowlens.benchmarks.dictionary import print_memory; print_memory(*sys.argv[1:])"
    command = [sys.executable, "-c", call, variant, str(n_features)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode != 0:
        raise ReflowlensError(f"measuring the memory of {variant!r} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def print_memory(variant: str, n_features: str) -> None:
    """Take two steps, the second with everything held, and print how far they raise the process's largest size."""
    training_step(variant, K)()  # the libraries
    forget_peak()
    before = peak_resident()
    step = training_step(variant, int(n_features))
    for _ in range(2):
        step()
    print(peak_resident() - before)
