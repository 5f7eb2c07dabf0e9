"""1,000 damaged publications: each is refused, or it is what was published.

The damage is drawn from a seed: bits of disks, hands of people, faulty writers.
"""

import collections
import dataclasses
import functools
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax.base import Variables
from codistill_jax.exchange import publications
from codistill_jax.exchange.publications import Publication
from codistill_jax.storage import checkpoints
from codistill_jax.storage.checkpoints import MismatchError

CASES, PARTS = 1000, 4
IDENTITY = {'task': 'toy', 'tokenizer': 'abc'}
GROUP, STEP, OTHER_STEP = 1, 20, 30
REFUSALS = (checkpoints.DamagedError, checkpoints.MissingError, MismatchError)
HARMLESS = 'read'


def variables_of(seed):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return Variables(
      # Two leaves of one shape, one too large to be kept in a manifest.
      params={
          'a': {'kernel': normal(40, 30), 'bias': normal(30)},
          'b': {'kernel': normal(40, 30), 'bias': normal(30)},
          'half': normal(7).astype(jnp.bfloat16),
      },
      model_state={'mean': normal(30), 'count': np.array(seed, np.int32)},
  )


def publication_of(step):
  return Publication(GROUP, step, time=12.5 + step, identity=IDENTITY)


def as_tree(variables):
  return {'params': variables.params, 'model_state': variables.model_state}


@pytest.fixture(scope='module')
def original(tmp_path_factory):
  """A root with two publications of one group; and what they hold."""
  root = tmp_path_factory.mktemp('original')
  written = publications.write(root, publication_of(STEP), variables_of(1))
  publications.write(root, publication_of(OTHER_STEP), variables_of(2))
  return root, written


# --- Damage: each takes the directory of the group and a generator -----------


def directory_of(group, step=STEP):
  return group / str(step)


def some_file(group, rng, step=STEP):
  files = sorted(p for p in directory_of(group, step).rglob('*') if p.is_file())
  return files[rng.integers(len(files))]


def edits(change):
  """A damage: `change(data, rng)` gives another content of some file."""

  @functools.wraps(change)
  def damage(group, rng):
    path = some_file(group, rng)
    path.write_bytes(change(bytearray(path.read_bytes()), rng))

  return damage


@edits
def truncate(data, rng):
  return data[: rng.integers(len(data) + 1)]


@edits
def extend(data, rng):
  return data + rng.bytes(int(rng.integers(1, 5000)))


@edits
def empty(data, rng):
  del data, rng
  return b''


@edits
def flip_bits(data, rng):
  for place in rng.integers(8 * len(data), size=rng.integers(1, 4)):
    data[place // 8] ^= 1 << (place % 8)
  return data


@edits
def overwrite_bytes(data, rng):
  start, length = rng.integers(len(data)), rng.integers(1, 65)
  noise = rng.bytes(int(length))[: len(data) - start]
  data[start : start + len(noise)] = noise
  return data


@edits
def zero_a_page(data, rng):
  """As a disk that lost power does."""
  start = int(rng.integers(len(data)))
  data[start:] = bytes(len(data) - start)
  return data


def delete(group, rng):
  some_file(group, rng).unlink()


def delete_directory(group, rng):
  directories = [p for p in directory_of(group).rglob('*') if p.is_dir()]
  shutil.rmtree(sorted(directories)[rng.integers(len(directories))])


def alter_a_digit_of_the_record(group, rng):
  """Still JSON, and well formed."""
  path = directory_of(group) / 'record.json'
  data = bytearray(path.read_bytes())
  # Of the facts, or of all of it: leaves, sizes, digests.
  end = [data.index(b'"leaves"'), len(data)][rng.integers(2)]
  digits = [i for i in range(end) if chr(data[i]).isdecimal()]
  place = digits[rng.integers(len(digits))]
  data[place] = ord('0') + (data[place] - ord('0') + rng.integers(1, 10)) % 10
  path.write_bytes(bytes(data))


def exchange_files(group, rng):
  """The same file of two publications changes places."""
  path = some_file(group, rng)
  name = path.relative_to(directory_of(group))
  other = directory_of(group, OTHER_STEP) / name
  if not other.exists():  # Data files have random names.
    other = some_file(group, rng, OTHER_STEP)
  mine, theirs = path.read_bytes(), other.read_bytes()
  path.write_bytes(theirs)
  other.write_bytes(mine)


def take_files_of_another(group, rng):
  """Half of one publication and half of another."""
  name = ['arrays', 'record.json'][rng.integers(2)]
  mine = directory_of(group) / name
  theirs = directory_of(group, OTHER_STEP) / name
  if mine.is_dir():
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
  else:
    shutil.copy(theirs, mine)


def copy_of_another(group, rng):
  del rng
  shutil.rmtree(directory_of(group))
  shutil.copytree(directory_of(group, OTHER_STEP), directory_of(group))


# What a faulty writer left. Made once each, as saving waits for the disk; the
# draw is from a few.


def save(group, tree, **facts):
  published = publication_of(STEP)
  written = {
      'group_id': published.group_id,
      'step': published.step,
      'time': published.time,
      'identity': dict(published.identity),
  }
  return checkpoints.save(group, STEP, tree, written | facts)


def lie_about_leaves(group, before, after):
  """Gives what was saved now the record of what was saved before."""
  path = directory_of(group) / 'record.json'
  lie = dataclasses.replace(before, files=after.files)
  path.write_bytes(checkpoints.encode(lie))


def swap_leaves(group, rng):
  """Saved again with two leaves exchanged; with the old record, or leaves."""
  tree = as_tree(variables_of(1))
  name = ['kernel', 'bias'][rng.integers(2)]
  a, b = tree['params']['a'], tree['params']['b']
  a[name], b[name] = b[name], a[name]
  before = checkpoints.load_record(group, STEP)
  after = save(group, tree)
  lie_about_leaves(group, before, after if rng.integers(2) else before)


def another_structure(group, rng):
  """Wrong shapes, dtypes, names: said by the record, or not."""
  tree = as_tree(variables_of(1))
  params = tree['params']
  changes = [
      lambda: params['a'].update(kernel=params['a']['kernel'].T),
      lambda: params['a'].update(kernel=params['a']['kernel'][:-1]),
      lambda: params['a'].update(bias=params['a']['bias'][None]),
      lambda: params['a'].update(bias=np.arange(30, dtype=np.int32)),
      lambda: tree['model_state'].update(count=np.array(2, np.int64)),
      lambda: tree['model_state'].pop('mean'),
      lambda: params.update(c={'bias': params['a'].pop('bias')}),
      lambda: params.update(more=np.ones(3, np.float32)),
  ]
  changes[rng.integers(len(changes))]()
  before = checkpoints.load_record(group, STEP)
  after = save(group, tree)
  if rng.integers(2):
    lie_about_leaves(group, before, after)


def not_finite(group, rng):
  tree = as_tree(variables_of(1))
  leaves = [
      *tree['params']['a'].values(),
      *tree['params']['b'].values(),
      tree['params']['half'],
      tree['model_state']['mean'],
  ]
  leaf = leaves[rng.integers(len(leaves))].reshape(-1)
  places = rng.integers(leaf.size, size=rng.integers(1, 4))
  leaf[places] = rng.choice([np.nan, np.inf, -np.inf])
  save(group, tree)


def odd_facts(group, rng):
  odd = [
      {'time': float(rng.choice([np.nan, np.inf, -np.inf]))},
      {'time': str(rng.random())},
      {'step': STEP + int(rng.choice([-30, -1, 1]))},
      {'step': float(STEP)},
      {'group_id': int(rng.integers(2, 9))},
      {'group_id': None},
      {'identity': {**IDENTITY, 'tokenizer': rng.bytes(3).hex()}},
      {'identity': [1]},
      {rng.bytes(3).hex(): 1},
  ]
  save(group, as_tree(variables_of(1)), **odd[rng.integers(len(odd))])


FAULTY_WRITERS = (swap_leaves, another_structure, not_finite, odd_facts)
VARIANTS = 16


@pytest.fixture(scope='module')
def faulty(original, tmp_path_factory):
  """(writer, variant) -> directory of a step."""
  made = {}
  for writer in FAULTY_WRITERS:
    for variant in range(VARIANTS):
      group = tmp_path_factory.mktemp('faulty') / f'group_{GROUP}'
      shutil.copytree(original[0] / f'group_{GROUP}', group)
      writer(group, np.random.default_rng([6, variant]))
      made[writer, variant] = directory_of(group)
  return made


DAMAGE = [
    truncate,
    extend,
    empty,
    delete,
    delete_directory,
    flip_bits,
    alter_a_digit_of_the_record,
    overwrite_bytes,
    zero_a_page,
    exchange_files,
    take_files_of_another,
    copy_of_another,
    swap_leaves,
    another_structure,
    not_finite,
    odd_facts,
]


def outcome(root, written):
  """How a reader takes it; fails if it takes anything but the original."""
  try:
    found, variables = publications.read(
        root, GROUP, STEP, like=variables_of(0), identity=IDENTITY
    )
  except REFUSALS as e:
    assert '\n' not in str(e) and len(str(e)) < 1000, e
    return type(e).__name__
  assert found == written
  theirs, ours = (
      checkpoints.flatten(as_tree(x)) for x in (variables, variables_of(1))
  )
  for (path, x), (_, y) in zip(theirs, ours, strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype), path
    assert x.tobytes() == y.tobytes(), path
  return HARMLESS


def do_damage(damage, group, rng, faulty):
  if damage in FAULTY_WRITERS:
    shutil.rmtree(directory_of(group))
    variant = faulty[damage, int(rng.integers(VARIANTS))]
    shutil.copytree(variant, directory_of(group))
    damage = DAMAGE[rng.integers(len(DAMAGE))]  # On top of it.
    if rng.integers(2) or damage in FAULTY_WRITERS:
      return
  damage(group, rng)


@pytest.mark.parametrize('part', range(PARTS))
def test_a_damaged_publication_is_refused_or_identical(
    original, faulty, tmp_path, part
):
  root, written = original
  assert outcome(root, written) == HARMLESS
  outcomes = collections.defaultdict(collections.Counter)
  for case in range(part, CASES, PARTS):
    rng = np.random.default_rng([5, case])
    spoiled = tmp_path / 'spoiled'
    shutil.copytree(root, spoiled)
    damage = DAMAGE[case // PARTS % len(DAMAGE)]
    try:
      do_damage(damage, spoiled / f'group_{GROUP}', rng, faulty)
      outcomes[damage.__name__][outcome(spoiled, written)] += 1
    except BaseException as e:
      e.add_note(f'case {case}: {damage.__name__}')
      raise
    shutil.rmtree(spoiled)
  assert sum(sum(c.values()) for c in outcomes.values()) == CASES // PARTS
  # Not vacuous: what says nothing true is refused always, a damaged file
  # nearly always (of the mark, only its being there matters).
  for damage in DAMAGE:
    counts = outcomes[damage.__name__]
    assert counts.total() >= CASES // PARTS // len(DAMAGE)
    whole = (take_files_of_another, copy_of_another, delete_directory)
    whole += FAULTY_WRITERS
    allowed = 0 if damage in whole else 0.4 * counts.total()
    assert counts[HARMLESS] <= allowed, (damage.__name__, counts)
