"""Signals: the coordinates in which a prediction is read.

A :class:`SignalView` is a recipe R [d_vocab, S] and a basis B [S, d_model] with R B = W_E. (Where a model has an
unembedding of its own, or prunes R at one end alone, W_E stands for W_Uᵀ here; a bias b_U is no signal's.) A reFlow
model was trained with one, its ``native`` view. The other views are computed from any model's weights, of reFlow's too,
so that a claim about signals can be compared with coordinates that were not trained:

=============  =================  =============  ==================================================================
view           recipe             basis          what it is for
=============  =================  =============  ==================================================================
``native``     R                  B              the signals that the model was trained with
``identity``   W_E                I              every model: the residual stream's own axes
``svd``        U                  Σ Vᵀ           every model: principal directions of the embedding
``rotated``    R A                Aᵀ B           the same logits for every orthogonal A: the null of any
                                                 statement about single signals
``varimax``    R A                Aᵀ B           the A with the largest kurtosis of the columns of R A: how sparse
                                                 single signals can be without training
=============  =================  =============  ==================================================================

A dictionary's features are a view too (:mod:`reflowlens.dictionary_view`), of which R B = W_E does not hold: what its
features leave out is carried along behind its signals in every readout and every row that logits are read off with.

A view reads a residual stream through the final norm. Where a model refines that stream before it reads logits off it
(``ttt_flow``), this is a logit lens and no prediction; ``view.final`` reads ``model.final_stream`` instead, of which
logits in front of the cap are exact sums.

Readout coordinates, a = B norm_final(x), and write coordinates, r in x = r B, differ unless B Bᵀ = I; each function
says which it uses.
"""

from reflowlens.signals.rotated import random_rotation as random_rotation
from reflowlens.signals.rotated import rotate as rotate
from reflowlens.signals.rotated import varimax_of as varimax_of
from reflowlens.signals.rotated import varimax_view as varimax_view
from reflowlens.signals.view import SignalView as SignalView
from reflowlens.signals.views import VIEWS as VIEWS
from reflowlens.signals.views import AnyView as AnyView
from reflowlens.signals.views import ViewName as ViewName
from reflowlens.signals.views import signal_view as signal_view
from reflowlens.signals.views import view_of as view_of
