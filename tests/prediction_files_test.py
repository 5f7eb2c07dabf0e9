"""Prediction files of anybody's models: .npy, .csv, parquet; errors."""

import json

import numpy as np
import pandas as pd
import pytest
from run_cases import run

from codistill_jax import statistics
from experiments import churn
from experiments.studies import prediction_files

SIZE = 40
BY_KEY = prediction_files.Columns(['prediction'], 'label', 'key')


@pytest.fixture
def models():
  rng = np.random.default_rng(0)
  return [rng.random(SIZE).astype(np.float32) for _ in range(3)]


@pytest.fixture
def labels():
  return np.random.default_rng(1).integers(2, size=SIZE)


def write(path, array, labels=None, ids=None, column='prediction'):
  """By the ending of its name."""
  if path.suffix == '.npy':
    np.save(path, array)
    return path
  columns = {column: array}
  columns |= {} if labels is None else {'label': labels}
  columns |= {} if ids is None else {'key': ids}
  table = pd.DataFrame(columns)
  if path.suffix == '.parquet':
    table.to_parquet(path)
  else:
    table.to_csv(path, index=False, sep='\t' if path.suffix == '.tsv' else ',')
  return path


def compare(*paths, flags=()):
  """Exit status and output of the binary."""
  return run(churn, [*(f'--predictions={p}' for p in paths), *flags])


def figures(tmp_path, *paths, flags=()):
  """The rows that it writes, by arm."""
  output = tmp_path / 'out'
  status, said = compare(*paths, flags=[*flags, f'--output={output}'])
  assert status == 0, said
  rows = json.loads((output / 'churn.json').read_text())['rows']
  return {row['arm']: row for row in rows}


@pytest.mark.parametrize('ending', ['.npy', '.csv', '.tsv', '.parquet'])
def test_files_of_all_kinds_give_the_same_figures(
    tmp_path, models, labels, ending
):
  paths = [
      write(tmp_path / f'm{i}{ending}', p, labels) for i, p in enumerate(models)
  ]
  np.save(tmp_path / 'labels.npy', labels)
  flags = [f'--labels={tmp_path / "labels.npy"}'] if ending == '.npy' else []
  found = figures(tmp_path, *paths, flags=flags)['predictions']['figures']
  expected = statistics.measure(models, labels)
  for key in ('churn', 'relative', 'disagreement'):
    matrix = getattr(expected, f'{key}_KK')
    pairs = matrix[np.triu_indices(3, 1)]
    np.testing.assert_allclose(found[key]['values'], pairs, rtol=1e-5)
  np.testing.assert_allclose(
      found['log_loss']['values'], expected.log_loss_K, rtol=1e-5
  )


def test_kinds_can_be_mixed_and_every_pair_is_printed(tmp_path, models):
  paths = [
      write(tmp_path / 'a.npy', models[0]),
      write(tmp_path / 'b.csv', models[1]),
      write(tmp_path / 'c.parquet', models[2]),
  ]
  status, output = compare(*paths)
  assert status == 0 and 'log loss' not in output
  for a, b, pair in (
      ('a.npy', 'b.csv', models[:2]),
      ('b.csv', 'c.parquet', models[1:]),
  ):
    line = next(x for x in output.splitlines() if a in x and b in x)
    assert f'{statistics.churn(*pair):.4f}' in line
  assert list(tmp_path.glob('*.json')) == []  # Nothing is written unasked.


def test_files_of_one_name_are_told_apart(tmp_path, models, labels):
  paths = []
  for i, probs in enumerate(models[:2]):
    (tmp_path / f'run{i}').mkdir()
    paths.append(write(tmp_path / f'run{i}' / 'p.csv', probs, labels))
  table = write(tmp_path / 'p.csv', models[2], labels)
  status, output = compare(*paths, table)
  assert status == 0, output
  assert 'run0/p.csv  run1/p.csv' in output
  write(paths[1], models[1], 1 - labels)
  status, output = compare(*paths)
  assert status == 1 and 'have other labels for 40 of 40' in output


def test_arms_are_compared_with_the_first(tmp_path, models):
  first = [write(tmp_path / f'a{i}.npy', p) for i, p in enumerate(models)]
  calm = [0.5 + 0.25 * (p - 0.5) for p in models]
  other = [write(tmp_path / f'b{i}.npy', p) for i, p in enumerate(calm)]
  named = [f'old={p}' for p in first] + [f'new={p}' for p in other]
  again = [write(tmp_path / f'c{i}.npy', p) for i, p in enumerate(models)]
  named += [f'third={p}' for p in again]
  rows = figures(tmp_path, *named)
  assert rows['old']['change_of_churn'] is None
  change = rows['new']['change_of_churn']
  assert change['mean'] == pytest.approx(-0.75, abs=1e-6)
  assert rows['third']['change_of_churn']['mean'] == 0
  page = (tmp_path / 'out' / 'churn.md').read_text()
  assert '-75 % ' in page and 'a0.npy' in page
  assert '40 examples, row by row' in page


def test_ids_join_rows_in_any_order(tmp_path, models, labels):
  ids = np.array([f'e{i}' for i in range(SIZE)])
  order = np.random.default_rng(2).permutation(SIZE)
  paths = [
      write(tmp_path / 'a.csv', models[0], ids=ids),
      write(tmp_path / 'b.parquet', models[1][order], ids=ids[order]),
  ]
  table = pd.DataFrame({'label': labels[::-1], 'key': ids[::-1]})
  table.to_csv(tmp_path / 'labels.csv')
  found = figures(
      tmp_path,
      *paths,
      flags=['--id_column=key', f'--labels={tmp_path / "labels.csv"}'],
  )['predictions']['figures']
  assert found['churn']['mean'] == pytest.approx(statistics.churn(*models[:2]))
  np.testing.assert_allclose(
      found['log_loss']['values'],
      [statistics.log_loss(p, labels) for p in models[:2]],
  )


NAMES = {
    'leading zeros': [*(f'{i:02d}' for i in range(39)), '7'],
    'what stands for nothing': (
        ['NA', 'null', 'nan', 'None', 'N/A', '-', 'inf']
        + [f'u{i}' for i in range(33)]
    ),
    'one without': ['', *(str(2**60 + i) for i in range(39))],
    '64 bits': [str(2**64 - 1 - i) for i in range(40)],
    'floats': [f'{i}.0' for i in range(39)] + ['1e3'],
    'words': [*(f' {i}' for i in range(20)), *(f'{i}"é,\n' for i in range(20))],
    'booleans': ['True', 'true', *map(str, range(38))],
}
STORED = {
    'text': list,
    'integers': lambda ids: pd.array(
        [int(x) if x else None for x in ids],
        'UInt64' if int(max(ids, key=len)) > 2**63 else 'Int64',
    ),
    'categories': pd.Categorical,
    'bytes': lambda ids: [x.encode() for x in ids],
}


@pytest.mark.parametrize('endings', ['.csv .csv', '.csv .parquet', '.tsv .tsv'])
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('stored', STORED)
def test_ids_are_names_and_compared_as_text(
    tmp_path, models, endings, name, stored
):
  if stored != 'text' and endings != '.csv .parquet':
    return  # A .csv is all text.
  if stored == 'integers' and name not in ('one without', '64 bits'):
    return
  order = np.random.default_rng(3).permutation(SIZE)
  ids = np.array(NAMES[name], object)
  first, second = endings.split()
  a, b = tmp_path / f'a{first}', tmp_path / f'b{second}'
  write(a, models[0], ids=ids)
  write(b, models[1][order], ids=STORED[stored](ids[order]))
  named = [('x', str(a)), ('x', str(b))]
  (row,), _, count = prediction_files.compare(named, BY_KEY, None)
  assert count == SIZE
  found = row.figures['churn'].mean
  assert found == pytest.approx(statistics.churn(*models[:2]), rel=1e-5)


def test_what_pandas_kept_as_its_index_is_a_column(tmp_path, models):
  paths = []
  for i, probs in enumerate(models[:2]):
    table = pd.DataFrame({'prediction': probs, 'key': np.arange(SIZE) + 5})
    paths.append(('x', str(tmp_path / f'{i}.parquet')))
    table.set_index('key').to_parquet(paths[-1][1])
  assert prediction_files.compare(paths, BY_KEY, None)[2] == SIZE


@pytest.mark.parametrize(
    'off', [np.float32(1) + np.finfo(np.float32).eps, 1.0009, -1e-7, -9e-4]
)
@pytest.mark.parametrize('classes', [1, 2, 5])
def test_rounding_is_no_mistake(tmp_path, off, classes):
  """Of sums and of single probabilities alike."""
  probs = np.full((SIZE, classes), 1 / classes, np.float32)
  other = probs.copy()
  other[0] = 0
  other[0, 0] = off
  other[0, -1] += round(1 - off) if classes > 1 else 0
  paths = [
      write(tmp_path / f'{i}.npy', p) for i, p in enumerate((probs, other))
  ]
  found = figures(tmp_path, *paths)['predictions']['figures']['churn']['mean']
  kept = statistics.check_probabilities(other)
  assert kept.min() >= 0 and kept.max() <= 1
  expected = abs(kept - statistics.check_probabilities(probs)).mean()
  assert found == pytest.approx(expected * max(classes / 2, 1), rel=1e-5)
  write(paths[1], other + np.float32(0.002 * np.sign(off)))
  assert 'not probabilities' in compare(*paths)[1]


def lies(rng):
  """Headers of .npy that say what is not so; and bytes."""
  for shape in ((10**12,), (10**12, 10**9), (10**40,), (3,), (41,), (-7,), 'x'):
    for kind in ('<f4', '|b1', '|O', '<U9', '[("a", "<f4")]', '<f99', 3):
      text = {'descr': kind, 'fortran_order': False, 'shape': shape}
      yield np.lib.format.magic(1, 0), repr(text).replace("'[", '[')
  for version in ((2, 0), (3, 0), (9, 9)):
    yield np.lib.format.magic(*version) + b'\x00\x00', repr({})
  for _ in range(40):
    yield rng.bytes(rng.integers(20)), ''


def test_files_that_lie_of_their_size_are_a_line(tmp_path, models):
  good = write(tmp_path / 'good.npy', models[0])
  bad = tmp_path / 'bad.npy'
  for magic, header in lies(np.random.default_rng(0)):
    text = header.replace(']"', ']').encode() + b'\n'
    bad.write_bytes(
        magic + len(text).to_bytes(2, 'little') + text + b'\0' * 160
    )
    status, output = compare(good, bad)
    assert status == 1 and len(output.splitlines()) == 1, (header, output)
    assert str(bad) in output


@pytest.mark.parametrize('ending', ['.csv', '.parquet', '.npy'])
def test_damaged_files_are_a_line_or_are_read(tmp_path, models, labels, ending):
  good = write(tmp_path / f'good{ending}', models[0], labels)
  bad, rng = tmp_path / f'bad{ending}', np.random.default_rng(0)
  for _ in range(60):
    data = bytearray(write(bad, models[1], labels).read_bytes())
    if rng.random() < 0.3:
      data = data[: rng.integers(len(data))]
    for at in rng.integers(len(data) + 1, size=4):
      data[at : at + 1] = rng.bytes(rng.integers(3))
    bad.write_bytes(data)
    status, output = compare(good, bad)
    assert 'Traceback' not in output
    assert status == 0 or len(output.splitlines()) == 1, output


def test_classes_come_as_columns_or_as_an_array(tmp_path):
  rng = np.random.default_rng(0)
  models = [rng.dirichlet(np.ones(3), size=SIZE) for _ in range(2)]
  columns = ['low', 'middle', 'high']
  table = pd.DataFrame(models[0], columns=columns)
  table.to_csv(tmp_path / 'a.csv', index=False)
  np.save(tmp_path / 'b.npy', models[1])
  found = figures(
      tmp_path,
      tmp_path / 'a.csv',
      tmp_path / 'b.npy',
      flags=[f'--prediction_column={c}' for c in columns],
  )['predictions']['figures']
  assert found['churn']['mean'] == pytest.approx(statistics.churn(*models))


def test_labels_that_nobody_asked_for_do_no_harm(tmp_path, models, labels):
  words = np.where(labels, 'yes', 'no')
  paths = [
      write(tmp_path / f'{i}.csv', p, words) for i, p in enumerate(models[:2])
  ]
  status, output = compare(*paths)
  assert status == 1 and 'give --label_column=' in output
  found = figures(tmp_path, *paths, flags=['--label_column='])
  assert 'log_loss' not in found['predictions']['figures']
  np.save(tmp_path / 'labels.npy', labels)
  found = figures(
      tmp_path, *paths, flags=[f'--labels={tmp_path / "labels.npy"}']
  )
  assert 'log_loss' in found['predictions']['figures']


def test_mistakes_are_one_line(tmp_path, models, labels):
  save = lambda name, array, **kwargs: write(tmp_path / name, array, **kwargs)
  good = save('good.npy', models[0])
  table = save('good.csv', models[0], labels=labels, ids=np.arange(SIZE))
  nan = models[0].copy()
  nan[3] = np.nan
  (tmp_path / 'text.csv').write_text('prediction\n0.5\nhigh\n')
  (tmp_path / 'torn.npy').write_bytes(b'\x93NUMPY')
  (tmp_path / 'torn.parquet').write_bytes(b'PAR1')
  (tmp_path / 'empty.csv').write_text('')
  (tmp_path / 'wide.csv').write_text('prediction,label\n0.5,1,0\n0.25,0,0\n')
  (tmp_path / 'double.csv').write_text('prediction,prediction\n0.5,0.6\n')
  again = save('again.npy', models[0])
  shuffled = save('shuffled.csv', models[0], ids=np.arange(SIZE)[::-1])
  text = save('text_label.csv', models[0], labels=np.full(SIZE, 'yes'))
  gap = save('gap.csv', models[0], labels=np.where(labels, 1.0, np.nan))
  others = save('others.csv', models[0], labels=labels, ids=np.arange(1, 41))
  ids = ['--id_column=key']
  for paths, flags, words in [
      ([good], [], 'give --predictions twice'),
      ([good, save('short.npy', models[0][1:])], [], 'short.npy has 39'),
      ([good, save('logits.npy', 9 * models[0])], [], 'not probabilities'),
      ([good, save('nan.npy', nan)], [], '1 of 40 predictions are NaN'),
      ([good, save('c.npy', np.eye(SIZE))], [], 'predict the same classes'),
      ([table, save('x.csv', models[0], column='p')], [], 'it has p'),
      ([good, tmp_path / 'text.csv'], [], 'expected numbers'),
      ([good, tmp_path / 'double.csv'], [], "two columns 'prediction'"),
      ([good, tmp_path / 'torn.npy'], [], 'torn.npy'),
      ([good, tmp_path / 'torn.parquet'], [], 'torn.parquet'),
      ([good, tmp_path / 'empty.csv'], [], 'empty.csv'),
      ([good, tmp_path / 'none.npy'], [], 'none.npy'),
      ([good, tmp_path / 'x.pkl'], [], 'unknown kind of file'),
      ([good, tmp_path / 'gone.npy'], [], 'there is no file'),
      ([good, tmp_path / 'gone.csv'], [], 'there is no file'),
      ([good, tmp_path / 'wide.csv'], [], 'wide.csv cannot be read as csv'),
      ([good, table], ids, 'good.npy has no ids'),
      ([table, others], [*ids, f'--labels={good}'], 'good.npy has no ids'),
      ([good, again], ['--note=mine'], '--note belongs to a study'),
      ([table, others], ids, "others.csv lacks 1 of 40 ids, such as '0'"),
      ([table, others], ['--id_column=no'], "no column 'no'"),
      (
          [table, save('two.csv', models[0], ids=np.arange(SIZE) // 2)],
          ids,
          "20 duplicate ids, such as '0'",
      ),
      (
          [table, save('l.csv', models[0], labels=1 - labels)],
          [],
          'l.csv have other labels for 40 of 40 examples, the first row 0',
      ),
      ([table, text], [], 'text_label.csv, label: expected numbers, got'),
      ([table, gap], [], 'gap.csv, label: label nan in row'),
      ([table, shuffled], [], 'another order; give --id_column=key'),
      ([good, good], [], 'is given twice'),
      ([good, again], [f'--labels={good}'], 'is not a class'),
      ([good, again], [f'--labels={tmp_path / "short.npy"}'], '39 labels'),
  ]:
    status, output = compare(*paths, flags=flags)
    assert status == 1 and len(output.splitlines()) == 1, (words, output)
    assert words in output, (words, output)


def test_files_are_compared_without_jax(python, tmp_path, models):
  """As a person with two files would: at once."""
  import subprocess

  paths = [write(tmp_path / f'{i}.npy', p) for i, p in enumerate(models)]
  code = (
      'import sys; sys.modules["jax"] = None\n'
      'from absl import flags\n'
      'from experiments import churn, cli\n'
      'churn.define_flags()\n'
      'sys.exit(cli.status_of(churn.main, flags.FLAGS(sys.argv)))'
  )
  done = subprocess.run(
      [python, '-c', code, *(f'--predictions={p}' for p in paths)],
      capture_output=True,
      text=True,
  )
  assert done.returncode == 0, done.stderr
  assert 'relative' in done.stdout
