"""Tests of studies/communication: bytes per update by pattern."""

import pytest

from experiments.studies.communication import bytes_per_update


@pytest.mark.parametrize('workers', [1, 2, 3, 8, 256])
def test_an_all_reduce_is_a_ring(workers):
  received = 0.0  # By worker 0.
  for _ in range(2):  # To add up, then to hand round.
    for _ in range(workers - 1):
      received += 1000.0 / workers
  got = bytes_per_update('all_reduce', 1000.0, workers=workers)
  assert got == pytest.approx(received)


@pytest.mark.parametrize(
    'pattern, numbers, expected',
    [
        ('none', {'workers': 128}, 0),
        # The server sends and receives, whatever the workers.
        ('server', {'workers': 128}, 2000),
        # Publications beside the all-reduce of the group.
        ('exchange', {'exchange_every': 50}, 1000 / 50),
        (
            'exchange',
            {'workers': 4, 'exchange_every': 50, 'peers': 3},
            3 * 1000 / 50 + 1500,
        ),
        # An all-reduce now and then.
        ('outer', {'workers': 4}, 1500),
        ('outer', {'workers': 4, 'outer_every': 100}, 15),
    ],
)
def test_bytes_of_an_update(pattern, numbers, expected):
  got = bytes_per_update(pattern, 1000.0, **numbers)
  assert got == pytest.approx(expected)
  assert bytes_per_update(pattern, 3000.0, **numbers) == pytest.approx(3 * got)


def test_errors_say_what_was_expected():
  with pytest.raises(ValueError, match='none, all_reduce, exchange'):
    bytes_per_update('gossip', 1.0)
  with pytest.raises(ValueError, match='exchange_every to be at least 1'):
    bytes_per_update('exchange', 1.0, exchange_every=0)
