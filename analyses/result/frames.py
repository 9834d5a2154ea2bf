"""Frames that a CSV can keep, and how they are read back with their dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from analyses.result.spreadsheets import unguarded
from reflowlens.errors import ReflowlensError


def read_frame(path: Path, dtypes: Mapping[str, str], is_guarded: bool) -> pd.DataFrame:
    cells = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, skip_blank_lines=False)
    cells = unguarded(cells) if is_guarded else cells
    if list(cells.columns) != list(dtypes):
        raise ReflowlensError(f"{path.name}: the columns {list(dtypes)} were expected, got {list(cells.columns)}")
    return pd.DataFrame({column: _parse(cells[column], dtype) for column, dtype in dtypes.items()})


def _parse(cells: pd.Series, dtype: str) -> pd.Series:
    """Text to the dtype it was written from: through Python's parser, since not every pandas reads floats exactly."""
    text = cells.to_numpy(dtype=object)
    if dtype == "bool":
        return pd.Series(text == "True")
    if dtype.startswith("float"):
        return pd.Series(np.where(text == "", "nan", text).astype(dtype))
    if "int" in dtype:
        return pd.Series(text.astype(dtype))
    return cells


def tidy(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """A copy whose rows are numbered from 0 and whose columns a CSV can keep."""
    if not isinstance(frame, pd.DataFrame):
        raise ReflowlensError(f"frames[{name!r}]: a DataFrame was expected, got {type(frame).__name__}")
    if frame.index.nlevels > 1 or frame.index.name is not None or not pd.api.types.is_integer_dtype(frame.index):
        raise ReflowlensError(f"frames[{name!r}]: the index holds data; make it a column with reset_index()")
    columns = list(frame.columns)
    readable = all(isinstance(column, str) and column and column.isprintable() for column in columns)
    if not readable or not 0 < len(columns) == len(set(columns)):
        raise ReflowlensError(f"frames[{name!r}]: distinct, printable column names were expected, got {columns}")
    return pd.DataFrame({column: _tidy_column(frame[column], f"frames[{name!r}][{column!r}]") for column in columns})


def _tidy_column(values: pd.Series, where: str) -> pd.Series:
    values = values.reset_index(drop=True)
    if isinstance(values.dtype, np.dtype) and values.dtype.kind in "biuf":
        return values
    if values.isna().any():
        raise ReflowlensError(f"{where}: a value is missing; write '' for text there is none of, NaN in a float column")
    kind = pd.api.types.infer_dtype(values)
    if isinstance(values.dtype, pd.CategoricalDtype) or kind not in ("string", "empty"):
        raise ReflowlensError(f"{where} holds {kind}: whole numbers, floats, booleans or text were expected")
    return values.astype(str)
