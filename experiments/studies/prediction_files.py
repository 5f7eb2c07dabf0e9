"""Reads predictions of anybody's models: `.npy`, `.csv`, `.parquet`.

Shape suffixes: N examples, C classes.
"""

import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from codistill_jax import statistics

from .retrains import Row, summarise

_TABLES = ('.csv', '.tsv', '.parquet')


class Columns(NamedTuple):
  """What the columns of tables are called.

  Attributes:
    predictions: One, of the positive class, or one for each class in order.
    label: Of the class; may be missing.
    id: Of what tells examples apart; '' if files agree row by row.
  """

  predictions: Sequence[str] = ('prediction',)
  label: str = 'label'
  id: str = ''


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
    given = read_labels(labels, columns)
    columns = columns._replace(label='')
  models = [read(path, columns) for _, path in named]
  arrays, joined = join(models, given)
  arms: dict[str, list[np.ndarray]] = {}
  for (arm, _), array in zip(named, arrays):
    arms.setdefault(arm, []).append(array)
  return summarise(arms, joined), _pairs(named), len(arrays[0])


def _pairs(
    named: Sequence[tuple[str, str]],
) -> dict[str, list[tuple[str, str]]]:
  paths = [os.path.abspath(path) for _, path in named]
  # Their names, if all lie in one directory.
  together = os.path.commonpath(map(os.path.dirname, paths))
  found: dict[str, list[str]] = {}
  for (arm, _), path in zip(named, paths):
    found.setdefault(arm, []).append(os.path.relpath(path, together))
  return {
      arm: list(itertools.combinations(names, 2))
      for arm, names in found.items()
  }


def read(path: str, columns: Columns) -> PredictionTable:
  """Reads one file of predictions.

  Raises:
    ValueError: If it is of no known kind, a column is missing, ids repeat, or
      what it holds are no probabilities.
    OSError: If it cannot be read.
  """
  if _ending(path) == '.npy':
    _check_no_ids(path, columns)
    probs = statistics.check_probabilities(_read_npy(path), path)
    return PredictionTable(path, probs, pd.RangeIndex(len(probs)), None, {})
  table = _read_table(path)
  picked = [_column(table, c, path) for c in columns.predictions]
  probs = picked[0] if len(picked) == 1 else np.stack(_numbers(picked), axis=1)
  probs = statistics.check_probabilities(probs, path)
  labels = None
  if columns.label in table:
    labels = _column(table, columns.label, path)
    try:
      labels = statistics.check_labels(
          labels, probs, f'{path}, {columns.label}'
      )
    except ValueError as e:
      raise ValueError(f'{e}; to read no labels, give --label_column=') from e
  return PredictionTable(
      path,
      probs,
      _ids(table, columns.id, path),
      labels,
      {} if columns.id else _unused(table, columns),
  )


def _unused(table: pd.DataFrame, columns: Columns) -> dict[str, pd.Series]:
  read = {*columns.predictions, columns.label}
  return {
      name: values
      for name, values in table.items()
      if name not in read and values.is_unique
  }


def read_labels(path: str, columns: Columns) -> pd.Series:
  """Reads labels (N,) by id; errors as `read`."""
  if _ending(path) == '.npy':
    _check_no_ids(path, columns)
    return pd.Series(_read_npy(path))
  table = _read_table(path)
  values = _column(table, columns.label, path)
  return pd.Series(values, _ids(table, columns.id, path))


def _check_no_ids(path: str, columns: Columns) -> None:
  if columns.id:
    raise ValueError(
        f'{path} has no ids; leave --id_column out, or give tables only'
    )


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
    where, remedy = f'id {ids.tolist()[row]!r}', 'give --labels'
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
  for column, values in first.unused.items():
    theirs = other.unused.get(column)
    if theirs is not None and _shuffled(values, theirs):
      raise ValueError(
          f'{column} has the same values in {first.name} and {other.name}, in'
          f' another order; give --id_column={column} to join them'
      )


def _shuffled(a: pd.Series, b: pd.Series) -> bool:
  """Returns whether these are the same values in different orders."""
  return not np.array_equal(a, b) and set(a.tolist()) == set(b.tolist())


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


def _ids(table: pd.DataFrame, column: str, path: str) -> pd.Index:
  if not column:
    return pd.RangeIndex(len(table))
  ids = pd.Index(_column(table, column, path))
  again = ids[ids.duplicated()].tolist()
  if again:
    raise ValueError(
        f'{path}: {len(again):,} duplicate ids, such as {again[0]!r}; give each'
        ' example once'
    )
  return ids


def _column(table: pd.DataFrame, column: str, path: str) -> np.ndarray:
  if column not in table:
    raise ValueError(
        f'{path} has no column {column!r}; it has'
        f' {", ".join(map(str, table.columns))}'
    )
  return table[column].to_numpy()


def _numbers(columns: Sequence[np.ndarray]) -> list[np.ndarray]:
  try:
    return [np.asarray(c, np.float64) for c in columns]
  except (TypeError, ValueError) as e:
    raise ValueError(f'predictions are not numbers: {e}') from e


def _ending(path: str) -> str:
  ending = os.path.splitext(path)[1].lower()
  if ending not in ('.npy', *_TABLES):
    raise ValueError(
        f'{path}: unknown kind of file; expected .npy, {", ".join(_TABLES)}'
    )
  if not os.path.exists(path):
    raise FileNotFoundError(f'there is no file {path}')
  return ending


def _read_npy(path: str) -> np.ndarray:
  try:
    return np.load(path, allow_pickle=False)
  except (ValueError, EOFError) as e:
    raise ValueError(f'{path} is no array of numbers: {e}') from e


def _read_table(path: str) -> pd.DataFrame:
  ending = _ending(path)
  try:
    if ending == '.parquet':
      return pd.read_parquet(path)
    with warnings.catch_warnings():
      # Of rows that are longer than the header.
      warnings.simplefilter('error', pd.errors.ParserWarning)
      # Or the first column of such rows would be taken for an index, and each
      # of the others would have the name of its neighbour.
      separator = '\t' if ending == '.tsv' else ','
      return pd.read_csv(path, sep=separator, index_col=False)
  # Also a parser's errors; pyarrow, where it is missing, and what it cannot do.
  except (
      ValueError,
      ImportError,
      NotImplementedError,
      pd.errors.ParserWarning,
  ) as e:
    raise ValueError(f'{path} cannot be read as {ending[1:]}: {e}') from e
