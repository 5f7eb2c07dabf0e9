"""Trained models outside of a run: exports of every form, and samples."""

import csv
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import run_cases
import tiny_run
from made_images import encode

import codistill_jax as cj
from codistill_jax import base, run_directory
from codistill_jax.data import prepare_text, shards
from codistill_jax.data.tokenizer import START_ID, Tokenizer
from codistill_jax.storage import files
from experiments import sample

HEAD = """
from __gin__ import dynamic_registration
import configurables
import optax
from codistill_jax import experiment
from codistill_jax.data import images
from codistill_jax.data import tables
from codistill_jax.data import text
from codistill_jax.models import dnn
from codistill_jax.models import lstm
include 'gin_configs/base.gin'
experiment.Experiment.optimizer = @optax.adam()
optax.adam.learning_rate = 1e-2
experiment.Experiment.num_steps = 3
experiment.Experiment.group_batch = 4
experiment.Experiment.eval_batch = 2
experiment.Experiment.log_every = 1
"""
RUNS = {
    'text': (
        """
experiment.Experiment.task = @text.language_model_task()
text.language_model_task.data_dir = '{data}/text'
text.language_model_task.unroll = 8
experiment.Experiment.model = @lstm.language_model
lstm.language_model.layers = 1
lstm.language_model.units = 8
lstm.language_model.embedding = 8
"""
    ),
    'table': (
        """
experiment.Experiment.task = @tables.table_task()
tables.table_task.table = '{data}/train.csv'
tables.table_task.label = 'late'
tables.table_task.categorical = ['a job', 'zip']
tables.table_task.numeric = ['age', '24h']
experiment.Experiment.model = @dnn.click_model
dnn.click_model.hidden = (8,)
dnn.click_model.embedding = 4
"""
    ),
    'images': (
        """
experiment.Experiment.task = @images.image_folder_task()
images.image_folder_task.directory = '{data}/images'
images.image_folder_task.size = 6
images.image_folder_task.resize = 7
experiment.Experiment.model = @configurables.flat_model
"""
    ),
}
# Of each form: the nats of all examples, and how many there are.
READER = """
import glob, json, os
import jax, numpy as np, orbax.checkpoint as ocp
import tensorflow as tf, tensorflow_text
from safetensors.numpy import load_file
out, documents, texts, rows = json.load(open('{given}'))
found = {{}}
exported = jax.export.deserialize(
    bytearray(open(out + '/text/model.jaxexport', 'rb').read()))
def nested(flat):
  tree = {{'params': {{}}, 'model_state': {{}}}}
  for name, x in flat.items():
    *path, last = name.split('/')
    at = tree
    for part in path:
      at = at.setdefault(part, {{}})
    at[last] = x
  return tree
first = nested(load_file(out + '/text/model.safetensors'))
second = ocp.StandardCheckpointer().restore(out + '/text/orbax/3/arrays')
for form, arrays in (
    ('safetensors', first), ('orbax', {{'model_state': {{}}, **second}})):
  nats = pieces = 0
  for document in documents:
    tokens = np.asarray([document], np.int32)
    logits = exported.call(
        arrays, {{'inputs': tokens[:, :-1], 'resets': tokens[:, :-1] == 1}})
    log_probs = np.asarray(jax.nn.log_softmax(logits))[0]
    nats -= log_probs[np.arange(len(document) - 1), document[1:]].sum()
    pieces += len(document) - 1
  found[form] = [float(nats), pieces]
def served(name):
  return tf.saved_model.load(f'{{out}}/{{name}}/saved_model').signatures[
      'serving_default']
said = served('text')(text=tf.constant(texts))
assert said['next_log_probs'].shape == (len(texts), 300)
total = tf.reduce_sum(tf.exp(said['next_log_probs']), -1)
assert abs(total - 1).numpy().max() < 1e-4
found['text'] = [float(sum(said['nats'])), int(sum(said['pieces']))]
number = lambda texts: tf.constant(
    [float(x or 'nan') for x in texts], tf.float64)
logits = served('table')(
    a_job=tf.constant(rows['a job']), zip=tf.constant(rows['zip']),
    age=number(rows['age']), column_24h=number(rows['24h']))['logits']
labels = tf.constant([float(x == 'yes') for x in rows['late']])
nats = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
found['table'] = [float(sum(nats)), len(nats)]
paths = sorted(glob.glob('{images}/*/*.png'))
logits = served('images')(
    images=tf.constant([open(path, 'rb').read() for path in paths]))['logits']
labels = [int(path.split(os.sep)[-2] == 'dark') for path in paths]
nats = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
found['images'] = [float(sum(nats)), len(paths)]
json.dump(found, open('{answers}', 'w'))
"""
FORMS = ('safetensors', 'orbax', 'text', 'table', 'images')
# In a process that has TensorFlow: its graphs against what training does.
GRAPHS = """
import io, numpy as np, tensorflow as tf
from PIL import Image
from codistill_jax.data import augment, clicks, criteo, image_decode, images
from codistill_jax.data import tables
from experiments import saved_model
rng = np.random.default_rng(0)
texts = ['', '\u00e9t\u00e9', *('x' * n + 'y' for n in range(0, 400, 7))]
texts += ['z' * n for n in (127, 128, 129, 255, 256, 257)]
raw = [tables.value_of_text(text) if text else 0 for text in texts]
np.testing.assert_array_equal(saved_model.raw_of_text(tf.constant(texts)), raw)
codes = rng.integers(0, 2**32, (30, 2)).astype(np.uint32)
codes[0], codes[1] = 0, 1
for encoder in (
    tables.hashed([7, 10**6], 2),
    tables.vocabulary(
        [np.unique(x[:9], return_counts=True) for x in codes.T], 1)):
  columns = tables.Columns(('a', 'b'), ('i',), encoder, hexadecimal=True)
  words = [['' if x == 0 else f'{x:08x}' for x in column] for column in codes.T]
  numbers = rng.normal(size=30).round(1) * 100
  numbers[3] = np.nan
  found = saved_model.inputs_of_columns(
      columns, saved_model.encoder_of(columns),
      [tf.constant(words[0]), tf.constant(words[1]), tf.constant(numbers)])
  np.testing.assert_array_equal(found['categories'], encoder.encode(codes))
  integers = np.where(
      np.isnan(numbers), criteo.MISSING_INTEGER, numbers).astype(np.int32)
  np.testing.assert_allclose(
      found['integers'], clicks.log_integers(integers[:, None]), rtol=1e-6)
pixels = images.Pixels((9, 9, 3), (0.5, 0.4, 0.3), (0.2, 0.3, 0.2), 11)
for width, height in ((11, 11), (40, 20), (12, 14), (9, 5), (90, 83), (1, 1)):
  image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG')
  part = image_decode.decode_part(
      file.getvalue(), lambda w, h: augment.centre_box(w, h, 9, 11), 9)
  np.testing.assert_allclose(
      saved_model.decoded(pixels, tf.constant([file.getvalue()]))[0],
      augment.normalise(part, pixels.mean, pixels.std), atol=1e-6)
"""


def write_text(directory):
  generator = np.random.default_rng(0)
  words = ['alpha', 'beta\u2581', ' gamma', '\ndelta', 'in', 'the', 'Tür \x1a']
  with (directory / 'text.jsonl').open('w') as f:
    for _ in range(60):
      text = ' '.join(generator.choice(words, size=12))
      f.write(json.dumps({'text': text}) + '\n')
  prepare_text.prepare_text(
      directory / 'text',
      f'jsonl:{directory / "text.jsonl"}',
      vocab_size=300,
      validation_fraction=0.2,
      report=lambda line: None,
  )


def write_rows(path, seed, size=60):
  """Columns as text; gives them by name."""
  rng = np.random.default_rng(seed)
  columns = {
      'a job': rng.choice(['', 'cook, chef', 'été', f'rare {seed}'], size),
      'zip': rng.choice(['07', '7'], size),
      'age': [f'{x:.1f}' if x > 30 else '' for x in rng.normal(40, 9, size)],
      '24h': [f'{x:.0f}' for x in rng.normal(1e5, 10, size)],
      'late': rng.choice(['no', 'yes'], size),
  }
  with path.open('w', newline='') as f:
    csv.writer(f).writerows([columns, *zip(*columns.values())])
  return {name: list(map(str, values)) for name, values in columns.items()}


def write_images(directory):
  rng = np.random.default_rng(0)
  for split, count in (('train', 6), ('validation', 3)):
    for high, name in ((255, 'bright'), (90, 'dark')):
      (directory / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, high, (9 + i, 14 - i, 3)).astype(np.uint8)
        path = directory / split / name / f'{i}.png'
        path.write_bytes(encode(pixels))


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """What was written, the evaluations, and the rows that one is over."""
  if not importlib.util.find_spec('tensorflow_text'):
    pytest.skip('tensorflow-text is missing')
  directory = tmp_path_factory.mktemp('export')
  write_text(directory)
  write_rows(directory / 'train.csv', 0)
  rows = write_rows(directory / 'other.csv', 1)
  write_images(directory / 'images')
  training, exports = {}, {}
  for name, config in RUNS.items():
    gin_file = directory / f'{name}.gin'
    gin_file.write_text(HEAD + config.format(data=directory))
    run = f'--workdir={directory / name}_run'
    training[name] = [run, '--num_groups=1', f'--gin_file={gin_file}']
    exports[name] = [
        *(run, f'--output={directory / "out" / name}'),
        *('--form=saved_model', '--trust=configurables'),
    ]
  exports['text'] += [
      f'--form={form}' for form in ('safetensors', 'orbax', 'stablehlo')
  ]
  run = f'--workdir={directory}/text_run'
  exports['no_group'] = [run, '--output=x', '--group=3', exports['text'][3]]
  with tiny_run.launcher(tmp_path_factory) as launch:
    trained = launch.cases('train_lockstep', training)
    assert not any(status for status, _ in trained.values()), trained
    results = launch.cases('export', exports)
    data = f'--data={directory}/other.csv'
    run = exports['table'][0]
    on_rows = [run, exports['text'][3], data]
    results |= launch.cases('evaluate', {'on_rows': on_rows})
  last = {}
  for name in ('text', 'images'):
    records = tiny_run.records(directory / f'{name}_run')
    last[name] = [r for r in records if 'eval/loss' in r][-1]
  assert results['on_rows'][0] == 0, results['on_rows']
  (found,) = (directory / 'table_run' / 'report').glob('comparison_on_*.json')
  (last['table'],) = files.read_json(found)['models'].values()
  return directory, results, last, rows


@pytest.mark.parametrize('name', RUNS)
def test_every_form_is_there_and_says_where(exported, name):
  directory, results, *_ = exported
  status, output = results[name]
  assert status == 0, output
  about = files.read_json(directory / 'out' / name / 'model.json')
  assert about['step'] == 3
  features = {
      'text': ('inputs', [None, 8]),
      'table': ('inputs/categories', [None, 2]),
      'images': ('inputs', [None, 6, 6, 3]),
  }
  feature, shape = features[name]
  assert about['features'][feature]['shape'] == shape
  if name == 'table':
    assert about['arguments'] == {
        **{'a_job': 'a job', 'zip': 'zip', 'age': 'age'},
        'column_24h': '24h',
    }


@pytest.fixture(scope='module')
def answers(exported):
  """What a process that has nothing but the files finds."""
  directory, *_, rows = exported
  data = shards.open_tokens(directory / 'text', 'validation')
  tokenizer = Tokenizer((directory / 'text' / shards.TOKENIZER).read_bytes())
  documents = [
      data.gather(np.arange(start, start + length)).tolist()
      for start, length in zip(data.starts, data.lengths)
  ]
  texts = [tokenizer.decode(d) for d in documents]
  given = [str(directory / 'out'), documents, texts, rows]
  (directory / 'given.json').write_text(json.dumps(given))
  script = READER.format(
      given=directory / 'given.json',
      images=directory / 'images' / 'validation',
      answers=directory / 'answers.json',
  )
  done = subprocess.run(
      [sys.executable, '-c', script + GRAPHS],
      capture_output=True,
      text=True,
      check=False,
      cwd=tiny_run.ROOT,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return files.read_json(directory / 'answers.json')


@pytest.mark.parametrize('form', FORMS)
def test_a_fresh_process_gets_the_numbers_of_the_evaluation(
    exported, answers, form
):
  """Of text, of rows of another table and of images, all of them raw."""
  expected = exported[2]['text' if form in FORMS[:2] else form]
  nats, examples = answers[form]
  assert examples == expected['eval/examples']
  assert nats / examples == pytest.approx(expected['eval/loss'], rel=1e-5)


def test_text_itself_is_evaluated_as_what_was_prepared_of_it(exported):
  task = cj.load(exported[0] / 'text_run', trusted=['configurables']).task
  data = shards.open_tokens(exported[0] / 'text', 'validation')
  tokenizer, path = task.tokenizer(), exported[0] / 'validation.jsonl'
  with path.open('w') as f:
    for start, length in zip(data.starts, data.lengths):
      pieces = data.gather(np.arange(start, start + length))
      f.write(json.dumps({'text': tokenizer.decode(pieces)}) + '\n')
  found = task.other_data(f'jsonl:{path}', 'validation')(2)
  expected = task.eval_batches(2)
  assert found.bytes_per_example == expected.bytes_per_example
  for a, b in zip(found, expected, strict=True):
    assert all(np.array_equal(a[k], b[k]) for k in b)
  with path.open('a') as f:
    f.write('{}\n' * 9)
  with pytest.raises(ValueError, match="'no_text': 9"):
    task.other_data(f'jsonl:{path}', 'validation')
  with pytest.raises(ValueError, match='not divided into splits'):
    task.other_data(f'jsonl:{path}', 'test')


def test_the_likeliest_continuation_is_that_of_the_whole_text(exported):
  """Piece by piece with a carry: what one pass over the text gives."""
  model = cj.load(exported[0] / 'text_run', trusted=['configurables'])
  first = model.tokenizer.encode('alpha in')
  text = sample.continue_text(model, 'alpha in', pieces=6, temperature=0)
  assert text == sample.continue_text(model, 'alpha in', pieces=6, top_k=1)
  tokens = [START_ID, *first]
  for _ in range(6):
    batch = {
        'inputs': np.asarray([tokens]),
        'resets': np.eye(1, len(tokens)) > 0,
    }
    carry = model.model.init_carry(1)
    outputs, _ = model.model.apply(model.variables, batch, carry, None, False)
    logits = np.array(base.logits_of(outputs)[0, -1])
    logits[[0, START_ID]] = -np.inf
    tokens.append(int(logits.argmax()))
  assert text == model.tokenizer.decode(tokens)


def test_draws_are_those_of_their_seed(exported):
  model = cj.load(exported[0] / 'text_run', trusted=['configurables'])
  draw = lambda seed: sample.continue_text(model, 'in', pieces=20, seed=seed)
  assert draw(0) == draw(0) != draw(1)
  assert draw(0).startswith('in')


def test_what_was_drawn_is_kept_for_a_report(exported):
  run = exported[0] / 'text_run'
  prompts = ['in', 'the']
  status, output = run_cases.run(
      sample,
      [
          *(f'--workdir={run}', '--trust=configurables', '--pieces=9'),
          *(f'--prompt={prompt}' for prompt in prompts),
      ],
  )
  assert status == 0, output
  kept = run_directory.read_samples(run)
  assert [one['prompt'] for one in kept] == prompts
  for one in kept:
    assert (one['group'], one['step'], one['seed']) == (0, 3, 0)
    assert one['text'].startswith(one['prompt'])
    assert all(line in output for line in one['text'].splitlines())


def test_a_group_that_is_not_there_is_one_line(exported):
  status, output = exported[1]['no_group']
  assert status == 1
  assert output.startswith('error: group 3 of') and 'Traceback' not in output
