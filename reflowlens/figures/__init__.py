"""Figures from DataFrames: the few builders that experiments share, and their export to files.

Every builder takes a tidy frame (a row an observation) and names of its columns, and returns a plotly figure in the
``reflowlens`` template (:mod:`reflowlens.figures.template`). Series named in ``controls`` are drawn in greys, dashed or
hatched, so that a control is never mistaken for a measurement. Text from a frame is shown as it is, never as markup;
series and categories with the name of an identifier (``c_alone``) in words.

plotly is imported with the first figure, not with this module.
"""

from reflowlens.figures.builders import bars as bars
from reflowlens.figures.builders import dots as dots
from reflowlens.figures.builders import histogram_with_control as histogram_with_control
from reflowlens.figures.builders import line_with_band as line_with_band
from reflowlens.figures.effects import effect_grid as effect_grid
from reflowlens.figures.export import provenance as provenance
from reflowlens.figures.export import read_figure as read_figure
from reflowlens.figures.export import save_figure as save_figure
from reflowlens.figures.export import save_figures as save_figures
from reflowlens.figures.export import stamp as stamp
from reflowlens.figures.heatmap import heatmap as heatmap
from reflowlens.figures.scatter import scatter as scatter
from reflowlens.figures.table import table as table
from reflowlens.figures.template import register_template as register_template
