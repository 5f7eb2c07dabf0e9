"""500 damaged publications: each is refused, or it is what was published.

The damage is drawn from a seed: bits of disks, hands of people, faulty writers.
"""

import collections
import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax.base import Variables
from codistill_jax.exchange import publications
from codistill_jax.exchange.publications import Publication
from codistill_jax.storage import checkpoints
from codistill_jax.storage.checkpoints import MismatchError

CASES, PARTS = 500, 2
IDENTITY = {'task': 'toy', 'tokenizer': 'abc'}
GROUP, STEP, OTHER_STEP = 1, 20, 30
REFUSALS = (checkpoints.DamagedError, checkpoints.MissingError, MismatchError)
HARMLESS = 'read'


def tree_of(seed):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
      # Two leaves of one shape, one too large to be kept in a manifest.
      'params': {
          'a': {'kernel': normal(40, 30), 'bias': normal(30)},
          'b': {'kernel': normal(40, 30), 'bias': normal(30)},
          'half': normal(7).astype(jnp.bfloat16),
      },
      'model_state': {'mean': normal(30), 'count': np.array(seed, np.int32)},
  }


@pytest.fixture(scope='module')
def original(tmp_path_factory):
  """A root with two publications of one group; and what they hold."""
  root = tmp_path_factory.mktemp('original')
  written = [
      publications.write(
          root,
          Publication(GROUP, step, 12.5 + step, IDENTITY),
          Variables(**tree_of(seed)),
      )
      for step, seed in ((STEP, 1), (OTHER_STEP, 2))
  ]
  return root, written[0]


# --- Damage: each takes the directory of a publication and a generator -------


def some_file(directory, rng):
  files = sorted(p for p in directory.rglob('*') if p.is_file())
  return files[rng.integers(len(files))]


def other_of(directory):
  return directory.parent / str(OTHER_STEP)


def flip_bits(data, rng):
  for place in rng.integers(8 * len(data), size=rng.integers(1, 4)):
    data[place // 8] ^= 1 << (place % 8)
  return data


def overwrite_bytes(data, rng):
  start, length = rng.integers(len(data)), rng.integers(1, 65)
  noise = rng.bytes(int(length))[: len(data) - start]
  data[start : start + len(noise)] = noise
  return data


def zero_the_rest(data, rng):
  """As a disk that lost power does."""
  start = int(rng.integers(len(data)))
  return data[:start] + bytes(len(data) - start)


EDITS = {  # Other contents of some file.
    'truncate': lambda data, rng: data[: rng.integers(len(data) + 1)],
    'extend': lambda data, rng: data + rng.bytes(int(rng.integers(1, 5000))),
    'empty': lambda data, rng: b'',
    'flip_bits': flip_bits,
    'overwrite_bytes': overwrite_bytes,
    'zero_the_rest': zero_the_rest,
}


def edit(change):
  def damage(directory, rng):
    path = some_file(directory, rng)
    path.write_bytes(change(bytearray(path.read_bytes()), rng))

  return damage


def delete(directory, rng):
  some_file(directory, rng).unlink()


def delete_directory(directory, rng):
  inside = [p for p in directory.rglob('*') if p.is_dir()]
  shutil.rmtree(sorted(inside)[rng.integers(len(inside))])


def alter_a_digit_of_the_record(directory, rng):
  """Still JSON, and well formed."""
  path = directory / 'record.json'
  data = bytearray(path.read_bytes())
  # Of the facts, or of all of it: leaves, sizes, digests.
  end = [data.index(b'"leaves"'), len(data)][rng.integers(2)]
  digits = [i for i in range(end) if chr(data[i]).isdecimal()]
  place = digits[rng.integers(len(digits))]
  data[place] = ord('0') + (data[place] - ord('0') + rng.integers(1, 10)) % 10
  path.write_bytes(bytes(data))


def exchange_files(directory, rng):
  """The same file of two publications changes places."""
  path = some_file(directory, rng)
  other = other_of(directory) / path.relative_to(directory)
  if not other.exists():  # Data files have random names.
    other = some_file(other_of(directory), rng)
  mine, theirs = path.read_bytes(), other.read_bytes()
  path.write_bytes(theirs)
  other.write_bytes(mine)


def take_files_of_another(directory, rng):
  """Half of one publication and half of another."""
  if rng.integers(2):
    shutil.copy(other_of(directory) / 'record.json', directory)
  else:
    shutil.rmtree(directory / 'arrays')
    shutil.copytree(other_of(directory) / 'arrays', directory / 'arrays')


def copy_of_another(directory, rng):
  del rng
  shutil.rmtree(directory)
  shutil.copytree(other_of(directory), directory)


# What a faulty writer left. Made once each, as saving waits for the disk; the
# draw is from a few.


def save(directory, tree, **facts):
  written = {'group_id': GROUP, 'step': STEP, 'time': 32.5}
  written |= {'identity': IDENTITY} | facts
  return checkpoints.save(directory.parent, STEP, tree, written)


def save_with_old_leaves(directory, tree, always):
  """Gives what is saved now the leaves that were saved before; or files too."""
  before = checkpoints.load_record(directory.parent, STEP)
  after = save(directory, tree)
  lie = dataclasses.replace(before, files=after.files) if always else after
  (directory / 'record.json').write_bytes(checkpoints.encode(lie))


def swap_leaves(directory, rng):
  tree = tree_of(1)
  name = ['kernel', 'bias'][rng.integers(2)]
  a, b = tree['params']['a'], tree['params']['b']
  a[name], b[name] = b[name], a[name]
  save_with_old_leaves(directory, tree, True)


def another_structure(directory, rng):
  """Wrong shapes, dtypes, names: said by the record, or not."""
  tree = tree_of(1)
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
  save_with_old_leaves(directory, tree, rng.integers(2))


def not_finite(directory, rng):
  tree = tree_of(1)
  floats = [x for _, x in checkpoints.flatten(tree) if x.dtype != np.int32]
  leaf = floats[rng.integers(len(floats))].reshape(-1)
  places = rng.integers(leaf.size, size=rng.integers(1, 4))
  leaf[places] = rng.choice([np.nan, np.inf, -np.inf])
  save(directory, tree)


def odd_facts(directory, rng):
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
  save(directory, tree_of(1), **odd[rng.integers(len(odd))])


FAULTY_WRITERS = (swap_leaves, another_structure, not_finite, odd_facts)
VARIANTS = 16
# These say nothing true.
WHOLE = (take_files_of_another, copy_of_another, delete_directory)
WHOLE += FAULTY_WRITERS
DAMAGE = [
    *map(edit, EDITS.values()),
    *(delete, alter_a_digit_of_the_record, exchange_files),
    *WHOLE,
]


@pytest.fixture(scope='module')
def faulty(original, tmp_path_factory):
  """(writer, variant) -> directory of a publication."""
  made = {}
  for writer in FAULTY_WRITERS:
    for variant in range(VARIANTS):
      group = tmp_path_factory.mktemp('faulty') / f'group_{GROUP}'
      shutil.copytree(original[0] / f'group_{GROUP}', group)
      made[writer, variant] = group / str(STEP)
      writer(group / str(STEP), np.random.default_rng([6, variant]))
  return made


def outcome(root, written):
  """How a reader takes it; fails if it takes anything but the original."""
  try:
    found, variables = publications.read(
        root, GROUP, STEP, like=Variables(**tree_of(0)), identity=IDENTITY
    )
  except REFUSALS as e:
    assert '\n' not in str(e) and len(str(e)) < 1000, e
    return type(e).__name__
  assert found == written
  theirs = checkpoints.flatten(variables)
  ours = checkpoints.flatten(Variables(**tree_of(1)))
  for (path, x), (_, y) in zip(theirs, ours, strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype), path
    assert x.tobytes() == y.tobytes(), path
  return HARMLESS


def do_damage(damage, directory, rng, faulty):
  if damage in FAULTY_WRITERS:
    shutil.rmtree(directory)
    variant = faulty[damage, int(rng.integers(VARIANTS))]
    shutil.copytree(variant, directory)
    damage = DAMAGE[rng.integers(len(DAMAGE))]  # On top of it.
    if rng.integers(2) or damage in FAULTY_WRITERS:
      return
  damage(directory, rng)


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
      directory = spoiled / f'group_{GROUP}' / str(STEP)
      do_damage(damage, directory, rng, faulty)
      outcomes[damage][outcome(spoiled, written)] += 1
    except BaseException as e:
      e.add_note(f'case {case}: {damage}')
      raise
    shutil.rmtree(spoiled)
  assert sum(sum(c.values()) for c in outcomes.values()) == CASES // PARTS
  # Not vacuous: what says nothing true is refused always, a damaged file
  # nearly always (of the mark, only its being there matters).
  for damage in DAMAGE:
    counts = outcomes[damage]
    assert counts.total() >= CASES // PARTS // len(DAMAGE)
    allowed = 0 if damage in WHOLE else 0.4 * counts.total()
    assert counts[HARMLESS] <= allowed, (damage, counts)
