"""The settings of a preparation of text, and what does not fit to them.

A preparation is continued only with the settings and the source with which it
was begun; both are stored with it.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from codistill_jax.data import filters as filters_lib
from codistill_jax.data import paragraph_ids, rounds, shards
from codistill_jax.data.records import DEFAULT_MAX_DOCUMENT_BYTES, Source
from codistill_jax.data.tokenizer import Tokenizer

DEFAULT_VOCAB_SIZE = 4096
DEFAULT_TOKENIZER_BYTES = 50_000_000
DEFAULT_SHARD_TOKENS = 1 << 24

# What data that were prepared before a setting existed were prepared with.
_BEFORE = {
    'filters': [],
    'max_document_bytes': DEFAULT_MAX_DOCUMENT_BYTES,
    'paragraph_ids': None,
    'paragraph_unit': None,
}


class Settings(NamedTuple):
  """Arguments of `prepare`, checked and loaded.

  Attributes:
    config: All that the result depends on but the source's files, for JSON.
    tokenizer: The given one; None: train one.
    filters: Parsed.
    paragraphs: The list of those to take, or None.
  """

  config: dict[str, Any]
  tokenizer: Tokenizer | None
  filters: Sequence[filters_lib.Filter]
  paragraphs: paragraph_ids.ParagraphList | None


def settings(
    *,
    tokenizer: str | os.PathLike | None,
    filters: Sequence[str],
    paragraphs: str | None,
    paragraphs_sha256: str | None,
    paragraph_unit: str,
    **config: Any,
) -> Settings:
  """Checks arguments of `prepare`; `config` are those stored as they are.

  Raises:
    ValueError: If one is unusable.
    OSError: If the tokenizer or the list of paragraphs cannot be read.
  """
  _check(config, paragraph_unit)
  given = None
  if tokenizer:
    given = _load_tokenizer(tokenizer, config['vocab_size'])
    config['vocab_size'] = given.vocab_size
    config['tokenizer_bytes'] = None
  elif config['vocab_size'] is None:
    config['vocab_size'] = DEFAULT_VOCAB_SIZE
  parsed = [filters_lib.parse(spec) for spec in filters]
  listed = _open_list(paragraphs, paragraphs_sha256)
  config |= {
      'tokenizer': given.sha256 if given else None,
      'filters': [filters_lib.full_spec(one) for one in parsed],
      'paragraph_ids': listed.sha256 if listed else None,
      'paragraph_unit': paragraph_unit if listed else None,
  }
  return Settings(config, given, parsed, listed)


def _check(config: dict[str, Any], paragraph_unit: str) -> None:
  if not 0 <= config['validation_fraction'] < 1:
    raise ValueError(
        'validation_fraction must be in [0, 1); got'
        f" {config['validation_fraction']}."
    )
  if paragraph_unit not in paragraph_ids.UNITS:
    raise ValueError(
        f'paragraph_unit must be one of {", ".join(paragraph_ids.UNITS)}; got'
        f' {paragraph_unit!r}.'
    )
  for name in (
      'vocab_size',
      'tokenizer_bytes',
      'max_documents',
      'shard_tokens',
      'max_document_bytes',
  ):
    if config[name] is not None and config[name] < 1:
      raise ValueError(f'{name} must be 1 or more; got {config[name]}.')
  if config['seed'] < 0:
    raise ValueError(f"seed must be 0 or more; got {config['seed']}.")


def _load_tokenizer(
    path: str | os.PathLike, vocab_size: int | None
) -> Tokenizer:
  model = pathlib.Path(path).read_bytes()
  try:
    loaded = Tokenizer(model)
  except ValueError as e:
    raise ValueError(f'Cannot use the tokenizer {path}: {e}') from e
  if vocab_size not in (None, loaded.vocab_size):
    raise ValueError(
        f'{path} has {loaded.vocab_size} word pieces, not'
        f' vocab_size={vocab_size}; leave vocab_size out.'
    )
  return loaded


def _open_list(
    spec: str | None, sha256: str | None
) -> paragraph_ids.ParagraphList | None:
  if spec is not None:
    return paragraph_ids.open_list(spec, sha256)
  if sha256 is not None:
    raise ValueError(
        f'paragraph_ids_sha256 is {sha256}, but there is no list of paragraphs'
        ' to compare with it; add paragraph_ids or leave it out.'
    )
  return None


# --- what is there already ---------------------------------------------------


def check_config(
    output: pathlib.Path, config: dict[str, Any], stored: dict[str, Any]
) -> None:
  """Raises ValueError unless `output` was prepared with these settings."""
  for name, value in config.items():
    before = stored.get(name, _BEFORE.get(name))
    if before != value:
      raise ValueError(
          f'{output} was prepared with {name}={before!r}, now it is'
          f' {value!r}; use the same settings, choose another output or delete'
          ' the directory.'
      )


def check_source(output: pathlib.Path, source: Source, stored: str) -> None:
  """Raises ValueError unless it was prepared from the same files."""
  if source.fingerprint != stored:
    raise ValueError(
        f'The files of {source.spec} have changed since {output} was prepared'
        ' from them; choose another output or delete the directory.'
    )


def check_tokenizer(
    output: pathlib.Path, tokenizer: Tokenizer, stored: str | None
) -> None:
  """Raises ValueError unless it is the one that made the first shards.

  Args:
    output: Of the preparation.
    tokenizer: That in `output`.
    stored: Its SHA-256; None: the preparation was begun before it was noted.
  """
  if stored not in (None, tokenizer.sha256):
    raise ValueError(
        f'The tokenizer.model in {output} is not the one that the preparation'
        f' was begun with (sha256 {tokenizer.sha256[:12]}, expected'
        f' {stored[:12]}); put that one back or delete the directory.'
    )


def check_unused(output: pathlib.Path) -> None:
  """Refuses, with ValueError, to mix data with somebody else's files."""
  own = rounds.PROGRESS + '.tmp'  # Killed in the very first write.
  foreign = sorted(path.name for path in output.iterdir() if path.name != own)
  if foreign:
    raise ValueError(
        f'{output} holds {foreign[0]}, but no preparation of data; choose'
        ' another output or empty the directory.'
    )


def check_splits(config: dict[str, Any], splits: dict[str, Any]) -> None:
  """Raises ValueError if a split that was asked for has no document."""
  wanted = config['validation_fraction'] > 0
  train, validation = (splits[split]['documents'] for split in shards.SPLITS)
  if not train or (wanted and not validation):
    raise ValueError(
        f'Of {train + validation} documents, {train} fell into the training'
        f' and {validation} into the validation split; choose another'
        ' validation_fraction (0 for none) or more documents, and another'
        ' output.'
    )
