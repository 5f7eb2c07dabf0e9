"""Trained models outside of a run: exports of every form, and samples."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_run

import codistill_jax as cj
from codistill_jax import base, run_directory
from codistill_jax.data import prepare_text, shards
from codistill_jax.data.tokenizer import START_ID, Tokenizer
from codistill_jax.storage import files
from experiments import sample

CONFIG = """
from __gin__ import dynamic_registration
import optax
from codistill_jax import experiment
from codistill_jax.data import text
from codistill_jax.models import lstm
include 'gin_configs/base.gin'
experiment.Experiment.task = @text.language_model_task()
text.language_model_task.data_dir = '{data}'
text.language_model_task.unroll = 8
experiment.Experiment.model = @lstm.language_model
lstm.language_model.layers = 1
lstm.language_model.units = 8
lstm.language_model.embedding = 8
experiment.Experiment.optimizer = @optax.adam()
optax.adam.learning_rate = 1e-2
experiment.Experiment.num_steps = 3
experiment.Experiment.group_batch = 4
experiment.Experiment.eval_batch = 2
experiment.Experiment.log_every = 1
"""
# Of each form: the nats of all pieces of the documents, and how many there are.
READERS = {
    'arrays': (
        """
import jax, numpy as np, orbax.checkpoint as ocp
from safetensors.numpy import load_file
exported = jax.export.deserialize(
    bytearray(open(out + '/model.jaxexport', 'rb').read()))
def nested(flat):
  tree = {'params': {}, 'model_state': {}}
  for name, x in flat.items():
    *path, last = name.split('/')
    at = tree
    for part in path:
      at = at.setdefault(part, {})
    at[last] = x
  return tree
first = nested(load_file(out + '/model.safetensors'))
second = ocp.StandardCheckpointer().restore(out + '/orbax/3/arrays')
for arrays in (first, {'model_state': {}, **second}):
  nats = pieces = 0
  for document in documents:
    tokens = np.asarray([document], np.int32)
    logits = exported.call(
        arrays, {'inputs': tokens[:, :-1], 'resets': tokens[:, :-1] == 1})
    log_probs = np.asarray(jax.nn.log_softmax(logits))[0]
    nats -= log_probs[np.arange(len(document) - 1), document[1:]].sum()
    pieces += len(document) - 1
  print(json.dumps([float(nats), pieces]))
"""
    ),
    'text': (
        """
import tensorflow as tf, tensorflow_text
score = tf.saved_model.load(out + '/saved_model').signatures['serving_default']
found = score(text=tf.constant(texts))
assert found['next_log_probs'].shape == (len(texts), 300)
total = tf.reduce_sum(tf.exp(found['next_log_probs']), -1)
assert abs(total - 1).numpy().max() < 1e-4
print(json.dumps([float(sum(found['nats'])), int(sum(found['pieces']))]))
"""
    ),
}


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """What was written, the evaluation, and the documents it is over."""
  pytest.importorskip('tensorflow_text')
  directory = tmp_path_factory.mktemp('export')
  generator = np.random.default_rng(0)
  words = ['alpha', 'beta\u2581', ' gamma', '\ndelta', 'in', 'the', 'Tür \x1a']
  with (directory / 'text.jsonl').open('w') as f:
    for _ in range(60):
      text = ' '.join(generator.choice(words, size=12))
      f.write(json.dumps({'text': text}) + '\n')
  (directory / 'run.gin').write_text(CONFIG.format(data=directory / 'data'))
  prepare_text.prepare_text(
      directory / 'data',
      f'jsonl:{directory / "text.jsonl"}',
      vocab_size=300,
      validation_fraction=0.2,
      report=lambda line: None,
  )
  workdir = directory / 'run'
  with tiny_run.launcher(tmp_path_factory) as launch:
    launch(
        'train_lockstep',
        workdir=workdir,
        num_groups=1,
        gin_file=directory / 'run.gin',
    ).wait()
    forms = [f'--form={form}' for form in ('safetensors', 'orbax', 'stablehlo')]
    results = launch.cases(
        'export',
        {
            'all': [
                *(f'--workdir={workdir}', f'--output={directory / "out"}'),
                *(*forms, '--form=saved_model'),
            ],
            'no_group': [f'--workdir={workdir}', '--output=x', '--group=3'],
        },
    )
  metrics = run_directory.read_metrics(run_directory.metrics_path(workdir, 0))
  last = [r for r in metrics.records if 'eval/loss' in r][-1]
  return directory, results, last


def test_every_form_is_there_and_says_where(exported):
  directory, results, _ = exported
  status, output = results['all']
  assert status == 0, output
  about = files.read_json(directory / 'out' / 'model.json')
  assert about['step'] == 3 and about['classes'] == 300
  assert about['features']['inputs']['shape'] == [None, 8]


@pytest.mark.parametrize('reader', READERS)
def test_a_fresh_process_gets_the_numbers_of_the_evaluation(exported, reader):
  directory, _, expected = exported
  data = shards.open_tokens(directory / 'data', 'validation')
  tokenizer = Tokenizer((directory / 'data' / shards.TOKENIZER).read_bytes())
  documents = [
      data.gather(np.arange(start, start + length)).tolist()
      for start, length in zip(data.starts, data.lengths)
  ]
  given = f'import json\nout = {str(directory / "out")!r}\n'
  given += f'documents = {documents}\n'
  given += f'texts = {[tokenizer.decode(d) for d in documents]!r}\n'
  done = subprocess.run(
      [sys.executable, '-c', given + READERS[reader]],
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr
  for line in done.stdout.splitlines():
    nats, pieces = json.loads(line)
    assert pieces == expected['eval/examples']
    assert nats / pieces == pytest.approx(expected['eval/loss'], rel=1e-5)


def test_the_likeliest_continuation_is_that_of_the_whole_text(exported):
  """Piece by piece with a carry: what one pass over the text gives."""
  model = cj.load(exported[0] / 'run')
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
  model = cj.load(exported[0] / 'run')
  draw = lambda seed: sample.continue_text(model, 'in', pieces=20, seed=seed)
  assert draw(0) == draw(0) != draw(1)
  assert draw(0).startswith('in')


def test_a_group_that_is_not_there_is_one_line(exported):
  status, output = exported[1]['no_group']
  assert status == 1
  assert output.startswith('error: group 3 of') and 'Traceback' not in output
