"""A dictionary that learns: its weights, its optimiser, and what it remembers of the batches before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from pretraining.dictionaries.config import DictionarySpec
from pretraining.dictionaries.objective import Outcome, evaluate_objective
from reflowlens.dictionaries.config import WITH_K, DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary

_FIRST_PENALTY, _FIRST_THRESHOLD, _SMALLEST_THRESHOLD = 1e-3, 0.1, 1e-3
_PENALTY_RATE = 0.02  # by how much a step changes the penalty's weight where the features are twice too many
_THRESHOLD_MEMORY = 0.99  # of the running mean of the smallest activation that BatchTopK keeps
_RESAMPLED_NORM = 0.2  # of a resampled encoder row, in mean norms of those alive


class Learner:
    """One dictionary of a run.

    Everything is in the scale of the harvest's first round: what each layer reads and what it should write is
    multiplied with ``scale_in`` and ``scale_out`` so that E‖·‖² is its width. :meth:`result` takes the factors into the
    weights.

    Attributes:
        dictionary: what learns, scaled.
        silent: of each layer, positions since each feature was active.
        penalty_weight: steered so that ``spec.l0`` features are active.
    """

    def __init__(
        self,
        spec: DictionarySpec,
        cfg: DictionaryConfig,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        dead_after: int,
        device: torch.device,
    ) -> None:
        self.spec, self.dead_after = spec, dead_after
        self.dictionary = Dictionary.fresh(cfg, spec.seed).to(device)
        self.scale_in = torch.ones(cfg.n_layers, device=device)
        self.scale_out = torch.ones(cfg.n_layers, device=device)
        self.silent = torch.zeros(cfg.n_layers, cfg.n_features, dtype=torch.long, device=device)
        self.penalty_weight = _FIRST_PENALTY
        for layer in self.dictionary.each_layer():
            if layer.threshold is not None:
                layer.threshold.data.fill_(_FIRST_THRESHOLD if spec.activation == "jumprelu" else 0.0)
                layer.threshold.requires_grad_(spec.activation == "jumprelu")
            layer.W_enc.requires_grad_(spec.frozen != "encoder")
            layer.b_enc.requires_grad_(spec.frozen != "encoder")
            layer.W_dec.requires_grad_(spec.frozen != "decoder")
        learning = [p for p in self.dictionary.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learning, lr=learning_rate, betas=betas, fused=True)
        for group in self.optimizer.param_groups:
            group["peak_lr"] = learning_rate

    @torch.no_grad()
    def start_from(self, means: Mapping[str, Float[Tensor, " d"]], squares: Mapping[str, float]) -> None:
        """Take scales, and the biases that the decoders begin with, from a first look at the activations.

        Args:
            means, squares: of each hook point, the mean vector and the mean squared norm.
        """
        cfg = self.dictionary.cfg
        for l, (read, written) in enumerate(zip(cfg.reads, cfg.writes, strict=True)):  # noqa: E741 (a layer)
            self.scale_in[l] = math.sqrt(cfg.d_in / max(squares[read], 1e-30))
            self.scale_out[l] = math.sqrt(cfg.d_out / max(squares[written], 1e-30))
            layer = self.dictionary.each_layer()[l]
            layer.b_dec.copy_(means[written] * self.scale_out[l])
            if cfg.kind == "sae":  # features are of what differs from the mean
                layer.b_enc.copy_(-(layer.W_enc @ layer.b_dec))

    def scaled(self, batch: Mapping[str, Float[Tensor, "position d"]]) -> tuple[list[Tensor], list[Tensor]]:
        """What each layer reads, and what it should write."""
        cfg = self.dictionary.cfg
        x = [batch[name] * scale for name, scale in zip(cfg.reads, self.scale_in, strict=True)]
        y = [batch[name] * scale for name, scale in zip(cfg.writes, self.scale_out, strict=True)]
        return x, y

    def dead(self) -> list[Int[Tensor, " dead"]]:
        """Features of each layer that have not been active for ``dead_after`` positions."""
        return [(of_layer >= self.dead_after).nonzero()[:, 0] for of_layer in self.silent]

    def step(
        self, batch: Mapping[str, Float[Tensor, "position d"]], *, clip: float, dtype: torch.dtype, world_size: int = 1
    ) -> dict[str, float | list[float]]:
        """Learn from a batch; processes average their gradients.

        Returns:
            ``fvu`` (of the batch), ``l0`` and ``dead`` (share) by layer, ``grad_norm`` and, where there is one,
            ``penalty_weight``.
        """
        x, y = self.scaled(batch)
        dead = self.dead()
        outcome = evaluate_objective(
            self.dictionary, self.spec, x, y, penalty_weight=self.penalty_weight, dead=dead, dtype=dtype
        )
        self.optimizer.zero_grad(set_to_none=True)
        outcome.objective.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if world_size > 1:
            _average(parameters, world_size)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        self.optimizer.step()
        self._after_step(outcome, len(x[0]), world_size)
        return _record(outcome, y, dead, self.spec, float(norm), self.penalty_weight)

    @torch.no_grad()
    def _after_step(self, outcome: Outcome, n: int, world_size: int) -> None:
        layers, spec = self.dictionary.each_layer(), self.spec
        fired = torch.stack(outcome.fired).int()
        kept = torch.tensor([*outcome.smallest, float(sum(outcome.n_active))], device=fired.device)
        if world_size > 1:
            dist.all_reduce(fired, dist.ReduceOp.MAX)
            dist.all_reduce(kept)
            kept /= world_size
        self.silent += n * world_size
        self.silent[fired.bool()] = 0
        if spec.activation in WITH_K:
            if spec.frozen != "decoder":
                for layer in layers:
                    layer.W_dec.div_(layer.W_dec.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None])
        else:
            l0 = float(kept[-1]) / (n * len(layers))
            too_many = max(-1.0, min(1.0, l0 / spec.l0 - 1.0))
            self.penalty_weight *= math.exp(_PENALTY_RATE * too_many)
        for layer, smallest in zip(layers, kept[:-1], strict=True):
            if layer.threshold is None:
                continue
            if spec.activation == "jumprelu":
                layer.threshold.clamp_(min=_SMALLEST_THRESHOLD)
            else:  # of the first step as it is: a mean that began at 0 would let too much through for long
                is_first = not bool(layer.threshold.any())
                layer.threshold.lerp_(smallest.expand_as(layer.threshold), 1 - _THRESHOLD_MEMORY * (not is_first))

    @torch.no_grad()
    def resample(self, batch: Mapping[str, Float[Tensor, "position d"]], *, seed: Sequence[int]) -> int:
        """Point dead features at what the dictionary explains worst, with a fresh optimiser; for kinds without a k.

        Of each, the encoder becomes an input drawn in proportion to its squared error, at 0.2 of the mean norm of the
        encoders alive, and the decoder that input's error at norm 1 (after Bricken et al., 2023). Of several processes
        the first one's batch decides. A null with a frozen half is left as it is.

        Returns:
            How many there were.
        """
        dead = self.dead()
        if self.spec.frozen or not any(map(len, dead)):
            return 0
        x, y = self.scaled(batch)
        outcome = evaluate_objective(self.dictionary, self.spec, x, y, penalty_weight=0.0, dead=dead)
        generator = torch.Generator().manual_seed(int(torch.tensor(list(seed)).sum()))
        for layer, read, error, chosen, silent in zip(
            self.dictionary.each_layer(), x, outcome.errors, dead, self.silent, strict=True
        ):
            if not len(chosen):  # in every process alike
                continue
            weights = error.square().sum(1).cpu().clamp_min(1e-30)  # evenly where nothing is left to explain
            drawn = torch.multinomial(weights, len(chosen), replacement=True, generator=generator).to(read.device)
            alive = silent < self.dead_after
            norm = layer.W_enc[alive].norm(dim=1).mean() if bool(alive.any()) else layer.W_enc.norm(dim=1).mean()
            layer.W_enc[chosen] = _unit(read[drawn]) * norm * _RESAMPLED_NORM
            layer.b_enc[chosen] = 0.0
            layer.W_dec[chosen] = 0.0
            layer.W_dec[chosen, 0] = _unit(error[drawn])
            for parameter in (layer.W_enc, layer.b_enc, layer.W_dec):
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment in self.optimizer.state.get(parameter, {}):
                        self.optimizer.state[parameter][moment][chosen] = 0.0
            silent[chosen] = 0
            if dist.is_initialized():
                for parameter in (layer.W_enc, layer.b_enc, layer.W_dec):
                    dist.broadcast(parameter.data, 0)
        return sum(map(len, dead))

    @torch.no_grad()
    def result(self) -> Dictionary:
        """The dictionary as it is used: of the model's own activations, without factors."""
        cfg = self.dictionary.cfg
        folded = Dictionary(cfg)
        folded.load_state_dict({name: t.detach().cpu().clone() for name, t in self.dictionary.state_dict().items()})
        scale_in, scale_out = self.scale_in.cpu(), self.scale_out.cpu()
        for l, layer in enumerate(folded.each_layer()):  # noqa: E741 (a layer)
            layer.W_enc.mul_(scale_in[l])
            layer.W_dec.div_(scale_out[l : l + cfg.reach(l), None])
            layer.b_dec.div_(scale_out[l])
            if layer.W_skip is not None:
                layer.W_skip.mul_(scale_in[l] / scale_out[l])
        return folded.eval()

    def state(self) -> dict[str, Tensor]:
        """Everything that a step depends on, by name."""
        names = {id(p): name for name, p in self.dictionary.named_parameters()}
        tensors = {f"weights/{name}": p.detach() for name, p in self.dictionary.named_parameters()}
        for parameter, entries in self.optimizer.state.items():
            tensors |= {f"optimizer/{names[id(parameter)]}/{entry}": value for entry, value in entries.items()}
        own = {"silent": self.silent, "scale_in": self.scale_in, "scale_out": self.scale_out}
        tensors |= own | {"penalty_weight": torch.tensor(self.penalty_weight, dtype=torch.float64)}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`.

        Raises:
            KeyError, RuntimeError: the tensors are another dictionary's.
        """
        parameters = dict(self.dictionary.named_parameters())
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weights/{name}"])
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, name, entry = key.split("/")
                self.optimizer.state[parameters[name]][entry] = value.clone().to(self.silent.device)
        self.silent.copy_(tensors["silent"])
        self.scale_in.copy_(tensors["scale_in"])
        self.scale_out.copy_(tensors["scale_out"])
        self.penalty_weight = float(tensors["penalty_weight"])


def _average(parameters: Sequence[Tensor], world_size: int) -> None:
    """Gradients, averaged over processes in one message."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter)


def _record(
    outcome: Outcome,
    y: Sequence[Tensor],
    dead: Sequence[Tensor],
    spec: DictionarySpec,
    norm: float,
    penalty_weight: float,
) -> dict[str, float | list[float]]:
    n = len(y[0])
    spread = [float((target - target.mean(0)).square().sum()) for target in y]
    record: dict[str, float | list[float]] = {
        "fvu": [error / of for error, of in zip(outcome.squared_error, spread, strict=True)],
        "l0": [active / n for active in outcome.n_active],
        "dead": [len(of_layer) / spec.n_features for of_layer in dead],
        "grad_norm": norm,
    }
    return record | ({} if spec.activation in WITH_K else {"penalty_weight": penalty_weight})


def _unit(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
