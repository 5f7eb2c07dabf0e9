"""Exports a trained group: its parameters, its forward pass, a servable model.

    python -m experiments.export --workdir=runs/two --output=served

Writes into --output, each by a --form (repeatable; default: the first three):

  safetensors  model.safetensors: arrays by name, params/..., model_state/...
  orbax        orbax/<step>/arrays: StandardCheckpointer().restore(it)
  stablehlo    model.jaxexport: jax.export.deserialize(its bytes) has
               call(arrays, features), which gives logits, for any number of
               rows (and tokens)
  saved_model  saved_model/: a TensorFlow SavedModel. Of a language model its
               signature takes text, and the tokenizer is in the graph: out come
               the nats and the number of pieces (the end of the document is
               one), and the next piece's log probabilities. Of others it takes
               the features of a prepared batch and gives logits.

`arrays` are those of safetensors, nested; `features` is a batch without labels
and weights. model.json says what is what. Each form is read again, and must
give the logits of the model, before the command says that it is there.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from codistill_jax import base, trained
from codistill_jax.data import tokenizer as tokenizer_lib
from codistill_jax.storage import checkpoints, files

from . import cli

_FLAGS = flags.FLAGS
_FORMS = ('safetensors', 'orbax', 'stablehlo', 'saved_model')
_RELATIVE, _ABSOLUTE = 1e-5, 1e-5  # Of logits, in float32.

Features = Mapping[str, Any]
Forward = Callable[[base.PyTree, Features], jax.Array]


def define_flags() -> None:
  """Defines the flags of this binary."""
  cli.define_path('workdir', None, 'Run directory.', required=True)
  cli.define_path('output', None, 'Directory to write to.', required=True)
  flags.DEFINE_integer('group', 0, 'Which group.', lower_bound=0)
  cli.define_step_flags()
  flags.DEFINE_multi_enum(
      'form', list(_FORMS[:3]), _FORMS, 'What to write; repeatable.'
  )


def main(argv: Sequence[str]) -> None:
  """Writes every form that is asked for, and checks it."""
  del argv
  model = trained.load(
      _FLAGS.workdir, _FLAGS.group, _FLAGS.step, trusted=_FLAGS.trust
  )
  output = epath.Path(_FLAGS.output)
  files.check_writable(output)
  arrays = {
      'params': model.variables.params,
      'model_state': model.variables.model_state,
  }
  example = features_of(next(iter(model.task.eval_batches(3))))
  forward = forward_of(model)
  logits = np.asarray(jax.jit(forward)(arrays, example))
  writers = {
      'safetensors': write_safetensors,
      'orbax': write_orbax,
      'stablehlo': write_stablehlo,
      'saved_model': write_saved_model,
  }
  for form in dict.fromkeys(_FLAGS.form):
    path, again = writers[form](output, model, arrays, forward, example)
    # Of a servable text model the pieces are made in the graph.
    expected = logits if np.shape(again) == logits.shape else None
    if expected is None or not np.allclose(
        again, expected, rtol=_RELATIVE, atol=_ABSOLUTE
    ):
      raise ValueError(
          f'{path} gives other logits than the model that it is of'
      )
    print(f'{form}: {path}')
  about = {
      'workdir': os.fspath(_FLAGS.workdir),
      'group': _FLAGS.group,
      'step': model.step,
      'identity': dict(model.task.identity),
      'output': model.task.output,
      'classes': model.task.num_classes,
      'features': {
          name: {'dtype': str(x.dtype), 'shape': [None, *x.shape[1:]]}
          for name, x in checkpoints.flatten(example)
      },
  }
  files.write_json(output / 'model.json', about)


def features_of(batch: base.Batch) -> Features:
  """Returns what of a batch a model sees."""
  seen = {k: x for k, x in batch.items() if k not in ('labels', 'weights')}
  return jax.tree.map(np.asarray, seen)


def forward_of(model: trained.Trained) -> Forward:
  """Returns the forward pass in evaluation, from the start of a document."""

  def forward(arrays, features):
    rows = jax.tree.leaves(features)[0].shape[0]
    carry = model.model.init_carry(rows)
    variables = base.Variables(arrays['params'], arrays['model_state'])
    outputs, _ = model.model.apply(variables, features, carry, None, False)
    return base.logits_of(outputs)

  return forward


def write_safetensors(output, model, arrays, forward, example):
  """Writes and reads arrays by name; returns the path and their logits."""
  from safetensors import numpy as safetensors

  path = output / 'model.safetensors'
  named = dict(checkpoints.flatten(arrays))
  contiguous = {k: np.ascontiguousarray(x) for k, x in named.items()}
  about = {'step': str(model.step), **model.task.identity}
  files.write_bytes(path, safetensors.save(contiguous, metadata=about))
  read = safetensors.load(files.content(path))
  leaves = [read[name] for name in named]
  again = jax.tree.unflatten(jax.tree.structure(arrays), leaves)
  return path, forward(again, example)


def write_orbax(output, model, arrays, forward, example):
  """Writes and reads a checkpoint; returns its path and the logits."""
  directory = output / 'orbax'
  identity = {'identity': dict(model.task.identity)}
  checkpoints.save(directory, model.step, arrays, identity)
  record = checkpoints.load_record(directory, model.step)
  again = checkpoints.load_tree(directory, model.step, record, arrays)
  return directory / str(model.step) / 'arrays', forward(again, example)


def _shape(x: np.ndarray, tokens: bool) -> str:
  """Returns a symbolic shape: any number of rows, and of tokens of a text."""
  free = ('b', 't')[: 1 + tokens]
  return ', '.join([*free, *map(str, x.shape[len(free) :])])


def write_stablehlo(output, model, arrays, forward, example):
  """Writes and reads the compiled forward pass; returns path and logits."""
  from jax import export

  tokens, scope = model.task.tokenizer is not None, export.SymbolicScope()
  like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          export.symbolic_shape(_shape(x, tokens), scope=scope), x.dtype
      ),
      example,
  )
  made = export.export(jax.jit(forward), platforms=('cpu', 'cuda', 'tpu'))(
      jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays),
      like,
  )
  path = output / 'model.jaxexport'
  files.write_bytes(path, bytes(made.serialize()))
  read = export.deserialize(bytearray(files.content(path)))
  return path, read.call(arrays, example)


def write_saved_model(output, model, arrays, forward, example):
  """Writes and reads a TensorFlow SavedModel; returns path and logits."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  import tensorflow as tf
  from jax.experimental import jax2tf

  text = model.task.tokenizer is not None
  module = tf.Module()
  module.arrays = tf.nest.map_structure(tf.Variable, arrays)
  call = jax2tf.convert(
      forward,
      polymorphic_shapes=[
          None,
          jax.tree.map(lambda x: f'({_shape(x, text)})', example),
      ],
      with_gradient=False,
  )
  structure = jax.tree.structure(example)
  named = {k.replace('/', '_'): x for k, x in checkpoints.flatten(example)}

  def logits(**features):
    leaves = [features[name] for name in named]
    nested = jax.tree.unflatten(structure, leaves)
    return {'logits': call(module.arrays, nested)}

  module.logits = tf.function(logits, autograph=False)
  rank = 1 + text
  signature = {
      name: tf.TensorSpec([None] * rank + list(x.shape[rank:]), x.dtype)
      for name, x in named.items()
  }
  signatures = {'logits': module.logits.get_concrete_function(**signature)}
  if text:
    module.pieces = model.tokenizer.tensorflow_tokenizer()
    module.score = tf.function(
        lambda text: _score(text, module, call),
        input_signature=[tf.TensorSpec([None], tf.string, name='text')],
        autograph=False,
    )
    signatures['serving_default'] = module.score.get_concrete_function()
  else:
    signatures['serving_default'] = signatures['logits']
  path = os.fspath(output / 'saved_model')
  tf.saved_model.save(module, path, signatures=signatures)
  read = tf.saved_model.load(path).signatures['logits']
  again = read(**{name: tf.constant(x) for name, x in named.items()})
  return path, again['logits'].numpy()


def _score(text, module, call):
  """Returns what a language model says of texts, in a TensorFlow graph."""
  import tensorflow as tf

  start, end = tokenizer_lib.START_ID, tokenizer_lib.END_ID
  pieces = module.pieces.tokenize(_escape(text))
  count = tf.cast(pieces.row_lengths(), tf.int32)
  column = lambda piece: tf.fill([tf.shape(count)[0], 1], piece)
  tokens = tf.concat([column(start), pieces, column(end)], 1).to_tensor(end)
  inputs, labels = tokens[:, :-1], tokens[:, 1:]
  resets = tf.equal(inputs, start)
  logits = call(module.arrays, {'inputs': inputs, 'resets': resets})
  log_probs = tf.nn.log_softmax(logits)
  # One more than there are pieces: the end of the document is predicted too.
  counted = tf.sequence_mask(count + 1, tf.shape(labels)[1], tf.float32)
  nats = -tf.gather(log_probs, labels, axis=-1, batch_dims=2)
  return {
      'nats': tf.reduce_sum(nats * counted, axis=-1),
      'pieces': count + 1,
      'next_log_probs': tf.gather(log_probs, count, axis=1, batch_dims=1),
  }


def _escape(text):
  """Does in a graph what `tokenizer.escape` does."""
  import tensorflow as tf

  for old, new in tokenizer_lib.ESCAPED.items():
    text = tf.strings.regex_replace(text, old, new)
  text = tf.strings.regex_replace(text, '\n([^\n])', '\n \\1')
  return tf.where(tf.equal(text, ''), text, ' ' + text)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
