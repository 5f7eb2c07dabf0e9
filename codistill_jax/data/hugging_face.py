"""Hugging Face data sets as a source, streamed.

`hf:allenai/c4:en` is C4: JSON lines in gzip, 1,024 files of the training split,
whose `text` is the document. Resuming skips rows without decoding them into
documents, but loads and parses all of them again: after days of streaming,
hours. Files on disk, as `jsonl:c4/en/*.json.gz`, are skipped faster.

`datasets` reads JSON in blocks and doubles one until its longest line fits, so
here a line that is too long is rejected after it was held in memory once.
"""

from collections.abc import Iterator
from typing import Any

from codistill_jax.data.raw_files import TOO_LONG
from codistill_jax.data.records import Raw, Reject, Source, check_text


def hugging_face_source(spec: str, text_key: str, limit: int) -> Source:
  """The source `hf:NAME[:CONFIG[:SPLIT]]`; the split is 'train' by default.

  Nothing is contacted before `raw` is called. Rows are neither shuffled nor
  decoded ahead, so that a row's number never changes.

  Args:
    spec: See above.
    text_key: Column that holds the text.
    limit: Bytes of a document in UTF-8; a longer one is 'too_long'.

  Raises:
    ValueError: If the spec is malformed; from `raw`, if the data set has
      no column `text_key` or the package `datasets` is missing.
    OSError: From `raw`, if the data set cannot be read.
  """
  name, *options = spec.removeprefix('hf:').split(':')
  if not name or len(options) > 2:
    raise ValueError(
        f'Malformed source {spec!r}; expected hf:NAME[:CONFIG[:SPLIT]].'
    )
  config, split = [*options, '', ''][:2]

  def raw(start: int) -> Iterator[Raw]:
    rows = _open(spec, name, config, split or 'train', text_key)
    return _raw(spec, rows, start, text_key, limit)

  return Source(spec, '', raw, check_text)


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


def _raw(
    spec: str, rows: Any, start: int, text_key: str, limit: int
) -> Iterator[Raw]:
  rows = iter(rows.skip(start))
  while True:
    try:
      row = next(rows, None)
    except Exception as e:
      raise _unreadable(spec, e) from e
    if row is None:
      return
    text = row.get(text_key)
    if not isinstance(text, str):
      yield Reject('no_text')
    else:
      yield TOO_LONG if _too_long(text, limit) else text


def _too_long(text: str, limit: int) -> bool:
  if 4 * len(text) <= limit:  # No character takes more bytes.
    return False
  return len(text) > limit or len(text.encode('utf-8', 'replace')) > limit


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
