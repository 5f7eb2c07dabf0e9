"""What tests of exchanges have in common: tiny variables, disks that fail."""

import json
import pathlib
import threading
import time

import numpy as np
import pytest
from waits import PATIENCE

from codistill_jax.base import Variables
from codistill_jax.exchange import publications
from codistill_jax.exchange.kinds import Checkpoints
from codistill_jax.exchange.publications import Publication
from codistill_jax.exchange.store_exchange import CheckpointExchange
from codistill_jax.storage import checkpoints
from codistill_jax.storage.background import Patience

IDENTITY = {'task': 'toy'}
EVERY = 10
# Of a disk that is tried again at once; other limits are those of every run.
HASTY = Patience(retry=0.01, poll=0.002, remote_lease_settle=0.05)
PLAN = ('every', 'mode', 'staleness', 'publish_dtype', 'teacher_dtype')
PLAN += ('max_staleness_steps', 'staleness_policy', 'topology')


def variables_of(value, width=3):
  return Variables(
      {'w': np.full((width,), value, np.float32)}, {'n': np.int32(7)}
  )


def plan_of(kwargs, mode='freshest'):
  """Takes what is of a plan out of `kwargs`."""
  chosen = {k: kwargs.pop(k) for k in PLAN if k in kwargs}
  return Checkpoints(**{'every': EVERY, 'mode': mode} | chosen)


@pytest.fixture
def join(tmp_path):
  """Makes exchanges in one directory; closes them at the end."""
  made = []

  def make(group_id=0, num_groups=2, mode='freshest', **kwargs):
    plan = plan_of(kwargs, mode)
    made.append(
        CheckpointExchange(
            tmp_path,
            group_id,
            num_groups,
            like=variables_of(0),
            plan=plan,
            identity=IDENTITY,
            **{'patience': HASTY} | kwargs,
        )
    )
    return made[-1]

  yield make
  for exchange in made:
    exchange.close()


def publish(root, group_id, step, value=None, *, at=None, **kwargs):
  """As another process does, in one go."""
  publications.write(
      root,
      Publication(group_id, step, time.time() if at is None else at, IDENTITY),
      variables_of(step if value is None else value, **kwargs),
  )


def publish_nan(root, group_id, step):
  """As a publisher does that checks nothing."""
  facts = {
      'group_id': group_id,
      'step': step,
      'time': time.time(),
      'identity': IDENTITY,
  }
  variables = variables_of(np.nan)
  tree = {'params': variables.params, 'model_state': variables.model_state}
  directory = publications.group_directory(root, group_id)
  checkpoints.save(directory, step, tree, facts)


def publish_all(exchange, *steps):
  """One by one, each until it is written."""
  for step in steps:
    assert exchange.publish_if_due(step, variables_of(step))
    exchange.flush()


def kept(root, group_id=0):
  return publications.published_steps(root, group_id)


def steps_in_use(exchange):
  return tuple(None if p is None else p.step for p in exchange.in_use)


def fetch_until(exchange, step, *wanted):
  """Fetches, as a loop does, until these steps are in use."""
  deadline = time.monotonic() + PATIENCE
  while True:
    teachers = exchange.fetch(step)
    if steps_in_use(exchange) == wanted:
      return teachers
    assert time.monotonic() < deadline, steps_in_use(exchange)
    time.sleep(0.002)


def shown(teachers):
  """The value of each teacher; None for one that is absent."""
  if teachers is None:
    return None
  values = np.asarray(teachers.variables.params['w'])[:, 0]
  assert np.isfinite(values).all()
  return [float(v) if p else None for v, p in zip(values, teachers.present_P)]


def flip(directory):
  """Inverts bits in the middle of every data file."""
  for path in pathlib.Path(directory).rglob('arrays/**/d/*'):
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 4, 3 * len(data) // 4):
      data[i] ^= 0xFF
    path.write_bytes(bytes(data))


def restarts_at(root, group_id, step):
  """As a reader says that it has a resume checkpoint."""
  directory = pathlib.Path(root) / f'group_{group_id}'
  directory.mkdir(exist_ok=True)
  path = directory / 'restart_step.json'
  path.write_text(json.dumps({'step': step}))


def marks(root, text, name='reading.json', group_id=1):
  """As a process of a group says what it reads."""
  directory = pathlib.Path(root) / f'group_{group_id}'
  directory.mkdir(exist_ok=True)
  (directory / name).write_text(text)


def reads(step, group_id=0):
  return json.dumps({'nonce': 'a', 'steps': {str(group_id): step}})


class Disk:
  """`publications.write` on a disk that is full for so many writes."""

  def __init__(self, monkeypatch, refusals=10**6):
    self.left = refusals
    self.tried = []
    self._write = publications.write
    monkeypatch.setattr(publications, 'write', self)

  def __call__(self, root, publication, variables):
    self.tried.append(publication.step)
    if self.left:
      self.left -= 1
      raise OSError(28, 'No space left on device')
    return self._write(root, publication, variables)


class Gate:
  """Holds calls of a function of `publications` up until it is opened."""

  def __init__(self, monkeypatch, name, held=lambda *args: True):
    self.entered = threading.Event()
    self._opened = threading.Event()
    self._held = held
    self._call = getattr(publications, name)
    monkeypatch.setattr(publications, name, self)

  def __call__(self, *args, **kwargs):
    if self._held(*args):
      self.entered.set()
      assert self._opened.wait(PATIENCE)
    return self._call(*args, **kwargs)

  def open(self):
    self._opened.set()

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.open()
