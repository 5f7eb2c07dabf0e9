"""Reads predictions of anybody's models: `.npy`, `.csv`, `.parquet`.

Ids are names: they are compared as the text that a .csv has of them, and a row
without one has the empty name.

Shape suffixes: N examples, C classes.
"""

import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from codistill_jax import statistics

from . import retrains
from .retrains import Row

_TABLES = ('.csv', '.tsv', '.parquet')
# Of numbers; NA may be an id.
_MISSING = ('', 'NA', 'N/A', 'NaN', 'nan', 'null', 'NULL', 'None')


class Columns(NamedTuple):
  """What the columns of tables are called.

  Attributes:
    predictions: One, of the positive class, or one for each class in order.
    label: Of the class; may be missing.
    id: Of what tells examples apart; '' if files agree row by row.
  """

  predictions: Sequence[str]
  label: str
  id: str


class PredictionTable(NamedTuple):
  """One model.

  Attributes:
    name: The file, as it was given.
    probs: (N,) or (N, C).
    ids: (N,), each once; a range for files that agree row by row.
    labels: (N,) integers; None if there are none.
    unused: Other columns that tell examples apart, unless there are ids.
  """

  name: str
  probs: np.ndarray
  ids: pd.Index
  labels: np.ndarray | None
  unused: Mapping[str, pd.Series]


def compare(
    named: Sequence[tuple[str, str]], columns: Columns, labels: str | None
) -> tuple[list[Row], dict[str, list[tuple[str, str]]], int]:
  """Compares the models of each arm, and the arms.

  Args:
    named: Arm and file of each model.
    columns: Of the tables.
    labels: The file with them; None: those of the predictions, if any.

  Returns:
    A row of figures for each arm; by arm, the files of each pair in the order
    of a figure's values; and how many examples there are.

  Raises:
    ValueError: If these are not at least two files of the same examples.
    OSError: If one cannot be read.
  """
  if len(named) < 2:
    raise ValueError('churn is between models: give --predictions twice')
  for again in (x for i, x in enumerate(named) if x in named[:i]):
    raise ValueError(
        f'{again[1]} is given twice; a model has no churn against itself'
    )
  given = None
  if labels:
    given = _read_labels(labels, columns)
    columns = columns._replace(label='')
  models = [read(path, columns) for _, path in named]
  arrays, joined = join(models, given)
  paths = [os.path.abspath(path) for _, path in named]
  # Their names, if all lie in one directory.
  together = os.path.commonpath(map(os.path.dirname, paths))
  arms: dict[str, list[np.ndarray]] = {}
  names: dict[str, list[str]] = {}
  for (arm, _), array, path in zip(named, arrays, paths):
    arms.setdefault(arm, []).append(array)
    names.setdefault(arm, []).append(os.path.relpath(path, together))
  pairs = {arm: list(itertools.combinations(x, 2)) for arm, x in names.items()}
  return retrains.summarise(arms, joined), pairs, len(arrays[0])


def read(path: str, columns: Columns) -> PredictionTable:
  """Reads one file of predictions.

  Raises:
    ValueError: If it is of no known kind, a column is missing, ids repeat, or
      what it holds are no probabilities.
    OSError: If it cannot be read.
  """
  if _is_array(path, columns):
    probs = statistics.check_probabilities(retrains.load_array(path), path)
    return PredictionTable(path, probs, pd.RangeIndex(len(probs)), None, {})
  table = _read_table(path, columns)
  picked = [_numbers(table, column, path) for column in columns.predictions]
  probs = picked[0] if len(picked) == 1 else np.stack(picked, axis=1)
  probs = statistics.check_probabilities(probs, path)
  labels = None
  if columns.label in table:
    try:
      labels = statistics.check_labels(
          _numbers(table, columns.label, path),
          probs,
          f'{path}, {columns.label}',
      )
    except ValueError as e:
      raise ValueError(f'{e}; to read no labels, give --label_column=') from e
  used = {*columns.predictions, columns.label}
  unused = {
      name: values
      for name, values in table.items()
      if name not in used
      and pd.api.types.is_hashable(values.iloc[0])
      and values.is_unique
  }
  ids = _ids(table, columns.id, path)
  return PredictionTable(path, probs, ids, labels, {} if columns.id else unused)


def join(
    models: Sequence[PredictionTable], labels: pd.Series | None = None
) -> tuple[list[np.ndarray], np.ndarray | None]:
  """Joins the same examples of all models, and their labels.

  Args:
    models: At least two.
    labels: Of a file of their own; None: those that the predictions bring
      along.

  Returns:
    Arrays (N,) or (N, C), and labels (N,) or None. With ids, the examples and
    the order are those of the first model.

  Raises:
    ValueError: If the models are not of the same examples.
  """
  first = models[0]
  for other in models[1:]:
    _check_same_examples(first, other)
  places = [_places(first.ids, m.ids, m.name) for m in models]
  arrays = [m.probs[place] for m, place in zip(models, places)]
  if labels is not None:
    by_row = isinstance(labels.index, pd.RangeIndex)
    if by_row and len(labels) != len(first.probs):
      raise ValueError(
          f'{len(first.probs):,} predictions, but {len(labels):,} labels; give'
          ' one for each, or --id_column'
      )
    values = labels.to_numpy()
    return arrays, values[_places(first.ids, labels.index, 'labels')]
  found = [
      (m.name, m.labels[place])
      for m, place in zip(models, places)
      if m.labels is not None
  ]
  for other in found[1:]:
    _check_same_labels(*found[0], *other, first.ids)
  return arrays, found[0][1] if found else None


def _check_same_labels(name_a, labels_a, name_b, labels_b, ids) -> None:
  wrong = np.flatnonzero(labels_a != labels_b)
  if wrong.size:
    row = int(wrong[0])
    where, remedy = f'id {ids[row]!r}', 'give --labels'
    if isinstance(ids, pd.RangeIndex):
      where, remedy = f'row {row:,}', 'to join them, give --id_column'
    raise ValueError(
        f'{name_a} and {name_b} have other labels for {wrong.size:,} of'
        f' {len(labels_a):,} examples, the first {where}: {labels_a[row]} and'
        f' {labels_b[row]}; are these the same examples? If so, {remedy}'
    )


def _check_same_examples(
    first: PredictionTable, other: PredictionTable
) -> None:
  a, b = len(first.probs), len(other.probs)
  if a != b:
    raise ValueError(
        f'{first.name} has {a:,} predictions, {other.name} has {b:,}; predict'
        ' the same examples'
    )
  if first.probs.shape != other.probs.shape:
    raise ValueError(
        f'{first.name} has predictions of shape {first.probs.shape},'
        f' {other.name} of {other.probs.shape}; predict the same classes'
    )
  for column in first.unused.keys() & other.unused.keys():
    ours, theirs = (m.unused[column].tolist() for m in (first, other))
    if ours != theirs and set(ours) == set(theirs):
      raise ValueError(
          f'{column} has the same values in {first.name} and {other.name}, in'
          f' another order; give --id_column={column} to join them'
      )


def _places(wanted: pd.Index, ids: pd.Index, name: str) -> np.ndarray:
  """Returns where the wanted ids are."""
  places = ids.get_indexer(wanted)
  missing = wanted[places < 0].tolist()
  if missing:
    raise ValueError(
        f'{name} lacks {len(missing):,} of {len(wanted):,} ids, such as'
        f' {missing[0]!r}'
    )
  return places


# --- Files -------------------------------------------------------------------


def _is_array(path: str, columns: Columns) -> bool:
  """Returns whether a file is .npy, and not a table; refuses all else."""
  ending = os.path.splitext(path)[1].lower()
  if ending not in ('.npy', *_TABLES):
    raise ValueError(
        f'{path}: unknown kind of file; expected .npy, {", ".join(_TABLES)}'
    )
  if not os.path.exists(path):
    raise FileNotFoundError(f'there is no file {path}')
  if ending == '.npy' and columns.id:
    raise ValueError(
        f'{path} has no ids; leave --id_column out, or give tables only'
    )
  return ending == '.npy'


def _read_labels(path: str, columns: Columns) -> pd.Series:
  """Reads labels (N,) by id; errors as `read`."""
  if _is_array(path, columns):
    return pd.Series(retrains.load_array(path))
  table = _read_table(path, columns)
  values = _numbers(table, columns.label, path)
  return pd.Series(values, _ids(table, columns.id, path))


def _ids(table: pd.DataFrame, column: str, path: str) -> pd.Index:
  if not column:
    return pd.RangeIndex(len(table))
  ids = pd.Index(_column(table, column, path), dtype=object)
  again = ids[ids.duplicated()]
  if len(again):
    raise ValueError(
        f'{path}: {len(again):,} duplicate ids, such as {again[0]!r}; give each'
        ' example once'
    )
  return ids


def _column(table: pd.DataFrame, column: str, path: str) -> pd.Series:
  if column not in table:
    raise ValueError(
        f'{path} has no column {column!r}; it has'
        f' {", ".join(map(str, table.columns))}'
    )
  return table[column]


def _numbers(table: pd.DataFrame, column: str, path: str) -> np.ndarray:
  values = _column(table, column, path)
  numbers = pd.to_numeric(values, errors='coerce')
  wrong = np.flatnonzero(numbers.isna() & values.notna())
  if len(wrong):
    raise ValueError(
        f'{path}, {column}: expected numbers, got {values.iloc[wrong[0]]!r} in'
        f' row {wrong[0]:,}'
    )
  return numbers.astype(
      float if numbers.isna().any() else numbers.dtype
  ).to_numpy()


def _read_table(path: str, columns: Columns) -> pd.DataFrame:
  ending = os.path.splitext(path)[1].lower()
  try:
    if ending == '.parquet':
      return _read_parquet(path, columns.id)
    separator = '\t' if ending == '.tsv' else ','
    # Pandas would give the second column of a name another one.
    head = pd.read_csv(path, sep=separator, header=None, nrows=1, dtype=str)
    again = head.T[0][head.T[0].duplicated()].dropna().tolist()
    if again:
      raise ValueError(f'it has two columns {again[0]!r}')
    with warnings.catch_warnings():
      # Of rows that are longer than the header.
      warnings.simplefilter('error', pd.errors.ParserWarning)
      return pd.read_csv(
          path,
          sep=separator,
          # Or the first column of such rows would be taken for an index, and
          # each of the others would have the name of its neighbour.
          index_col=False,
          dtype={columns.id: str},
          keep_default_na=False,
          na_values=dict.fromkeys(
              (*columns.predictions, columns.label), _MISSING
          ),
      )
  # Also a parser's errors, what pyarrow cannot do, and lengths that lie.
  except (
      ValueError,
      NotImplementedError,
      MemoryError,
      pd.errors.ParserWarning,
  ) as e:
    raise ValueError(f'{path} cannot be read as {ending[1:]}: {e}') from e


def _read_parquet(path: str, id_column: str) -> pd.DataFrame:
  from pyarrow import parquet

  table = parquet.read_table(path)
  frame = table.to_pandas()
  if id_column in frame.index.names:
    frame = frame.reset_index(id_column)
  if id_column in frame:
    ids = frame[id_column]
    if id_column in table.column_names:
      # Not by way of pandas: where one is missing, it rounds integers.
      ids = table[id_column].to_pylist()
    frame[id_column] = list(map(_name, ids))
  return frame


def _name(value: Any) -> str:
  if isinstance(value, bytes):
    return value.decode(errors='surrogateescape')
  return '' if value is None else str(value)
