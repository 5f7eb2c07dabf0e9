"""Hugging Face data sets as a source, streamed."""

from collections.abc import Iterator
from typing import Any

from codistill_jax.data.records import Record, Source, text_of


def hugging_face_source(spec: str, text_key: str) -> Source:
  """The source `hf:NAME[:CONFIG[:SPLIT]]`; the split is 'train' by default.

  Nothing is contacted before `records` is called.

  Raises:
    ValueError: If the spec is malformed; from `records`, if the data set has
      no column `text_key` or the package `datasets` is missing.
    OSError: From `records`, if the data set cannot be read.
  """
  name, *options = spec.removeprefix('hf:').split(':')
  if not name or len(options) > 2:
    raise ValueError(
        f'Malformed source {spec!r}; expected hf:NAME[:CONFIG[:SPLIT]].'
    )
  config, split = [*options, '', ''][:2]

  def records(start: int) -> Iterator[Record]:
    rows = _open(spec, name, config, split or 'train', text_key)
    return _records(spec, rows, start, text_key)

  return Source(spec, '', records)


def _open(spec: str, name: str, config: str, split: str, text_key: str) -> Any:
  """The streaming data set; contacts the hub unless `name` is a directory."""
  try:
    import datasets
  except ImportError as e:
    raise ValueError(
        f'The source {spec} needs the package datasets: pip install datasets.'
    ) from e
  try:
    rows = datasets.load_dataset(
        name, config or None, split=split, streaming=True
    )
    columns = rows.column_names
  except Exception as e:
    raise _unreadable(spec, e) from e
  if columns is not None and text_key not in columns:
    raise ValueError(
        f'{spec} has no column {text_key!r} but {", ".join(columns)}; choose'
        ' one with --text_key.'
    )
  return rows


def _records(
    spec: str, rows: Any, start: int, text_key: str
) -> Iterator[Record]:
  rows = iter(rows.skip(start))
  while True:
    try:
      row = next(rows, None)
    except Exception as e:
      raise _unreadable(spec, e) from e
    if row is None:
      return
    yield text_of(row, text_key)


def _unreadable(spec: str, error: Exception) -> OSError:
  """One kind of error for all that `datasets` raises.

  Seen in datasets 5.2: ConnectionError, FileNotFoundError, ValueError,
  StopIteration (a glob that matches nothing), errors of the HTTP client that
  are no OSError, and pyarrow's for files that it cannot parse. There is no
  common base class, hence `except Exception` around the two calls into it.
  """
  reason = ' '.join(str(error).split()).rstrip('.') or type(error).__name__
  return OSError(
      f'Cannot read {spec}: {reason}. Check the name and the network; an'
      ' interrupted preparation continues where it was.'
  )
