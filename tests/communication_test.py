"""Tests of studies/communication: bytes per update by pattern."""

import pytest

from experiments.studies.costs import bytes_per_update


@pytest.mark.parametrize('pattern', ['all_reduce', 'exchange'])
@pytest.mark.parametrize('workers', [1, 2, 3, 8, 256])
def test_an_all_reduce_is_a_ring(pattern, workers):
  received = 0.0  # By worker 0.
  for _ in range(2):  # To add up, then to hand round.
    for _ in range(workers - 1):
      received += 1000.0 / workers
  got = bytes_per_update(pattern, 1000.0, workers=workers)
  assert got == pytest.approx(received)


@pytest.mark.parametrize(
    'pattern, numbers, expected',
    [
        ('none', {'workers': 128}, 0),
        # The server sends and receives, whatever the workers.
        ('server', {'workers': 128}, 2000),
        # An all-reduce now and then.
        ('outer', {'workers': 4}, 1500),
        ('outer', {'workers': 4, 'outer_every': 100}, 15),
    ],
)
def test_bytes_of_an_update(pattern, numbers, expected):
  got = bytes_per_update(pattern, 1000.0, **numbers)
  assert got == pytest.approx(expected)
  assert bytes_per_update(pattern, 3000.0, **numbers) == pytest.approx(3 * got)


def test_a_pattern_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match='none, all_reduce, exchange'):
    bytes_per_update('gossip', 1.0)
