"""The exchange of groups that are one program: predictions of the same step.

Nothing is published and nothing waited for: a peer's predictions are in the
update itself, see `predictions` and `joint`. What remains is whose they are.
"""

import time

import numpy as np

from codistill_jax.base import PeerPredictions
from codistill_jax.exchange.protocol import (
    NoExchange,
    Plan,
    staleness_metrics,
)
from codistill_jax.exchange.publications import Publication


class PredictionExchange(NoExchange):
  """The exchange of one group; see `Exchange`. Nothing is published.

  Attributes:
    peers: The ids of the peers.
    in_use: What taught in the last update: predictions as old as itself.
  """

  def __init__(
      self,
      group_id: int,
      num_groups: int,
      plan: Plan,
      *,
      top_k: int | None = None,
      bytes_to_peer: int = 0,
  ):
    """Has peers from the first fetch on.

    Args:
      group_id: This group.
      num_groups: G.
      plan: Who learns from whom; the rest of it acts nowhere.
      top_k: As in `PeerPredictions`.
      bytes_to_peer: What the group sends to one peer in an update.
    """
    self.peers = plan.peers_of(group_id, num_groups)
    self.in_use: tuple[Publication | None, ...] = (None,) * len(self.peers)
    mix_G = np.zeros(num_groups, np.float32)
    mix_G[list(self.peers)] = 1.0 / max(len(self.peers), 1)
    self._teachers = PeerPredictions(mix_G, top_k=top_k)
    self._bytes_to_peer = bytes_to_peer
    self._readers = len(plan.readers_of(group_id, num_groups))

  def fetch(self, step: int) -> PeerPredictions | None:
    """The peers, who all teach in the update after `step`; None without any."""
    if not self.peers:
      return None
    now = time.time()
    self.in_use = tuple(Publication(peer, step, now) for peer in self.peers)
    return self._teachers

  def metrics(self, step: int) -> dict[str, float]:
    metrics = staleness_metrics(step, self.in_use)
    sent = float(self._bytes_to_peer * self._readers)
    metrics['exchange/prediction_bytes'] = sent
    return metrics
