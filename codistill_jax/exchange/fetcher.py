"""The reading half of `CheckpointExchange`: publications of the peers.

Everything is verified; what is bad is named, counted, and not used. It is
looked at again only if its writer has made it again.
"""

import secrets
import textwrap
from collections.abc import Mapping, Sequence

from absl import logging
from etils import epath

from codistill_jax.base import Variables
from codistill_jax.exchange import publications
from codistill_jax.exchange.publisher import READING_FILE
from codistill_jax.exchange.teaching import Slot
from codistill_jax.storage import checkpoints, files
from codistill_jax.storage.background import Troubles
from codistill_jax.storage.checkpoints import MismatchError

_LONGEST_REASON = 400  # Characters; tensorstore tells its whole state.
_DOING = 'reading publications'
_MARKING = 'marking what is being read'


class Fetcher:
  """Reads the publications of peers.

  Attributes:
    root: The directory of the exchange.
    rejected: How many publications were bad.
    last_rejection: Which one was the last, and why; '' if there is none.
  """

  def __init__(
      self,
      root: epath.Path,
      group_id: int,
      *,
      like: Variables,
      identity: Mapping[str, str],
      dtype: str,
      process: int,
      troubles: Troubles,
  ):
    """Reads nothing yet.

    Args:
      root: The directory of the exchange.
      group_id: The reader.
      like: Its variables, or their shapes; what peers must match.
      identity: What peers must share besides shapes.
      dtype: Floating dtype of teachers.
      process: Which process of the group this is.
      troubles: Is told what the file system refuses.
    """
    self.rejected = 0
    self.last_rejection = ''
    self.root = root
    self._like = like
    self._identity = dict(identity)
    self._dtype = dtype
    self._troubles = troubles
    # Of step n of a peer: when that which was bad had been made.
    self._bad: dict[tuple[int, int], float | None] = {}
    prefix = f'process_{process}_' if process else ''
    self._mark = (
        publications.group_directory(root, group_id) / f'{prefix}{READING_FILE}'
    )

  def newest(self, peer: int, after: int | None) -> int | None:
    """The newest publication beyond `after` that is not known to be bad."""
    try:
      steps = publications.published_steps(self.root, peer)
    except OSError as e:
      self._troubles.failed(_DOING, e)
      return None
    for step in reversed(steps):
      if after is not None and step <= after:
        return None
      if not self.is_bad(peer, step):
        return step
    return None

  def is_bad(self, peer: int, step: int) -> bool:
    """Whether that publication was rejected and is still the same one."""
    key = (peer, step)
    return key in self._bad and self._bad[key] == self._made(peer, step)

  def read(self, steps: Mapping[int, int]) -> dict[int, Slot]:
    """Reads step `steps[peer]` of each peer; leaves out what cannot be used."""
    found = {}
    try:
      self._set_mark(steps)
      for peer, step in steps.items():
        try:
          slot = self._read(peer, step)
        except MismatchError as e:
          self._reject(peer, step, self._made(peer, step), e)
          continue
        if slot is not None:
          found[peer] = slot
    finally:
      self._set_mark({})
    return found

  def read_if_there(self, peer: int, step: int) -> Slot | None:
    """One publication; None if it is not there yet, or cannot be used.

    Raises:
      MismatchError: If the peer trains something else.
    """
    try:
      steps = publications.published_steps(self.root, peer)
    except OSError as e:
      self._troubles.failed(_DOING, e)
      return None
    if step not in steps or self.is_bad(peer, step):
      return None
    try:
      self._set_mark({peer: step})
      return self._read(peer, step)
    finally:
      self._set_mark({})

  def _read(self, peer: int, step: int) -> Slot | None:
    made = self._made(peer, step)  # It may be made again while it is read.
    try:
      slot = publications.read(
          self.root,
          peer,
          step,
          like=self._like,
          identity=self._identity,
          dtype=self._dtype,
      )
    except checkpoints.MissingError:
      return None  # The peer is faster than this reader: there is a newer one.
    except checkpoints.DamagedError as e:
      self._reject(peer, step, made, e)
      return None
    except OSError as e:  # The file system, not the peer: it may pass.
      self._troubles.failed(_DOING, e)
      return None
    self._troubles.worked(_DOING)
    return slot

  def read_newest(
      self, peers: Sequence[int], after: Mapping[int, int | None]
  ) -> dict[int, Slot]:
    """Of each peer something newer and sound; peers without are left out."""
    found = {}
    for peer in peers:
      tried = set()
      while (step := self.newest(peer, after[peer])) not in tried | {None}:
        tried.add(step)
        one = self.read({peer: step})
        if one:
          found |= one
          break
    return found

  def _reject(
      self, peer: int, step: int, made: float | None, error: Exception
  ) -> None:
    """Names and counts a bad publication."""
    self._bad[peer, step] = made
    self.rejected += 1
    self.last_rejection = textwrap.shorten(str(error), _LONGEST_REASON)
    logging.warning(
        'Rejected publication %d of group %d: %s',
        step,
        peer,
        self.last_rejection,
    )

  def _made(self, peer: int, step: int) -> float | None:
    directory = publications.group_directory(self.root, peer)
    return checkpoints.completed_at(directory, step)

  def _set_mark(self, steps: Mapping[int, int]) -> None:
    """Says what is being read, so that the writer does not delete it."""
    mark = {
        'nonce': secrets.token_hex(8),
        'steps': {str(peer): step for peer, step in steps.items()},
    }
    try:
      files.write_json(self._mark, mark)
    except OSError as e:
      # Without it a writer may be faster than this reader; which then reads
      # something newer.
      self._troubles.failed(_MARKING, e)
    else:
      self._troubles.worked(_MARKING)
