"""Who learns from whom: every graph is what its name says, for every G."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill_jax.exchange import topology
from codistill_jax.exchange.topology import peers_of, readers_of

SIZES = range(1, 17)


def graph(num_groups, name='all', seed=0):
  return [peers_of(g, num_groups, name, seed) for g in range(num_groups)]


def everybody_hears(edges):
  """Whether what one group learns reaches every other one in the end."""
  for start in range(len(edges)):
    known = {start}
    for _ in edges:
      known |= {g for g, peers in enumerate(edges) if known & set(peers)}
    if len(known) < len(edges):
      return False
  return True


@pytest.mark.parametrize('num_groups', SIZES)
def test_all_is_everybody_else(num_groups):
  for g, peers in enumerate(graph(num_groups)):
    assert sorted([*peers, g]) == list(range(num_groups))


@pytest.mark.parametrize('num_groups', SIZES)
def test_a_ring_has_one_peer_each_and_is_one_circle(num_groups):
  edges = graph(num_groups, 'ring')
  if num_groups == 1:
    assert edges == [()]
    return
  g, seen = 0, []
  for _ in range(num_groups):
    (g,) = edges[g]
    seen.append(g)
  assert sorted(seen) == list(range(num_groups)) and g == 0


@given(data=st.data())
def test_random_has_k_peers_and_k_readers_and_cuts_nobody_off(data):
  num_groups = data.draw(st.integers(2, 16))
  k = data.draw(st.integers(1, num_groups - 1))
  seed = data.draw(st.integers(0, 1000))
  edges = graph(num_groups, f'random-{k}', seed)
  for g, peers in enumerate(edges):
    assert len(set(peers)) == k and g not in peers
    assert peers == tuple(sorted(peers))
    readers = readers_of(g, num_groups, f'random-{k}', seed)
    assert len(readers) == k
    assert all(g in edges[reader] for reader in readers)
  assert everybody_hears(edges)


def test_random_is_a_function_of_its_seed():
  assert graph(16, 'random-3', 5) == graph(16, 'random-3', 5)
  assert graph(16, 'random-3', 5) != graph(16, 'random-3', 6)


def test_a_baseline_needs_no_other_configuration():
  for name in ('all', 'ring', 'random-3'):
    assert graph(1, name) == [()]


def test_lists_say_it_group_by_group():
  pairs = [[1], [0], [3], [2]]
  assert graph(4, pairs) == [(1,), (0,), (3,), (2,)]
  # A teacher that learns from nobody, and a group that hears of two.
  star = ((), [0], [1, 0])
  assert graph(3, star) == [(), (0,), (0, 1)]
  assert readers_of(0, 3, star) == (1, 2)
  assert readers_of(2, 3, star) == ()


@pytest.mark.parametrize(
    'name, message',
    [
        ('star', "'star' is not one of all, ring, random-<k>"),
        ('random-0', "'random-0' is not one of"),
        ('random', "'random' is not one of"),
        (3, '3 is neither a name nor a list of lists'),
        ([1, 0], r'\[1, 0\] is neither a name nor a list of lists'),
        ([[0], [0]], 'gives group 0 the peer 0; .* a peer is another one'),
        ([[1], [2]], 'gives group 1 the peer 2; with lists for 2 groups'),
        ([[True], [0]], 'gives group 0 the peer True'),
        ([[1, 1], [0]], r'gives group 0 a peer twice: \[1, 1\]'),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(name, message):
  with pytest.raises(ValueError, match=message) as error:
    topology.check(name)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (
            (2, 2),
            r'group_id=2 is out of range: .*num_groups=2 it lies in 0\.\.1',
        ),
        ((-1, 2), 'group_id=-1 is out of range'),
        ((0, 0), 'num_groups=0; set it to at least 1'),
        ((0, 3, 'random-3'), 'needs more than 3 groups.*random-2 at most'),
        ((0, 3, [[1], [0]]), 'lists the peers of 2 groups, but num_groups=3'),
    ],
)
def test_what_does_not_suit_the_groups_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    peers_of(*arguments)
