"""A trouble is said once when it begins, and once when it is over."""

import logging

import pytest

from codistill_jax.storage.troubles import Troubles


@pytest.fixture
def said(caplog):
  caplog.set_level(logging.WARNING, logger='absl')
  return lambda: [r.getMessage() for r in caplog.records]


def test_a_row_of_failures_is_said_once(said):
  troubles = Troubles('group 3: ')
  for _ in range(5):
    troubles.failed('publishing', OSError(28, 'No space left on device'))
  assert said() == [
      'group 3: publishing fails ([Errno 28] No space left on device); training'
      ' goes on, and it is tried again'
  ]
  (now,) = troubles.now
  assert (now.doing, now.count) == ('publishing', 5)
  assert troubles.failures == 5


def test_its_end_is_said_once_and_the_next_row_again(said):
  troubles = Troubles()
  troubles.worked('publishing')
  assert said() == []
  for _ in range(2):
    troubles.failed('publishing', OSError())
    troubles.failed('publishing', OSError())
    troubles.worked('publishing')
    troubles.worked('publishing')
  assert [line.split(' ', 1)[1].split(' ')[0] for line in said()] == [
      'fails',
      'works',
      'fails',
      'works',
  ]
  assert 'after 2 failures' in said()[1]
  assert troubles.now == () and troubles.failures == 4


def test_troubles_are_apart_and_ordered_by_age():
  troubles = Troubles()
  troubles.failed('publishing', OSError('a\nb'))
  troubles.failed('saving', OSError('c'))
  troubles.failed('publishing', OSError('d  e'))
  assert [(t.doing, t.reason, t.count) for t in troubles.now] == [
      ('publishing', 'd e', 2),
      ('saving', 'c', 1),
  ]
  assert troubles.now[0].since <= troubles.now[1].since
  troubles.worked('publishing')
  assert [t.doing for t in troubles.now] == ['saving']
