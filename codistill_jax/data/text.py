"""The language model task: word pieces of many documents, T at a time.

Each of the B rows of a batch is a *lane*: it reads on where it stopped in the
batch before, so that the model's recurrent state is carried on; where a
document starts, the state is reset.

Shape suffixes: B rows of a batch, D documents, T tokens (the unroll), V pieces.
"""

import collections
import contextlib
import functools
import hashlib
import heapq
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from codistill_jax import base
from codistill_jax.data import examples, order, records, shards, sources
from codistill_jax.data.tokenizer import END_ID, START_ID, Tokenizer
from codistill_jax.storage import files

_MOST_LEFT_OUT = 0.05  # Of the documents of a source that is read directly.


def _lm_batch(tokens: np.ndarray, label_valid: np.ndarray) -> base.Batch:
  """Makes a batch of B x (T + 1) tokens.

  Nobody can foresee the next document, so the step from `</s>` to `<s>` is
  not a prediction: such a label has weight 0.
  """
  inputs, labels = tokens[:, :-1], tokens[:, 1:]
  return {
      'inputs': inputs,
      'labels': labels,
      'weights': ((labels != START_ID) & label_valid).astype(np.float32),
      'resets': inputs == START_ID,
  }


class _Reading(NamedTuple):
  """Documents read one after another, as if they were one text.

  Attributes:
    ends_D: int64; where each document ends in the reading.
    shift_D: int64; what leads from a place in the reading to the place in the
      token files, in each document.
  """

  ends_D: np.ndarray
  shift_D: np.ndarray

  def tokens(self, data: shards.TokenData, places: np.ndarray) -> np.ndarray:
    document = np.searchsorted(self.ends_D, places, side='right')
    return data.gather(places + self.shift_D[document])


def _read_in_order(data: shards.TokenData, documents: np.ndarray) -> _Reading:
  lengths_D = data.lengths[documents]
  ends_D = np.cumsum(lengths_D)
  return _Reading(ends_D, data.starts[documents] - (ends_D - lengths_D))


class TokenStream:
  """Training batches of one group: a pure function of (seed, group, step).

  In each epoch the group's documents are put into a new order and read as one
  text, which is divided into B lanes of equal length. A lane starts in the
  middle of a document, so its state is reset there; what remains at its end,
  less than T + 1 tokens, is left out of that epoch.

  May be called from several threads.

  Attributes:
    steps_per_epoch: How many batches an epoch has.
  """

  def __init__(
      self,
      data: shards.TokenData,
      *,
      group_id: int,
      num_groups: int,
      group_batch: int,
      unroll: int,
      partition: str = 'shared',
      seed: int = 0,
      rows: slice | None = None,
  ):
    """Makes the stream; reads nothing yet.

    Args:
      data: The training split.
      group_id: This group.
      num_groups: G.
      group_batch: B, rows of the whole group.
      unroll: T, tokens a row advances in each step.
      partition: 'shared' or 'disjoint'.
      seed: Of the experiment; the same in all groups.
      rows: The rows of the group batch that this process loads; None: all.

    Raises:
      ValueError: If an argument is out of range, or the group's documents do
        not fill one batch.
    """
    if group_batch < 1 or unroll < 1:
      raise ValueError(
          'group_batch and unroll must be 1 or more; got'
          f' group_batch={group_batch}, unroll={unroll}.'
      )
    self._data = data
    self._documents = order.group_rows(
        len(data),
        group_id=group_id,
        num_groups=num_groups,
        partition=partition,
        seed=seed,
        held=True,
    ).numbers()
    self._group_id = group_id
    self._unroll = unroll
    self._seed = seed
    num_tokens = int(data.lengths[self._documents].sum())
    lane_tokens = num_tokens // group_batch
    self.steps_per_epoch = (lane_tokens - 1) // unroll
    if self.steps_per_epoch < 1:
      raise ValueError(
          f'Group {group_id} has {num_tokens} tokens, but one step of'
          f' group_batch={group_batch} rows and unroll={unroll} needs'
          f' {group_batch * (unroll + 1)}; use more data, fewer rows or a'
          ' shorter unroll.'
      )
    lanes = np.arange(group_batch, dtype=np.int64)[rows or slice(None)]
    self._lane_starts = lanes * lane_tokens
    # Two, because loading ahead goes to and fro over the end of an epoch.
    self._reading = functools.lru_cache(maxsize=2)(self._read_epoch)

  def _read_epoch(self, epoch: int) -> _Reading:
    size = len(self._documents)
    row_of = order.epoch_order(
        size, seed=self._seed, group_id=self._group_id, epoch=epoch, held=True
    )
    documents = self._documents[row_of(np.arange(size))]
    return _read_in_order(self._data, documents)

  def batch(self, step: int) -> base.Batch:
    """Makes the batch of update `step` (from 0): see `base.Stream`.

    Returns:
      'inputs' and 'labels' int32 (B, T); 'weights' float32 (B, T), 0 where the
      label is `<s>`; 'resets' bool (B, T), True where the recurrent state is
      zeroed before the token is read.
    """
    epoch, step_in_epoch = divmod(int(step), self.steps_per_epoch)
    if epoch < 0:
      raise ValueError(f'step must be 0 or more; got {step}.')
    first = self._lane_starts + step_in_epoch * self._unroll
    places = first[:, None] + np.arange(self._unroll + 1)[None, :]
    tokens = self._reading(epoch).tokens(self._data, places)
    batch = _lm_batch(tokens, np.ones_like(tokens[:, 1:], bool))
    if step_in_epoch == 0:
      batch['resets'][:, 0] = True
    return batch


class DocumentBatches(Sequence):
  """A split once, each document from its start: validation and test.

  Documents are dealt to B lanes of about equal length and lie in order within
  a lane, so every document is read with its full context, and the sum of the
  losses does not depend on B. A lane that ends early is padded with weight 0.

  Attributes:
    bytes_per_example: Of text, for each label of the split; None: unknown.
  """

  def __init__(
      self,
      data: shards.TokenData,
      batch_size: int,
      *,
      unroll: int,
      max_batches: int | None = None,
  ):
    """Deals the documents.

    Args:
      data: The split.
      batch_size: B.
      unroll: T.
      max_batches: At most so many, of a random choice of the documents, the
        same always; None: the whole split.

    Raises:
      ValueError: If an argument is out of range.
    """
    for name, value in (
        ('batch_size', batch_size),
        ('unroll', unroll),
        ('max_batches', 1 if max_batches is None else max_batches),
    ):
      if value < 1:
        raise ValueError(f'{name} must be 1 or more; got {value}.')
    self._data = data
    self.bytes_per_example = data.bytes_per_label
    self._unroll = unroll
    documents = np.arange(len(data))
    if max_batches is not None:
      # The first of each lane would be other documents than the rest.
      documents = order.permutation(len(data), (order.SUBSET_KEY, 0))
      before_D = np.cumsum(data.lengths[documents]) - data.lengths[documents]
      room = max_batches * batch_size * unroll
      chosen_D = (before_D < room) | (np.arange(len(data)) < batch_size)
      documents = np.sort(documents[chosen_D])
    lanes = [
        documents[lane] for lane in _deal(data.lengths[documents], batch_size)
    ]
    self._reading = _read_in_order(data, np.concatenate(lanes))
    lane_lengths = np.asarray([data.lengths[lane].sum() for lane in lanes])
    self._ends = np.cumsum(lane_lengths)
    self._starts = self._ends - lane_lengths
    # The first token of a lane is no label, hence one less.
    steps = -(-(int(lane_lengths.max()) - 1) // unroll)
    self._length = steps if max_batches is None else min(steps, max_batches)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> base.Batch:  # type: ignore[override]
    """Makes one batch, as `TokenStream.batch`; padding has weight 0."""
    if not -self._length <= index < self._length:
      raise IndexError(f'Batch {index} of {self._length}.')
    first = self._starts + (index % self._length) * self._unroll
    places = first[:, None] + np.arange(self._unroll + 1)[None, :]
    valid = places < self._ends[:, None]
    tokens = self._reading.tokens(self._data, np.where(valid, places, 0))
    tokens = np.where(valid, tokens, np.int32(END_ID))
    return _lm_batch(tokens, valid[:, 1:])


def _deal(lengths_D: np.ndarray, num_lanes: int) -> list[np.ndarray]:
  """Documents of each lane: the longest first, always to the shortest lane."""
  lanes: list[list[int]] = [[] for _ in range(num_lanes)]
  heap = [(0, lane) for lane in range(num_lanes)]
  for document in np.argsort(-lengths_D, kind='stable').tolist():
    length, lane = heap[0]
    lanes[lane].append(document)
    heapq.heapreplace(heap, (length + int(lengths_D[document]), lane))
  return [np.asarray(sorted(lane), np.int64) for lane in lanes]


def language_model_task(
    data_dir: str | os.PathLike,
    unroll: int = 32,
    partition: str = 'shared',
    seed: int = 0,
    max_eval_batches: int | None = None,
) -> base.Task:
  """Makes the task of predicting the next word piece of prepared text.

  Args:
    data_dir: What `prepare_data` wrote.
    unroll: T, word pieces at a time.
    partition: 'shared' or 'disjoint': how groups divide the documents.
    seed: Of the order of documents and of the partition.
    max_eval_batches: Evaluate on at most so many batches, of a fixed random
      choice of documents; None: the whole split.

  Raises:
    FileNotFoundError, ValueError: If the data cannot be used.
  """
  train = shards.open_tokens(data_dir, 'train')
  validation = shards.open_tokens(data_dir, 'validation')
  meta = shards.read_meta(data_dir)
  source = meta.get('source', 'text')
  test = None
  if meta['splits'].get('test', {}).get('documents'):
    test = shards.open_tokens(data_dir, 'test')
  batches = functools.partial(
      DocumentBatches, unroll=unroll, max_batches=max_eval_batches
  )
  tokenizer = lambda: Tokenizer(
      (files.on_disk(data_dir) / shards.TOKENIZER).read_bytes()
  )

  def other_data(name: str, split: str) -> Callable[..., DocumentBatches]:
    other = open_other(name, split, train.tokenizer_sha256, tokenizer)
    return functools.partial(batches, other)

  return base.Task(
      train_stream=functools.partial(
          TokenStream, train, unroll=unroll, partition=partition, seed=seed
      ),
      eval_batches=functools.partial(batches, validation),
      test_batches=functools.partial(batches, test) if test else None,
      num_classes=train.vocab_size,
      identity={
          'task': 'language_model',
          'vocab_size': str(train.vocab_size),
          'tokenizer': train.tokenizer_sha256,
      },
      example_name='token',
      description=(
          f'{source}: {train.num_tokens:,} training tokens of'
          f' {train.vocab_size:,} word pieces, {partition} partition'
      ),
      partition=partition,
      label_frequencies=functools.cache(
          lambda: token_frequencies(data_dir, train)
      ),
      tokenizer=tokenizer,
      other_data=other_data,
  )


def open_other(
    name: str,
    split: str,
    tokenizer_sha256: str,
    tokenizer: Callable[[], Tokenizer],
) -> shards.TokenData:
  """Opens text that another data set holds, in the pieces of this one.

  Args:
    name: What `prepare_data` wrote, with the same tokenizer; or a source, as of
      `prepare_data --source`, which is tokenised now and held in memory.
    split: Of prepared data.
    tokenizer_sha256: Of the tokenizer of this task.
    tokenizer: Gives it.

  Raises:
    FileNotFoundError, ValueError: If they cannot be used.
  """
  if Path(name).is_dir():
    data = shards.open_tokens(name, split)
    if data.tokenizer_sha256 != tokenizer_sha256:
      raise ValueError(
          f'{name} has another tokenizer (sha256'
          f' {data.tokenizer_sha256[:12]}) than the run'
          f' ({tokenizer_sha256[:12]}); prepare it with that, by prepare_data'
          ' --tokenizer, or give the text itself, as text:PATH.'
      )
    return data
  examples.check_no_splits(name, split)
  source, own = sources.open_source(name), tokenizer()
  documents, num_bytes = [], 0
  left_out: collections.Counter[str] = collections.Counter()
  for raw in source.raw():
    text = sources.decoded(source.decode, raw)
    if isinstance(text, records.Reject):
      left_out[text.reason] += 1
      continue
    num_bytes += len(text.encode())
    pieces = [START_ID], own.encode(text), [END_ID]
    documents.append(np.concatenate(pieces, dtype=np.int32))
  most = _MOST_LEFT_OUT * len(documents)
  if not documents or left_out.total() > most:
    raise ValueError(
        f'{name} holds {len(documents):,} documents, and others that cannot be'
        f' read: {dict(left_out)}; mend it, or prepare it with prepare_data.'
    )
  lengths = [len(document) for document in documents]
  return shards.TokenData(
      [np.concatenate(documents)],
      [np.cumsum([0, *lengths])],
      own.vocab_size,
      own.sha256,
      num_bytes,
  )


def token_frequencies(
    data_dir: str | os.PathLike, data: shards.TokenData
) -> np.ndarray:
  """Returns the shares of word pieces among labels of all training documents.

  `<s>` is none, see `_lm_batch`. The first to ask reads all tokens once, a
  block at a time, and leaves the counts beside them, if it may write there.

  Args:
    data_dir: What `prepare_data` wrote.
    data: Its training split.

  Returns:
    float64 (V,), of sum 1.

  Raises:
    OSError, ValueError: If the data cannot be used.
  """
  data_dir = files.on_disk(data_dir)
  path = data_dir / 'train' / f'label_counts_{_key(data_dir)}.npy'
  try:
    counts_V = np.load(io.BytesIO(path.read_bytes()))
  except (OSError, ValueError, EOFError, zipfile.BadZipFile):
    counts_V = data.count_tokens()  # There are none, or damaged ones.
    counts_V[START_ID] = 0
    buffer = io.BytesIO()
    np.save(buffer, counts_V)
    with contextlib.suppress(OSError):
      # A disk that is full or may not be written: the next one counts.
      files.write_bytes(path, buffer.getvalue())
  return examples.shares(counts_V)


def _key(data_dir: Path) -> str:
  """Returns a key that is another one for other tokens, or other pieces."""
  meta = shards.read_meta(data_dir)
  known = [meta['tokenizer_sha256']]
  for shard in meta['splits']['train']['shards']:
    if shard['documents']:
      known.append(shard['tokens_sha256'])
  return hashlib.sha256('\n'.join(known).encode()).hexdigest()[:16]
