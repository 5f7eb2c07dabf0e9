"""Continues a text with trained language models, side by side.

    python -m experiments.sample --workdir=runs/two --workdir=runs/one \
        --prompt='In the beginning'

Pieces are drawn from the model's distribution, at --temperature and from the
--top_k most probable; the same --seed gives the same text. A report shows what
was drawn last: it is kept in `<workdir>/report/samples.json`.
"""

import textwrap
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from codistill_jax import base, run_directory, trained
from codistill_jax.data.tokenizer import END_ID, START_ID, UNKNOWN_ID
from codistill_jax.storage import files

from . import cli

_FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this binary."""
  cli.define_paths('workdir', 'Run directory; repeatable.', required=True)
  flags.DEFINE_multi_string('prompt', [''], 'Text to continue; repeatable.')
  flags.DEFINE_integer('group', 0, 'Which group.', lower_bound=0)
  cli.define_step_flags()
  flags.DEFINE_integer('pieces', 100, 'Word pieces to write.', lower_bound=1)
  flags.DEFINE_float(
      'temperature',
      1.0,
      'Divides the logits: below 1 likely pieces get likelier; 0 takes the'
      ' likeliest.',
      lower_bound=0.0,
  )
  flags.DEFINE_integer(
      'top_k', None, 'Draw from so many pieces; default: all.', lower_bound=1
  )
  flags.DEFINE_integer('seed', 0, 'Of the draws.', lower_bound=0)


def main(argv: Sequence[str]) -> None:
  """Prints what each model writes after each prompt."""
  del argv
  for workdir in _FLAGS.workdir:
    model = trained.load(
        workdir, _FLAGS.group, _FLAGS.step, trusted=_FLAGS.trust
    )
    if model.tokenizer is None:
      raise ValueError(f'{workdir} holds no language model: nothing to sample')
    how = {k: _FLAGS[k].value for k in ('temperature', 'top_k', 'seed')}
    samples = []
    for prompt in _FLAGS.prompt:
      text = continue_text(model, prompt, pieces=_FLAGS.pieces, **how)
      cli.tell(f'{workdir}, group {_FLAGS.group}, step {model.step}:')
      cli.tell(textwrap.indent(text, '  ') + '\n')
      known = {'group': _FLAGS.group, 'step': model.step, 'prompt': prompt}
      samples.append({**known, 'text': text, **how})
    try:
      path = run_directory.samples_path(workdir)
      files.write_json(path, {'samples': samples})
    except OSError as e:  # A run of others; what it writes has been shown.
      cli.tell(f'not kept for a report: {e}', error=True)


def continue_text(
    model: trained.Trained,
    prompt: str,
    *,
    pieces: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
  """Samples a continuation of a text; returns the text with it.

  Args:
    model: Of a language model task.
    prompt: The beginning of a document.
    pieces: Word pieces to write; fewer where the document ends.
    temperature: Divides the logits; 0 takes the most probable piece.
    top_k: Draw from so many of the most probable; None: from all.
    seed: Of the draws.
  """
  tokenizer = model.tokenizer
  start = tokenizer.encode(prompt)
  written = []
  for piece in _sampled(model, start, temperature, top_k, seed):
    if piece == END_ID or len(written) == pieces:
      break
    written.append(piece)
  return tokenizer.decode([*start, *written])


def _sampled(
    model: trained.Trained,
    start: np.ndarray,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[int]:
  """Yields one piece after another, for ever."""

  @jax.jit
  def advance(piece, carry, key):
    batch = {
        'inputs': piece[None, None],
        'resets': piece[None, None] == START_ID,
    }
    outputs, updates = model.model.apply(
        model.variables, batch, carry, None, False
    )
    logits = base.logits_of(outputs)[0, 0]
    # Neither begins a document within one, nor is it a piece of a text.
    logits = logits.at[jnp.array([START_ID, UNKNOWN_ID])].set(-jnp.inf)
    if top_k is not None and top_k < logits.size:
      logits = jnp.where(
          logits < jax.lax.top_k(logits, top_k)[0][-1], -jnp.inf, logits
      )
    if not temperature:
      return jnp.argmax(logits), updates.carry
    return jax.random.categorical(key, logits / temperature), updates.carry

  key, carry = jax.random.key(seed), model.model.init_carry(1)
  piece = jnp.int32(START_ID)
  for given in start:
    _, carry = advance(piece, carry, key)
    piece = jnp.int32(given)
  while True:
    key, now = jax.random.split(key)
    piece, carry = advance(piece, carry, now)
    piece = piece.astype(jnp.int32)
    yield int(piece)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
