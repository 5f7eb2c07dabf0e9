"""Tests of studies/communication: bytes per update by pattern."""

import pytest

from experiments.studies import communication
from experiments.studies.communication import bytes_per_update


def ring_by_hand(workers, size):
  """Passes parts round a ring; what worker 0 receives."""
  received = 0.0
  for _ in range(2):  # To add up, then to hand round.
    for _ in range(workers - 1):
      received += size / workers
  return received


@pytest.mark.parametrize('workers', [1, 2, 3, 8, 256])
def test_an_all_reduce_is_a_ring(workers):
  got = bytes_per_update('all_reduce', 1000.0, workers=workers)
  assert got == pytest.approx(ring_by_hand(workers, 1000.0))
  assert got < 2000


def test_an_exchange_adds_its_publications_to_the_all_reduce():
  got = bytes_per_update(
      'exchange', 1000.0, workers=4, exchange_every=50, peers=3
  )
  assert got == 3 * 1000 / 50 + 1500
  alone = bytes_per_update('exchange', 1000.0, exchange_every=50)
  assert alone == 20


def test_an_outer_step_costs_an_all_reduce_now_and_then():
  got = bytes_per_update('outer', 1000.0, workers=8, outer_every=100)
  often = bytes_per_update('outer', 1000.0, workers=8)
  assert got == pytest.approx(often / 100)
  assert often == bytes_per_update('all_reduce', 1000.0, workers=8)


def test_a_server_sends_and_receives_whatever_the_workers():
  assert bytes_per_update('server', 1000.0, workers=128) == 2000
  assert bytes_per_update('none', 1000.0, workers=128) == 0


@pytest.mark.parametrize('pattern', communication.PATTERNS)
def test_bytes_grow_with_the_parameters(pattern):
  numbers = {'workers': 4, 'exchange_every': 5, 'peers': 2, 'outer_every': 7}
  one = bytes_per_update(pattern, 1.0, **numbers)
  assert bytes_per_update(pattern, 3.0, **numbers) == pytest.approx(3 * one)


def test_errors_say_what_was_expected():
  with pytest.raises(ValueError, match='none, all_reduce, exchange'):
    bytes_per_update('gossip', 1.0)
  with pytest.raises(ValueError, match='exchange_every to be at least 1'):
    bytes_per_update('exchange', 1.0, exchange_every=0)
