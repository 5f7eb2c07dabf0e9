r"""What an exchange costs at the far end: 2 to 1,000 groups, 1 to 100 GB.

    python -m benchmarks.exchange_cost > docs/results/exchange_cost.json

Prints JSON, of two parts. `costs`, on paper: what a group sends and fetches in
an exchange, how long that takes by bandwidth, what the store sends altogether,
and in how many requests. `simulated`: groups of a tiny model that exchange as
in training (mode freshest; the classes are those of the package), in one
process, through a store with a latency, a bandwidth and a lag of its listings,
by a clock of their own: the same bytes and requests, counted, and the staleness
of teachers, which is on no paper. Nothing is measured, so no machine is named.
"""

import contextlib
import heapq
import itertools
import json
import sys
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from codistill_jax.base import Variables
from codistill_jax.exchange.plan import Plan, Waiting
from codistill_jax.exchange.publications import Publication, Slot
from codistill_jax.exchange.store_exchange import StoreExchange
from codistill_jax.exchange.stores import Store

# Requests to the store, as counted by `tests/benchmarks_test.py`: of a
# publication that replaces the oldest of five, of a look at what a peer has
# published, and of reading one.
PUBLISH, LOOK, READ = 56, 6, 15

GROUPS = 2, 8, 64, 256, 1000
TOPOLOGIES = 'all', 'random-3', 'ring'
SIZES_GB = 1, 10, 100
GIGABITS = 1, 10, 100
_POLL_SECONDS = 5.0  # Between two looks at a peer, at most.


class Link(NamedTuple):
  """The way of a group to the store.

  Attributes:
    bytes_per_second: In each direction.
    latency_seconds: Of a request.
    lag_seconds: Until a listing shows what is written.
  """

  bytes_per_second: float
  latency_seconds: float = 0.05
  lag_seconds: float = 0.0


def cost(num_bytes: float, num_groups: int, topology: str, link: Link) -> dict:
  """Returns what one exchange of one group costs; requests but for looks."""
  peers = len(Plan(topology=topology).peers_of(0, num_groups))
  one = num_bytes / link.bytes_per_second
  return {
      'peers': peers,
      'bytes_sent': num_bytes,
      'bytes_fetched': peers * num_bytes,
      'requests': PUBLISH + peers * (LOOK + READ),
      # Both directions at once; of its peers, one after another.
      'seconds': max(
          one + PUBLISH * link.latency_seconds,
          peers * (one + READ * link.latency_seconds),
      ),
      'bytes_of_store': num_groups * peers * num_bytes,
  }


# --- The simulation ----------------------------------------------------------


class World:
  """What all groups see, and how much they have asked of it.

  Attributes:
    published: Of each group, (step, when a listing shows it) in order.
    requests: To the store.
    bytes_sent: By all groups.
    bytes_fetched: Likewise.
  """

  def __init__(self, num_groups: int, num_bytes: float, link: Link):
    self.published: list[list[tuple[int, float]]] = [
        [] for _ in range(num_groups)
    ]
    self.num_bytes, self.link = num_bytes, link
    self.requests = 0
    self.bytes_sent = self.bytes_fetched = 0.0

  def transfer(self, requests: int) -> float:
    """Returns the seconds of one publication on its way, up or down."""
    link = self.link
    return (
        requests * link.latency_seconds + self.num_bytes / link.bytes_per_second
    )


class SimulatedStore(Store):
  """The store as one group sees it, at the time `now` of its own clock.

  What a group fetches beside training it has when all of it is there. So a look
  shows what has been there for as long as the fetch takes, and while one is
  under way there is no other.
  """

  writes = at_hand = True
  advice = ''
  reading = staticmethod(contextlib.nullcontext)
  turn = staticmethod(contextlib.nullcontext)

  def __init__(self, world: World, group_id: int, num_peers: int):
    self._world, self._group_id = world, group_id
    self._round = num_peers * world.transfer(LOOK + READ)
    self._busy_until = self._sent_until = 0.0
    self._next_look: dict[int, float] = {}
    self.now = 0.0

  def steps(self, group_id: int) -> list[int]:
    if self.now < max(self._busy_until, self._next_look.get(group_id, 0.0)):
      return []
    self._world.requests += LOOK
    self._next_look[group_id] = self.now + _POLL_SECONDS
    there = self.now - self._round
    published = self._world.published[group_id][-5:]
    return [step for step, at in published if at <= there]

  def read(self, group_id: int, step: int) -> Slot:
    self._world.requests += READ
    self._world.bytes_fetched += self._world.num_bytes
    self._busy_until = max(self._busy_until, self.now) + self._world.transfer(
        LOOK + READ
    )
    return Publication(group_id, step, 0.0), _tiny(group_id)

  def write(self, publication: Publication, variables: Variables) -> None:
    world = self._world
    if self.now < self._sent_until:
      return  # The one before is under way, and the next will be newer.
    world.requests += PUBLISH
    world.bytes_sent += world.num_bytes
    self._sent_until = self.now + world.transfer(PUBLISH)
    there = self._sent_until + world.link.lag_seconds
    world.published[self._group_id].append((publication.step, there))


def _tiny(value: float) -> Variables:
  return Variables({'w': np.full((2,), value, np.float32)}, {})


def simulate(
    num_groups: int,
    topology: str,
    link: Link,
    *,
    num_bytes: float = 1e9,
    step_seconds: float = 1.0,
    every: int = 50,
    num_steps: int = 400,
) -> dict[str, Any]:
  """Trains groups by a clock of their own, at speeds that differ by 10 %.

  Returns:
    Per group and exchange, over the whole run: bytes sent and fetched, and
    requests; staleness in steps, the mean over the second half and all groups,
    and the largest; and `publications`, of all groups.
  """
  rng = np.random.default_rng(0)
  pace = step_seconds * rng.uniform(0.95, 1.05, num_groups)
  world = World(num_groups, num_bytes, link)
  plan = Plan(every=every, topology=topology, mode='freshest')
  stores, exchanges = [], []
  for g in range(num_groups):
    peers = len(plan.peers_of(g, num_groups))
    stores.append(SimulatedStore(world, g, peers))
    exchanges.append(
        StoreExchange(
            stores[g],
            g,
            num_groups,
            plan=plan,
            identity={},
            waiting=Waiting(),
        )
    )
  ages: list[float] = []
  # Whose next update ends first.
  due = [(pace[g], g, 1) for g in range(num_groups)]
  heapq.heapify(due)
  while due:
    now, g, step = heapq.heappop(due)
    stores[g].now = now
    exchanges[g].publish_if_due(step, _tiny(g))
    exchanges[g].fetch(step)
    if 2 * step > num_steps:
      ages += [step - p.step for p in exchanges[g].in_use if p is not None]
    if step < num_steps:
      heapq.heappush(due, (now + pace[g], g, step + 1))
  exchanged = num_groups * (num_steps // every)
  return {
      'bytes_sent': world.bytes_sent / exchanged,
      'bytes_fetched': world.bytes_fetched / exchanged,
      'requests': world.requests / exchanged,
      'staleness_steps': float(np.mean(ages)) if ages else None,
      'staleness_steps_max': max(ages, default=None),
      'publications': sum(map(len, world.published)),
  }


def table() -> list[str]:
  """Returns what an exchange costs, as lines of Markdown."""
  sizes = [
      f'{size} GB: at {" / ".join(map(str, GIGABITS))}' for size in SIZES_GB
  ]
  head = ['groups', 'topology', 'peers', 'requests', 'the store sends', *sizes]
  lines = [f'| {" | ".join(head)} Gbit/s |', '|' + '---|' * len(head)]
  for n, topology in itertools.product(GROUPS, TOPOLOGIES):
    if n <= 3 and topology != 'all':
      continue  # The same.
    of = lambda size, bits, n=n, topology=topology: cost(
        size * 1e9, n, topology, Link(bits * 1e9 / 8)
    )
    one = of(1, 1)
    cells = [
        f'{n:,}',
        topology,
        f'{one["peers"]}',
        f'{one["requests"]:,}',
        f'{n * one["peers"]:,} x the size',
        *(
            ' / '.join(_duration(of(size, b)['seconds']) for b in GIGABITS)
            for size in SIZES_GB
        ),
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return lines


def _duration(seconds: float) -> str:
  for unit, size in (('d', 86400), ('h', 3600), ('min', 60)):
    if seconds >= size:
      return f'{seconds / size:.2g} {unit}'
  return f'{seconds:.2g} s'


def simulated_table(found: list[dict[str, Any]]) -> list[str]:
  """Returns what was simulated, as lines of Markdown."""
  head = ['topology', 'size', 'lag', 'sent', 'fetched', 'requests']
  head += ['staleness: mean', 'and largest']
  lines = [f'| {" | ".join(head)} |', '|' + '---|' * len(head)]
  for row in found:
    mean, most = row['staleness_steps'], row['staleness_steps_max']
    cells = [
        row['topology'],
        f'{row["gigabytes"]} GB',
        f'{row["lag_seconds"]:g} s',
        f'{row["bytes_sent"] / 1e9:,.3g} GB',
        f'{row["bytes_fetched"] / 1e9:,.3g} GB',
        f'{row["requests"]:,.0f}',
        'no teacher' if mean is None else f'{mean:.0f} steps',
        '' if most is None else f'{most:.0f}',
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return lines


def main() -> None:
  logging.set_verbosity(logging.ERROR)  # Groups that train alone say so.
  costs = [
      {'gigabytes': size, 'groups': n, 'topology': topology, 'gigabits': bits}
      | cost(size * 1e9, n, topology, Link(bits * 1e9 / 8))
      for size, n, topology, bits in itertools.product(
          SIZES_GB, GROUPS, TOPOLOGIES, GIGABITS
      )
      if n > 3 or topology == 'all'
  ]
  simulated = [
      {'groups': 64, 'gigabytes': size, 'topology': topology, 'gigabits': 10}
      | {'lag_seconds': lag, 'every': 50, 'step_seconds': 1.0}
      | simulate(64, topology, Link(10e9 / 8, 0.05, lag), num_bytes=size * 1e9)
      for topology in TOPOLOGIES
      for size in SIZES_GB
      for lag in (0.0, 30.0)
  ]
  found = {'benchmark': 'exchange_cost', 'costs': costs}
  json.dump(found | {'simulated': simulated}, sys.stdout, indent=1)
  print()


if __name__ == '__main__':
  main()
