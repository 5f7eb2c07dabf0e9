"""Exports a trained group: its parameters, its forward pass, a servable model.

    python -m experiments.export --workdir=runs/two --output=served

Writes into --output, each by a --form (repeatable; default: the first three):

  safetensors  model.safetensors: arrays by name, params/..., model_state/...
  orbax        orbax/<step>/arrays: StandardCheckpointer().restore(it)
  stablehlo    model.jaxexport: jax.export.deserialize(its bytes) has
               call(arrays, features), which gives logits, for any number of
               rows (and tokens)
  saved_model  saved_model/: a TensorFlow SavedModel whose signature takes raw
               values; its graph does what training does to them beforehand. Of
               a language model it takes text, and gives the nats and the number
               of pieces (the end of the document is one), and the next piece's
               log probabilities. Of a table it takes columns by name,
               categories as strings ('' is missing) and numbers (NaN is), and
               gives logits; of images the bytes of PNG or JPEG files, upright.
               Its signature 'logits' takes the features of a prepared batch.

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
      # Of a SavedModel that takes columns.
      'arguments': getattr(model.task.raw_inputs, 'arguments', None),
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
  from . import saved_model

  tokens = model.task.tokenizer is not None
  shapes = jax.tree.map(lambda x: f'({_shape(x, tokens)})', example)
  path = os.fspath(output / 'saved_model')
  return path, saved_model.save(path, model, arrays, forward, example, shapes)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
