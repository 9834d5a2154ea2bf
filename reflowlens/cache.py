"""TransformerLens's activation cache, with signals."""

from __future__ import annotations

import transformer_lens
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.signals import SignalView, ViewName, signal_view


class ActivationCache(transformer_lens.ActivationCache):
    """The activations of one forward pass; everything TransformerLens's cache does, and the readout in signals.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> logits, cache = model.run_with_cache("The capital of France is")
        >>> cache.signals(layer=3).shape
        torch.Size([1, 5, 256])
    """

    def __getitem__(self, key: str | tuple) -> Tensor:
        """An activation by name, or by TransformerLens's shorthand such as ``("resid_pre", 3)``.

        Raises:
            ReflowlensError: it was not cached; the message says how to cache it.
        """
        try:
            return super().__getitem__(key)
        except KeyError as error:
            name = str(error.args[0])
            self.model.check_hook_name(name)
            raise ReflowlensError(
                f"{name!r} is not in this cache; run_with_cache(..., names_filter=lambda name: True) keeps every "
                "point, attention squares too"
            ) from error

    def resid(self, layer: int | None = None) -> Float[Tensor, "*batch pos d_model"]:
        """The residual stream that block ``layer`` reads; ``n_layers``, or None, is the one that is unembedded."""
        n_layers = self.model.cfg.n_layers
        layer = n_layers if layer is None else layer
        if not 0 <= layer <= n_layers:
            raise ReflowlensError(f"layer must be between 0 and {n_layers} (the end of the model), got {layer}")
        return self["resid_post", n_layers - 1] if layer == n_layers else self["resid_pre", layer]

    def signals(
        self, layer: int | None = None, view: SignalView | ViewName | None = None
    ) -> Float[Tensor, "*batch pos S"]:
        """The readout a = B norm_final(x) of the residual stream that block ``layer`` reads (None: the end).

        At the end of a reFlow it is ``unembed.hook_signal``; earlier it is the factored logit lens.
        """
        return self._view(view).readout(self.resid(layer))

    def signal_contributions(
        self,
        target: str | int | Int[Tensor, "*batch pos"],
        layer: int | None = None,
        view: SignalView | ViewName | None = None,
    ) -> Float[Tensor, "*batch pos S"]:
        """What each signal adds to the target's logit at every position; sums over S to the logit (lens)."""
        return self._view(view).contributions(self.resid(layer), target)

    def _view(self, view: SignalView | ViewName | None) -> SignalView:
        return view if isinstance(view, SignalView) else signal_view(self.model, view)
