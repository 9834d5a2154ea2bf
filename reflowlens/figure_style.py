"""How figures look"""

TEMPLATE = "reflowlens"
SUFFIXES = (".html", ".json", ".png", ".svg", ".pdf")

# Okabe and Ito (2008), without black and yellow, which vanish on a dark and on a light page.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CONTROL_GREYS = ("#8C8C8C", "#A9A9A9", "#737373", "#BDBDBD")
INK = "#7A7A7A"  # contrast 4.3 against white and against #14161A
_GRID = "rgba(128, 128, 128, 0.22)"
_CLEAR = "rgba(0, 0, 0, 0)"
_DASHES = ("dash", "dot", "dashdot", "longdash")
_HATCHES = ("/", "x", ".", "\\")


@functools.cache
def register_template() -> go.layout.Template:
    """Register the template with plotly as ``"reflowlens"`` and return it; builders do so by themselves.

    Example: ``register_template(); plotly.io.templates.default = "reflowlens"`` for a notebook's own figures.
    """
    import plotly.graph_objects as go
    import plotly.io as pio

    axis = {
        "automargin": True,
        "gridcolor": _GRID,
        "linecolor": INK,
        "showline": True,
        "tickcolor": INK,
        "ticks": "outside",
        "ticklen": 4,
        "title": {"standoff": 10},
        "zeroline": False,
    }
    layout = {
        "colorway": PALETTE,
        "font": {"family": "Inter, system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 13, "color": INK},
        "hoverlabel": {"bgcolor": "#24272D", "bordercolor": "#5A5F69", "font": {"color": "#F4F4F4"}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
        "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "title": {"x": 0, "xref": "paper", "xanchor": "left", "yref": "container", "y": 1, "yanchor": "top", "pad": {"t": 16}},
        "xaxis": axis,
        "yaxis": axis,
    }
    pio.templates[TEMPLATE] = go.layout.Template(layout=layout)
    return pio.templates[TEMPLATE]


def label(value: object) -> str:
    """A value as plotly shows it literally: markup escaped, blank tokens and line breaks made visible.

    >>> label("\\n"), label(" "), label(" Paris"), label("<b>")
    ('⏎', '␣', ' Paris', '&lt;b&gt;')
    """
    text = str(value)
    if text and not text.strip(" "):
        text = "␣" * len(text)
    for blank, sign in (("\n", "⏎"), ("\r", "⏎"), ("\t", "⇥")):
        text = text.replace(blank, sign)
    return html.escape(text, quote=False)


@dataclass(frozen=True)
class Series:
    """One group of rows and how it is drawn."""

    name: str
    rows: pd.DataFrame
    color: str
    dash: str
    hatch: str
    symbol: str


def series_of(frame: pd.DataFrame, color: str | None, controls: Collection[str]) -> Iterator[Series]:
    """The groups in order of appearance: measurements take the palette's colours, controls its greys."""
    if color is None:
        yield Series("", frame, PALETTE[0], "solid", "", "circle")
        return
    names = list(dict.fromkeys(frame[color]))
    if missing := [control for control in controls if control not in names]:
        raise ReflowlensError(f"controls: {color!r} has no value {missing[0]!r}; it has {', '.join(map(repr, names))}")
    measured = 0
    control = 0
    for name in names:
        rows = frame[frame[color] == name]
        if name in controls:
            i, control = control, control + 1
            grey = CONTROL_GREYS[i % len(CONTROL_GREYS)]
            yield Series(label(name), rows, grey, _DASHES[i % len(_DASHES)], _HATCHES[i % len(_HATCHES)], "x")
        else:
            yield Series(label(name), rows, PALETTE[measured % len(PALETTE)], "solid", "", "circle")
            measured += 1


def blank_figure(title: str, x_title: str, y_title: str) -> go.Figure:
    template = register_template()
    import plotly.graph_objects as go

    figure = go.Figure(layout={"template": template, "xaxis_title": label(x_title), "yaxis_title": label(y_title)})
    if title:
        figure.update_layout(title_text=label(title), margin_t=90)
    return figure


def check_columns(frame: pd.DataFrame, columns: Sequence[str | None]) -> None:
    if frame.empty:
        raise ReflowlensError("a figure needs at least one row; this frame has none")
    for column in columns:
        if column is not None and column not in frame.columns:
            raise ReflowlensError(f"no column {column!r}; the frame has {', '.join(map(repr, frame.columns))}")


def hover_texts(frame: pd.DataFrame, columns: Sequence[str], low: str | None = None, high: str | None = None) -> list[str]:
    """One text a row: the interval, where there is one, and a line "column: value" for each column."""
    texts = []
    for row in frame.to_dict("records"):
        lines = [f"{words(column)}: {_shown(row[column])}" for column in columns]
        if low is not None and high is not None:
            lines.insert(0, f"({_shown(row[low])} to {_shown(row[high])})")
        texts.append("<br>".join(lines))
    return texts


def _shown(value: Any) -> str:
    """A cell for a hover box: numbers to four digits, long text wrapped, which plotly does not do."""
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return "<br>".join(label(line) for line in textwrap.wrap(str(value), 60, drop_whitespace=False)) or "''"


def faded(color: str, opacity: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def words(column: str) -> str:
    return column.replace("_", " ")
