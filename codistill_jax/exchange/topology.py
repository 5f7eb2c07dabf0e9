"""Who learns from whom: the peers of each group, as a directed graph.

A topology is a name or a list of lists:

* `all`: every group learns from every other one (Anil et al. 2018).
* `ring`: group g learns from group g - 1 alone (the last before group 0). News
  takes G - 1 exchanges around; the cost of teachers does not grow with G.
* `random-<k>`, such as `random-3`: each group has k peers and is the peer of k
  groups, drawn by a seed; all groups hear of each other sooner or later.
* `[[1], [0], [3], [2]]`: entry g lists the peers of group g; here two pairs.
"""

import re
from collections.abc import Sequence

import numpy as np

Topology = str | Sequence[Sequence[int]]


def check(topology: Topology) -> None:
  """Raises ValueError if no number of groups could make sense of it."""
  if isinstance(topology, str):
    if topology in ('all', 'ring') or re.fullmatch(
        r'random-[1-9]\d*', topology
    ):
      return
    raise ValueError(
        f'topology {topology!r} is not one of all, ring, random-<k> (such as'
        ' random-3) or a list with the peers of each group'
    )
  lists = isinstance(topology, list | tuple) and all(
      isinstance(peers, list | tuple) for peers in topology
  )
  if not lists:
    raise ValueError(
        f'topology {topology!r} is neither a name nor a list of lists; write'
        ' [[1], [0]] to give group 0 the peer 1 and group 1 the peer 0'
    )
  for group_id, peers in enumerate(topology):
    _check_list(group_id, peers, len(topology))


def peers_of(
    group_id: int, num_groups: int, topology: Topology = 'all', seed: int = 0
) -> tuple[int, ...]:
  """The groups that `group_id` learns from, ascending.

  Raises:
    ValueError: For a `group_id` out of range, or a topology that does not suit
      `num_groups`.
  """
  if num_groups < 1:
    raise ValueError(f'num_groups={num_groups}; set it to at least 1')
  if not 0 <= group_id < num_groups:
    raise ValueError(
        f'group_id={group_id} is out of range: with num_groups={num_groups}'
        f' it lies in 0..{num_groups - 1}'
    )
  check(topology)
  if not isinstance(topology, str):
    if len(topology) != num_groups:
      raise ValueError(
          f'topology lists the peers of {len(topology)} groups, but'
          f' num_groups={num_groups}; give one list for each group'
      )
    return tuple(sorted(topology[group_id]))
  if topology == 'all':
    shifts = range(1, num_groups)
  elif topology == 'ring':
    shifts = range(1, min(num_groups, 2))
  else:
    return _random_peers(group_id, num_groups, int(topology[7:]), seed)
  return tuple(sorted((group_id - shift) % num_groups for shift in shifts))


def readers_of(
    group_id: int, num_groups: int, topology: Topology = 'all', seed: int = 0
) -> tuple[int, ...]:
  """The groups that learn from `group_id`, ascending."""
  return tuple(
      g
      for g in range(num_groups)
      if group_id in peers_of(g, num_groups, topology, seed)
  )


def _random_peers(
    group_id: int, num_groups: int, k: int, seed: int
) -> tuple[int, ...]:
  if num_groups == 1:
    return ()  # The baseline of a study needs no other configuration.
  if k >= num_groups:
    raise ValueError(
        f'topology random-{k} needs more than {k} groups, but num_groups='
        f'{num_groups}; use random-{num_groups - 1} at most'
    )
  rng = np.random.default_rng(seed)
  # Groups on a circle in random order; all look back by the same k distances,
  # of which one is 1: in and out degree are k, and nobody is cut off.
  circle = rng.permutation(num_groups)
  others = 2 + rng.permutation(num_groups - 2)[: k - 1]
  place = int(np.flatnonzero(circle == group_id)[0])
  return tuple(
      sorted(
          int(circle[(place - shift) % num_groups]) for shift in (1, *others)
      )
  )


def _check_list(group_id: int, peers: Sequence[int], num_groups: int) -> None:
  for peer in peers:
    if type(peer) is not int or not 0 <= peer < num_groups or peer == group_id:
      raise ValueError(
          f'topology gives group {group_id} the peer {peer!r}; with lists for'
          f' {num_groups} groups a peer is another one of'
          f' 0..{num_groups - 1}'
      )
  if len(set(peers)) != len(peers):
    raise ValueError(
        f'topology gives group {group_id} a peer twice: {list(peers)}; name'
        ' each once'
    )
