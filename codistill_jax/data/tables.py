"""Tasks of tables: a label, columns of categories, columns of numbers.

Batches are those of `models/dnn.py`: 'inputs' of dense columns ('integers'
float32 (B, I)) and of ids of categories ('categories' int32 (B, K)), and
'labels', int32 (B,).

A raw category is a uint32, `MISSING` if there was none. Both ways to an id are
the same on every machine:

* `hashed`: id 0 is missing, a value has one of the `buckets` ids behind it.
* `vocabulary`: id 0 is missing, id 1 any value that is rare, which is one that
  the training split has less than `min_count` times, so also one that it never
  has; each of the others has an id of its own.

Numbers are standardised by the training split. A missing one is 0, and a column
that misses some has another one behind, which is 1 there.

Arguments of all such tasks:
  categories: 'hash' or 'vocabulary'.
  buckets: Of 'hash': ids of each column, or one number for all.
  min_count: Of 'vocabulary'.
  partition: 'shared' or 'disjoint': how groups divide the examples.
  seed: Of the order of examples and of the partition.
Of those whose rows are in memory:
  validation_fraction: Share of the validation split.
  test_fraction: Share of the test split.
  split_seed: Of the choice of the splits: a seed of the order moves none.
All raise FileNotFoundError or ValueError where data, a package or an argument
cannot be used.

Shape suffixes: B examples of a batch, I dense columns, K categorical columns, N
rows of a table.
"""

import functools
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from etils import epath

from codistill_jax import base
from codistill_jax.data import examples, order, records
from codistill_jax.storage.files import absolute, one_line

CATEGORIES = ('hash', 'vocabulary')
MISSING = 0  # A raw category that is none.

# How tables write that a number is missing.
_NO_NUMBER = ('', '?', 'NA', 'N/A', 'NaN', 'nan', 'NULL', 'null', 'None')
_HUGE = 1e100  # The squares of larger numbers overflow in a sum.

Counts = tuple[np.ndarray, np.ndarray]  # Values rising, and how often each.


class Rows(NamedTuple):
  """Rows in memory.

  Attributes:
    categories_NK: Raw categories, uint32.
    dense_NI: float64; NaN where a value is missing.
    labels_N: int32.
  """

  categories_NK: np.ndarray
  dense_NI: np.ndarray
  labels_N: np.ndarray


class Scaling(NamedTuple):
  """How numbers are standardised: by the training split.

  Attributes:
    mean_I: float64.
    deviation_I: float64.
    gaps: The columns that miss some, int64: each has one of 0 and 1 behind.
  """

  mean_I: np.ndarray
  deviation_I: np.ndarray
  gaps: np.ndarray

  def apply(self, dense_NI: np.ndarray) -> np.ndarray:
    """Standardises columns: float32 (N, I + gaps)."""
    scaled = (dense_NI - self.mean_I[None, :]) / self.deviation_I[None, :]
    return np.concatenate(
        [np.nan_to_num(scaled, nan=0.0), np.isnan(dense_NI[:, self.gaps])],
        axis=1,
    ).astype(np.float32)


class Columns(NamedTuple):
  """How the raw columns of a table become the inputs of a model.

  Attributes:
    categorical: The K names of columns of categories.
    numeric: The I names of columns of numbers.
    encoder: Of the categories.
    scaling: Of the numbers; None: `clicks.log_integers`.
    hexadecimal: Whether a category is a number, written so, and no text.
  """

  categorical: tuple[str, ...]
  numeric: tuple[str, ...]
  encoder: 'Encoder'
  scaling: Scaling | None = None
  hexadecimal: bool = False

  @property
  def arguments(self) -> dict[str, str]:
    """Returns each column by a name that an argument may have."""
    found: dict[str, str] = {}
    for column in (*self.categorical, *self.numeric):
      name = re.sub(r'\W', '_', column, flags=re.ASCII).lstrip('_') or 'column'
      name = f'column_{name}' if name[0].isdigit() else name
      while name in found:
        name += '_'
      found[name] = column
    return found


def table_task(
    table: os.PathLike | Any,
    label: str,
    categorical: Sequence[str] = (),
    numeric: Sequence[str] = (),
    name: str = 'table',
    categories: str = 'vocabulary',
    min_count: int = 5,
    buckets: int | Sequence[int] = 1000,
    partition: str = 'shared',
    seed: int = 0,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    split_seed: int = 0,
) -> base.Task:
  """Returns the task of telling the label of a row from its other columns.

  Two classes are told apart by one logistic output, as of `dnn.click_model`;
  more have a logit each. All is in memory.

  Args:
    table: A file (CSV, or what else separates columns; Parquet), a pandas
      DataFrame, a `datasets.Dataset`, columns by name or a list of rows by
      name.
    label: The column of classes, of any values; they are numbered in their
      order.
    categorical: Columns of categories: any values, compared as text.
    numeric: Columns of numbers.
    name: Of the task. Others: as at the head of this file.
  """
  categorical, numeric = (
      (names,) if isinstance(names, str) else tuple(names)
      for names in (categorical, numeric)
  )
  columns = [label, *categorical, *numeric]
  if len(columns) < 2 or len(set(columns)) < len(columns):
    raise ValueError(
        'Expected a label and other columns, each once; got'
        f' label={label!r}, categorical={categorical}, numeric={numeric}.'
    )
  frame = read_table(table, columns)
  labels, classes = _classes(frame[label])
  task = task_of_rows(
      _rows(frame, categorical, numeric, labels),
      categorical,
      numeric,
      name=name,
      description=name,
      example_name='row',
      num_classes=len(classes),
      identity={
          'columns': ' '.join(map(repr, columns)),
          'label_space': examples.label_space(classes),
      },
      categories=categories,
      min_count=min_count,
      buckets=buckets,
      partition=partition,
      seed=seed,
      validation_fraction=validation_fraction,
      test_fraction=test_fraction,
      split_seed=split_seed,
  )
  return task._replace(
      other_data=functools.partial(_open_other, label, classes, task.raw_inputs)
  )


def _rows(
    frame: Any,
    categorical: Sequence[str],
    numeric: Sequence[str],
    labels: np.ndarray,
) -> Rows:
  size = len(labels)
  raw = [raw_categories(frame[c]) for c in categorical]
  dense = [_numbers(frame[c]) for c in numeric]
  return Rows(
      np.stack([np.zeros(size, np.uint32), *raw], axis=1)[:, 1:],
      np.stack([np.zeros(size), *dense], axis=1)[:, 1:],
      labels,
  )


def _open_other(
    label: str, classes: Sequence[str], columns: Columns, name: str, split: str
) -> Callable[[int], examples.EvalBatches]:
  """Opens another table with the columns of a task: see `Task.other_data`."""
  examples.check_no_splits(name, split)
  used = [label, *columns.categorical, *columns.numeric]
  frame = read_table(name, used)
  number_of = {text: i for i, text in enumerate(classes)}
  texts = frame[label].map(str)
  if unknown := sorted(set(texts) - number_of.keys()):
    raise ValueError(
        f'Column {label!r} of {name} has the label {unknown[0]!r}; the model'
        f' was trained to tell apart {", ".join(classes[:10])}.'
    )
  labels = texts.map(number_of).to_numpy(np.int32)
  rows = _rows(frame, columns.categorical, columns.numeric, labels)
  split_of_all = examples.Split(
      _reader(rows, columns), order.all_rows(len(labels))
  )
  return functools.partial(examples.EvalBatches, split_of_all)


def _reader(rows: Rows, columns: Columns) -> Callable[[np.ndarray], base.Batch]:
  return read_arrays(
      cast(Scaling, columns.scaling).apply(rows.dense_NI),
      columns.encoder.encode(rows.categories_NK),
      rows.labels_N,
  )


def task_of_rows(
    rows: Rows,
    categorical: Sequence[str],
    numeric: Sequence[str],
    *,
    validation_fraction: float,
    test_fraction: float,
    split_seed: int,
    categories: str,
    min_count: int,
    buckets: int | Sequence[int],
    **fields: Any,
) -> base.Task:
  """Returns the task of rows in memory, divided at random into three splits.

  Args:
    rows: All of them.
    categorical: The names of their categories.
    numeric: The names of their numbers. Others: as at the head of this file,
      and of `make_task`.
  """
  size = len(rows.labels_N)
  train, validation, test = order.split_rows(
      size, split_sizes(size, validation_fraction, test_fraction), split_seed
  )
  chosen = train.numbers()
  for split, part in zip(
      ('training', 'validation', 'test'), (train, validation, test)
  ):
    found = np.unique(rows.labels_N[part.numbers()])
    if len(found) == 1:
      raise ValueError(
          f'All {part.size} rows of the {split} split have one label; use more'
          ' rows, or other fractions or another split_seed.'
      )
  encoder = make_encoder(
      categories,
      rows.categories_NK.shape[1],
      buckets=buckets,
      min_count=min_count,
      counts=lambda k: np.unique(
          rows.categories_NK[chosen, k], return_counts=True
      ),
  )
  scaling = scaling_of(rows.dense_NI[chosen])
  columns = Columns(tuple(categorical), tuple(numeric), encoder, scaling)
  read = _reader(rows, columns)
  return make_task(
      examples.Split(read, train),
      examples.Split(read, validation),
      lambda: examples.Split(read, test),
      test_size=test.size,
      columns=columns,
      num_integers=len(scaling.mean_I) + len(scaling.gaps),
      labels=lambda: [rows.labels_N[chosen]],
      **fields,
  )


def make_task(
    train: examples.Split,
    validation: examples.Split,
    test: Callable[[], examples.Split],
    *,
    test_size: int,
    name: str,
    columns: Columns,
    num_integers: int,
    description: str,
    partition: str,
    num_classes: int = 2,
    identity: Mapping[str, str] = {},
    **fields: Any,
) -> base.Task:
  """Returns the task of three splits; an empty test split is none.

  Args:
    train, validation: The splits.
    test: Opens the test split.
    test_size: How many examples it has.
    name: Of the task.
    columns: What the inputs are made of.
    num_integers: I, as in a batch.
    description: What the data are.
    partition: As at the head of this file.
    num_classes: C.
    identity: What groups must agree on besides columns and ids.
    **fields: Others of `examples.make_task`.
  """
  encoder = columns.encoder
  return examples.make_task(
      train,
      validation,
      test if test_size else None,
      partition=partition,
      num_classes=num_classes,
      identity={
          **identity,
          'task': name,
          'categories': encoder.identity,
          'integers': str(num_integers),
      },
      description=(
          f'{description}: {train.rows.size:,} training examples,'
          f' {validation.rows.size:,} validation, {test_size:,} test,'
          f' {sum(encoder.table_sizes):,} ids in {len(encoder.table_sizes)}'
          f' columns, {partition} partition'
      ),
      output='sigmoid' if num_classes == 2 else 'softmax',
      model_arguments={
          'table_sizes': encoder.table_sizes,
          'num_integers': num_integers,
      },
      raw_inputs=columns,
      **fields,
  )


def split_sizes(size: int, validation: float, test: float) -> list[int]:
  """Returns the sizes of the training, validation and test split.

  Raises:
    ValueError: If a fraction is out of range or a needed split is empty.
  """
  if not (0 < validation < 1 and 0 <= test < 1 and validation + test < 1):
    raise ValueError(
        'validation_fraction must lie in (0, 1), test_fraction in [0, 1) and'
        f' their sum below 1; got {validation} and {test}.'
    )
  parts = [int(size * validation), int(size * test)]
  if not parts[0]:
    raise ValueError(
        f'validation_fraction={validation} of {size} examples is none; choose'
        ' a larger one.'
    )
  return [size - sum(parts), *parts]


def read_arrays(
    integers_NI: np.ndarray, categories_NK: np.ndarray, labels_N: np.ndarray
) -> Callable[[np.ndarray], base.Batch]:
  """Returns the reader of rows in memory: float32, int32 and int32.

  They are copied side by side: a row then costs one or two cache misses, where
  three arrays cost many times that, and indexing them many times again.
  """
  num_integers = integers_NI.shape[1]
  packed = np.concatenate(
      [integers_NI.view(np.int32), categories_NK, labels_N[:, None]], axis=1
  )

  def read(rows_B: np.ndarray) -> base.Batch:
    found = packed.take(rows_B, axis=0)
    return {
        'inputs': {
            'integers': found[:, :num_integers].view(np.float32).copy(),
            'categories': found[:, num_integers:-1].copy(),
        },
        'labels': found[:, -1].copy(),
    }

  return read


# --- Columns ------------------------------------------------------------------


def read_table(table: Any, columns: Sequence[str]) -> Any:
  """Reads columns of a table, see `table_task`, as a DataFrame.

  Raises:
    ValueError: If there is no such column, or it is no table.
  """
  try:
    import pandas as pd
  except ImportError as e:
    raise ValueError(
        'A table needs the package pandas: pip install pandas.'
    ) from e
  where = f'A {type(table).__name__}'
  try:
    if isinstance(table, str | os.PathLike):
      where = str(table)
      table = _read_file(absolute(table))
    elif hasattr(table, 'to_pandas'):
      # Images and the like are not decoded to be left out.
      known = set(getattr(table, 'column_names', None) or columns)
      if hasattr(table, 'select_columns') and known.issuperset(columns):
        table = table.select_columns(list(columns))
      table = table.to_pandas()
    elif not isinstance(table, pd.DataFrame):
      table = pd.DataFrame(table)
  except (ValueError, TypeError, AttributeError, Warning) as e:
    raise ValueError(f'{where} cannot be read as a table: {one_line(e)}') from e
  names = list(table.columns)
  if missing := [c for c in columns if names.count(c) != 1]:
    raise ValueError(
        f'{where} has {names.count(missing[0])} columns {missing[0]!r},'
        f' expected one; there are: {", ".join(map(str, names))}.'
    )
  if not len(table):
    raise ValueError(f'{where} has no rows.')
  return table[list(columns)]


def _read_file(path: str) -> Any:
  """Reads a table of any kind, told by its first bytes; CSV as text."""
  import pandas as pd

  with open(path, 'rb') as file:
    if file.read(4) == b'PAR1':
      return pd.read_parquet(path)
  with records.open_text(epath.Path(path)) as file:
    head = file.readline(1 << 20)
  with records.open_text(epath.Path(path)) as file, warnings.catch_warnings():
    # More fields than names would be dropped, or shift all columns.
    warnings.simplefilter('error', pd.errors.ParserWarning)
    return pd.read_csv(
        file,
        sep=max(',', '\t', ';', key=lambda mark: head.count(mark.encode())),
        dtype=str,
        keep_default_na=False,
        index_col=False,
        encoding='utf-8-sig',
    )


def _classes(column: Any) -> tuple[np.ndarray, tuple[str, ...]]:
  """Returns the number of each row's class, int32 (N,), and all classes."""
  import pandas as pd

  codes, values = pd.factorize(column)
  names = list(map(str, values))
  if missing := int(np.sum(codes < 0)) + column.eq('').sum():
    raise ValueError(
        f'Column {column.name!r} has no label in {missing:,} rows; leave them'
        ' out.'
    )
  if not 2 <= len(names) <= max(2, len(codes) // 2):
    raise ValueError(
        f'Column {column.name!r} has {len(names):,} different values in'
        f' {len(codes):,} rows, such as {names[0]!r}; expected two classes or'
        ' more, each of some rows.'
    )
  try:
    rank = np.argsort(np.asarray(names, np.float64), kind='stable')
  except ValueError:
    rank = np.argsort(np.asarray(names), kind='stable')
  number = np.empty(len(rank), np.int32)
  number[rank] = np.arange(len(rank))
  return number[codes], tuple(names[i] for i in rank)


def _numbers(column: Any) -> np.ndarray:
  """Returns the numbers of a column, float64 (N,), NaN where one is missing."""
  import pandas as pd

  try:
    if column.dtype.kind in 'mMc':
      raise ValueError(f'{column.iloc[0]} is a time, or complex')
    if not pd.api.types.is_numeric_dtype(column):
      column = column.where(~column.isin(_NO_NUMBER))
    numbers = pd.to_numeric(column).to_numpy(np.float64, na_value=np.nan)
    if not np.nanmax(np.abs(numbers), initial=-1) < _HUGE:
      raise ValueError(f'some are {_HUGE} or more')
    if np.isnan(numbers).all():
      raise ValueError('all are missing')
  except (ValueError, TypeError) as e:
    raise ValueError(
        f'Column {column.name!r} does not hold numbers: {one_line(e)}; make it'
        ' categorical, or mend it.'
    ) from e
  return numbers


# --- Numbers ------------------------------------------------------------------


def scaling_of(train_NI: np.ndarray) -> Scaling:
  """Returns what standardises numbers as those of the training split."""
  return Scaling(
      np.nanmean(train_NI, axis=0),
      np.maximum(np.nanstd(train_NI, axis=0), 1e-6),
      np.flatnonzero(np.isnan(train_NI).any(axis=0)),
  )


# --- Categories ---------------------------------------------------------------


class Encoder(NamedTuple):
  """An encoder of the K categorical columns as ids.

  Attributes:
    encode: uint32 (B, K) -> int32 (B, K), each id below its table's size.
    table_sizes: K numbers of ids.
    identity: Two encoders of the same identity give the same ids.
    known: Of a vocabulary, the values of each column that have an id, rising
      from 2; None: a value has the id that its hash says.
  """

  encode: Callable[[np.ndarray], np.ndarray]
  table_sizes: tuple[int, ...]
  identity: str
  known: Sequence[np.ndarray] | None = None


def raw_categories(column: Any) -> np.ndarray:
  """Returns raw categories of a pandas column of anything, by its text."""
  import pandas as pd

  try:
    codes, values = pd.factorize(column)
  except TypeError as e:
    raise ValueError(
        f'Column {column.name!r} does not hold categories: {one_line(e)}.'
    ) from e
  # As text a whole number is the same whether or not others are missing.
  whole = lambda value: isinstance(value, float) and value.is_integer()
  texts = (str(int(v) if whole(v) else v) for v in values)
  raw = [value_of_text(text) if text else MISSING for text in texts]
  # Code -1, the last, is a missing value.
  return np.asarray([*raw, MISSING], np.uint32)[codes]


def value_of_text(text: str) -> int:
  """Returns a raw category of a string, never `MISSING`."""
  encoded = text.encode('utf-8', 'surrogatepass')
  digest = hashlib.blake2b(encoded, digest_size=4).digest()
  return int.from_bytes(digest, 'big') or 1


def make_encoder(
    categories: str,
    num_columns: int,
    *,
    buckets: int | Sequence[int],
    min_count: int,
    counts: Callable[[int], Counts],
) -> Encoder:
  """Returns the encoder of a task.

  `counts(k)` gives the values of column k in the training split, and how often
  each occurs; it is called for 'vocabulary' only. Others: as above.
  """
  if categories == 'hash':
    if isinstance(buckets, int):
      buckets = [buckets] * num_columns
    return hashed(buckets, num_columns)
  if categories == 'vocabulary':
    if type(min_count) is not int or min_count < 1:
      raise ValueError(
          f'min_count must be a whole number of at least 1; got {min_count!r}.'
      )
    return vocabulary([counts(k) for k in range(num_columns)], min_count)
  raise ValueError(
      f"categories must be one of {', '.join(CATEGORIES)}; got {categories!r}."
  )


def hashed(buckets: Sequence[int], num_columns: int) -> Encoder:
  """Returns an encoder by hashing: column k has 1 + buckets[k] ids."""
  buckets = list(buckets)
  if len(buckets) != num_columns or any(
      type(n) is not int or not 0 < n < 2**31 for n in buckets
  ):
    raise ValueError(
        f'buckets must be {num_columns} numbers of at least 1 (or one for all'
        f' columns); got {buckets}.'
    )
  buckets_K = np.asarray(buckets, np.uint32)
  # So that values which meet in one column do not meet in all.
  salts_K = order.mix32(np.arange(1, num_columns + 1, dtype=np.uint32))

  def encode(values_BK: np.ndarray) -> np.ndarray:
    ids_BK = order.mix32(values_BK ^ salts_K[None, :]) % buckets_K[None, :] + 1
    # By operators alone, for arrays of jax too.
    return (ids_BK * (values_BK != MISSING)).astype(np.int32)

  return Encoder(
      encode,
      tuple(n + 1 for n in buckets),
      f'hash {_digest([buckets_K])}',
  )


def vocabulary(counts: Sequence[Counts], min_count: int) -> Encoder:
  """Returns an encoder of frequent values: column k has 2 + those.

  Frequent values have ids in their own order.
  """
  try:
    import pandas as pd
  except ImportError as e:
    raise ValueError(
        "categories='vocabulary' needs the package pandas: pip install pandas."
    ) from e
  kept = [
      np.ascontiguousarray(values[(n >= min_count) & (values != MISSING)])
      for values, n in counts
  ]
  sizes = [len(values) for values in kept]
  columns_K = np.arange(len(kept), dtype=np.uint64) << np.uint64(32)
  keys = [c | values for c, values in zip(columns_K, kept)]
  keys = np.concatenate([*keys, np.zeros(0, np.uint64)])
  ids = [np.arange(2, 2 + n, dtype=np.int32) for n in sizes]
  ids = np.concatenate([*ids, [np.int32(1)]])  # Last: what is not found.
  known = pd.Index(keys)
  known.get_indexer(keys[:1])  # Builds its hash table, before threads come.

  def encode(values_BK: np.ndarray) -> np.ndarray:
    keys_BK = columns_K[None, :] | values_BK
    places = known.get_indexer(keys_BK.reshape(-1))  # -1: not found.
    ids_BK = ids[places].reshape(values_BK.shape)
    ids_BK[values_BK == MISSING] = 0
    return ids_BK

  return Encoder(
      encode,
      tuple(size + 2 for size in sizes),
      f'vocabulary {_digest(kept)}',
      kept,
  )


def _digest(arrays: Sequence[np.ndarray]) -> str:
  found = hashlib.sha256()
  for array in arrays:
    found.update(f'{len(array)} '.encode())
    found.update(np.ascontiguousarray(array, '<u4').tobytes())
  return found.hexdigest()[:16]
