"""Tasks of tables: what is read of them, and how it enters a batch."""

import datasets
import hypothesis
import jax
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st

import codistill_jax as cj
from codistill_jax.data import examples, tables
from codistill_jax.models import dnn

ROWS = 300
COLUMNS = {'label': 'late', 'categorical': ['job', 'zip'], 'numeric': 'age'}


@pytest.fixture(scope='module')
def frame():
  rng = np.random.default_rng(0)
  ages = np.where(rng.random(ROWS) < 0.1, np.nan, rng.normal(40, 9, ROWS))
  return pd.DataFrame(
      {
          'other': [[i] for i in range(ROWS)],  # Nobody asks for it.
          'job': rng.choice(['007', '7', 'été', 'NA', None], ROWS),
          'zip': rng.integers(1, 4, ROWS),
          'age': ages,
          'late': rng.choice(['no', 'yes'], ROWS),
      }
  )


def csv(**options):
  def form(frame, path):
    frame.to_csv(path, index=False, **options)
    return path

  return form


def parquet(frame, path):
  frame.to_parquet(path)
  return str(path)


FORMS = {
    'DataFrame': lambda frame, path: frame,
    'columns': lambda frame, path: frame.to_dict('list'),
    'rows': lambda frame, path: frame.to_dict('records'),
    'datasets': lambda frame, path: datasets.Dataset.from_pandas(frame),
    'csv': csv(),
    'semicolons': csv(sep=';'),
    'tabs, gzip': csv(sep='\t', compression='gzip'),
    'a mark, xz': csv(compression='xz', encoding='utf-8-sig'),
    'parquet': parquet,
}


def batch_of(task, size=64):
  return task.train_stream(group_id=0, num_groups=1, group_batch=size).batch(0)


@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
def test_a_table_in_any_form_is_the_same_task(frame, tmp_path, form):
  task = cj.table_task(form(frame, tmp_path / 'x.csv'), **COLUMNS, min_count=1)
  expected = cj.table_task(frame, **COLUMNS, min_count=1)
  assert task.identity == expected.identity
  jax.tree.map(
      np.testing.assert_array_equal, batch_of(task), batch_of(expected)
  )


def test_other_rows_are_read_as_those_of_the_run(frame, tmp_path):
  """By its vocabulary, numbers and classes, whatever the others are."""
  task = cj.table_task(frame, **COLUMNS, min_count=2)
  whole = task.other_data(csv()(frame, tmp_path / 'all.csv'), 'validation')
  (batch,) = whole(ROWS)
  own = [batch_of(task, 240), *task.eval_batches(30), *task.test_batches(30)]
  rows_of = lambda batch: {
      (*a.tolist(), *b.tolist(), label)
      for a, b, label in zip(*batch['inputs'].values(), batch['labels'])
  }
  assert rows_of(batch) == set.union(*map(rows_of, own))
  # Some of them: of one class, older and with another job.
  few = frame[frame['late'] == 'yes'][:9].assign(job='new', other=2.5)
  (batch,) = task.other_data(csv()(few, tmp_path / 'few.csv'), 'validation')(9)
  assert (batch['labels'] == 1).all() and batch['weights'].sum() == 9
  # A whole number is the same as text where others are missing, too.
  few = few.assign(age=few['age'] + 1, zip=few['zip'].astype(float))
  path = parquet(few, tmp_path / 'few.parquet')
  (expected,) = task.other_data(path, 'validation')(9)
  apart = expected['inputs']['integers'] - batch['inputs']['integers']
  known = few['age'].notna()
  (deviation,) = task.raw_inputs.scaling.deviation_I
  np.testing.assert_allclose(apart[known, 0], 1 / deviation, rtol=1e-4)
  assert (batch['inputs']['categories'][:, 0] == 1).all()
  np.testing.assert_array_equal(
      batch['inputs']['categories'], expected['inputs']['categories']
  )


def test_every_column_has_an_argument_of_its_own():
  names = ['a b', 'a_b', 'a-b'], ['7', '_', '']
  columns = tables.Columns(*map(tuple, names), tables.hashed([1] * 3, 3))
  assert list(columns.arguments.values()) == [*names[0], *names[1]]
  assert all(name.isidentifier() for name in columns.arguments)


@pytest.mark.parametrize(
    'change, split, message',
    [
        ({'late': 'maybe'}, 'validation', "the label 'maybe'; .* no, yes"),
        ({'age': None}, 'validation', "no.* columns 'age'|'age' does not"),
        ({}, 'test', 'not divided into splits'),
    ],
)
def test_another_table_that_does_not_fit_is_refused(
    frame, tmp_path, change, split, message
):
  task = cj.table_task(frame, **COLUMNS)
  path = csv()(frame[:9].assign(**change), tmp_path / 'x.csv')
  with pytest.raises(ValueError, match=message):
    task.other_data(path, split)


def test_each_row_is_in_one_split_with_all_of_its_columns(frame):
  task = cj.table_task(frame, **COLUMNS, min_count=1, test_fraction=0.2)
  assert (task.num_classes, task.output) == (2, 'sigmoid')
  assert task.model_arguments == {'table_sizes': (6, 5), 'num_integers': 2}
  rows = []
  for batch in (
      batch_of(task, 210),
      *task.eval_batches(30),
      *task.test_batches(60),
  ):
    ages, unknown = batch['inputs']['integers'].T
    jobs, zips = batch['inputs']['categories'].T
    rows += zip(batch['labels'], jobs, zips, ages, unknown)
  text = lambda value: tables.value_of_text(str(value))
  ids = lambda column: {
      value: i
      for i, value in enumerate(sorted(column.dropna().unique(), key=text), 2)
  }
  jobs, zips = ids(frame['job']), ids(frame['zip'])
  known = [row[3] for row in rows if not row[4]]
  ages = frame['age'].dropna()
  order = np.argsort(np.argsort(ages))  # By its place among all others.
  assert len(rows) == ROWS and len(set(known)) == len(ages)
  age = dict(zip(ages.index, np.sort(known)[order]))
  expected = [
      (
          late == 'yes',
          jobs.get(job, 0),
          zips[place],
          age.get(i, 0),
          i not in age,
      )
      for i, (job, place, late) in enumerate(
          zip(frame['job'], frame['zip'], frame['late'])
      )
  ]
  assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize(
    'values, classes',
    [
        ([10, 9, 100], ['9', '10', '100']),
        (['10', '9', '100'], ['9', '10', '100']),
        ([True, False], ['False', 'True']),
        ([1, -1], ['-1', '1']),
        (['b', 'a', 'c', 'B'], ['B', 'a', 'b', 'c']),
    ],
)
def test_classes_are_numbered_in_their_order(values, classes):
  column = [values[i % len(values)] for i in range(200)]
  task = cj.table_task({'y': column, 'x': column}, 'y', categorical=['x'])
  assert task.num_classes == len(classes)
  assert task.output == ('sigmoid' if len(classes) == 2 else 'softmax')
  assert task.identity['label_space'] == examples.label_space(classes)
  ids = sorted(classes, key=tables.value_of_text)
  batch = batch_of(task)
  assert [classes[label] for label in batch['labels']] == [
      ids[number - 2] for number in batch['inputs']['categories'][:, 0]
  ]


@pytest.mark.parametrize('names', ['ab', 'abc', 'abcd'])
def test_the_click_model_takes_a_table_of_any_classes(names):
  rows = {'y': [names[i % len(names)] for i in range(200)], 'x': range(200)}
  task = cj.table_task(rows, 'y', numeric=['x'])
  model = dnn.click_model(task.num_classes, **task.model_arguments)
  shape = (64,) if len(names) == 2 else (64, len(names))
  batch = batch_of(task)
  logits = jax.eval_shape(
      lambda key: model.apply(model.init(key, batch), batch, (), None, False),
      jax.random.PRNGKey(0),
  )[0]
  assert (logits.shape, logits.dtype) == (shape, np.float32)


BAD = {
    'no such column': ({'label': 'y'}, "0 columns 'y', expected one; .*age"),
    'no feature': ({'categorical': [], 'numeric': []}, 'and other columns'),
    'twice': ({'numeric': ['late']}, 'each once'),
    'text': (
        {'categorical': [], 'numeric': ['job']},
        "'job' does not hold numbers",
    ),
    'no label': ({'label': 'job', 'categorical': ['zip']}, 'no label in'),
    'a number': ({'label': 'some', 'numeric': []}, '300 different values'),
    'one class': ({'label': 'one'}, '1 different values'),
    'rare': ({'label': 'rare'}, 'validation split have one label'),
    'infinite': ({'numeric': ['inf']}, "'inf' does not hold numbers"),
    'huge': ({'numeric': ['huge']}, "'huge' does not hold numbers"),
    'nothing': ({'numeric': ['nan']}, "'nan' does not hold numbers"),
    'time': ({'numeric': ['time']}, "'time' does not hold numbers: .* a time"),
    'lists': ({'categorical': ['other']}, "'other' does not hold cat"),
    'fractions': ({'validation_fraction': 0}, 'validation_fraction must'),
    'buckets': ({'categories': 'hash', 'buckets': [1]}, 'buckets must be 2'),
}


@pytest.mark.parametrize('changes, words', BAD.values(), ids=BAD)
def test_a_wrong_column_or_argument_is_one_line(frame, changes, words):
  frame = frame.assign(
      some=np.arange(ROWS) / 7,
      one=1,
      rare=np.arange(ROWS) < 2,
      inf=np.inf,
      huge=1e308,
      nan=np.nan,
      time=pd.Timestamp(0),
  )
  with pytest.raises(ValueError, match=words) as raised:
    cj.table_task(frame, **COLUMNS | changes)
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    'table, error',
    [
        (5, ValueError),
        (None, ValueError),
        ([1, 2], ValueError),
        ({'x': [1], 'y': [1, 2]}, ValueError),
        ({'x': [], 'y': []}, ValueError),
        (b'', ValueError),
        (b'x,y\n1,0\n2,1,3\n', ValueError),  # A field more, in a row, in all.
        (b'x,y\n' + b'1,0,3\n2,1,3\n' * 99, ValueError),
        (b'x,y\n\xff,0\n', ValueError),
        (b'PAR1 and nothing', ValueError),
        (b'\x1f\x8b damaged', (ValueError, OSError)),
        ('nowhere.csv', FileNotFoundError),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, table, error):
  if isinstance(table, bytes):
    (tmp_path / 'x.csv').write_bytes(table)
    table = tmp_path / 'x.csv'
  with pytest.raises(error) as raised:
    cj.table_task(table, 'y', numeric=['x'])
  assert '\n' not in str(raised.value)


# --- Columns ------------------------------------------------------------------


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(0, 2**32), st.integers(2, 40), st.floats(0, 0.9))
def test_numbers_are_standardised_and_gaps_marked(seed, size, share):
  rng = np.random.default_rng(seed)
  dense = rng.normal(rng.normal(size=3), 3, (size, 3))
  dense[rng.random(dense.shape) < share] = np.nan
  dense[:, 1] = 2.5  # It has no gaps, and does not vary.
  dense[0] = 2.5
  train = dense[: size // 2 + 1]
  found = tables.scaling_of(train).apply(dense)
  assert found.dtype == np.float32 and np.isfinite(found).all()
  gaps = np.flatnonzero(np.isnan(train).any(axis=0))
  np.testing.assert_array_equal(found[:, 3:], np.isnan(dense[:, gaps]))
  assert (found[:, :3][np.isnan(dense)] == 0).all()
  for i in range(3):
    column = found[: len(train), i][~np.isnan(train[:, i])]
    np.testing.assert_allclose(column.mean(), 0, atol=1e-4)
    if np.nanstd(train[:, i]) > 1e-3:
      np.testing.assert_allclose(column.std(), 1, rtol=1e-4)


def test_rare_values_share_an_id_and_unseen_ones_have_it_too():
  values = np.asarray([7, 7, 7, 9, 9, 5, 0, 0, 0, 0], np.uint32)
  counts = [np.unique(values, return_counts=True)]
  for min_count, kept in ((1, [5, 7, 9]), (2, [7, 9]), (3, [7]), (4, [])):
    encoder = tables.vocabulary(counts, min_count)
    assert encoder.table_sizes == (len(kept) + 2,)
    asked = np.asarray([[0], [5], [7], [9], [8], [2**32 - 1]], np.uint32)
    expected = [
        0 if v == 0 else kept.index(v) + 2 if v in kept else 1
        for v in asked[:, 0].tolist()
    ]
    assert encoder.encode(asked)[:, 0].tolist() == expected
    assert encoder.encode(asked).dtype == np.int32


@pytest.mark.parametrize('size', [0, 1, 2, 3, 300])
def test_each_frequent_value_is_found_in_its_own_column(size):
  rng = np.random.default_rng(0)
  kept = [
      np.unique(rng.integers(1, 2**32, size=size, dtype=np.uint32))
      for _ in range(3)
  ]
  encoder = tables.vocabulary([(v, np.full(len(v), 9)) for v in kept], 9)
  # Half of what is asked for is known in another column only.
  asked = np.concatenate([*kept, [0, 1, 2**32 - 1]]).astype(np.uint32)
  found = encoder.encode(np.stack([asked] * 3, axis=1))
  for k, values in enumerate(kept):
    ids = {int(v): i + 2 for i, v in enumerate(values)}
    expected = [ids.get(v, 1) if v else 0 for v in asked.tolist()]
    assert found[:, k].tolist() == expected


def test_hashed_ids_fill_their_tables_evenly_and_never_move():
  encoder = tables.hashed([100, 7], 2)
  assert encoder.table_sizes == (101, 8)
  values = np.random.default_rng(0).integers(1, 2**32, size=20_000)
  ids = encoder.encode(np.stack([values, values], 1).astype(np.uint32))
  assert ids.min() == 1 and ids.max(axis=0).tolist() == [100, 7]
  share = np.bincount(ids[:, 0])[1:] / len(ids)
  assert np.abs(share - 0.01).max() < 0.004
  # In the other column other values meet.
  same = ids[:, 0] == ids[0, 0]
  assert len(np.unique(ids[same, 1])) == 7
  assert encoder.encode(np.zeros((1, 2), np.uint32)).tolist() == [[0, 0]]
  fixed = encoder.encode(np.asarray([[1, 1], [2**32 - 1, 77]], np.uint32))
  assert fixed.tolist() == [[84, 2], [75, 2]]


def test_text_has_a_value_of_its_own_that_never_moves():
  assert tables.value_of_text('N14228') == 2521498091
  found = {tables.value_of_text(str(i)) for i in range(5000)}
  assert len(found) == 5000 and 0 not in found
