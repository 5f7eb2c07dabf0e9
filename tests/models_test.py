"""What every model here keeps to: dtypes, gradients, state, its arguments."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import fast
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax import base
from codistill_jax.models import dnn, linen, lstm, resnet, transformer

B, T, VOCAB, CLASSES = 3, 6, 11, 5
SIZES, INTEGERS = (7, 3, 20), 4  # Of a click model.


def tokens(seed=0, rows=B, length=T, resets=0.2):
  rng = np.random.default_rng(seed)
  return {
      'inputs': rng.integers(VOCAB, size=(rows, length)).astype(np.int32),
      'resets': rng.random((rows, length)) < resets,
  }


def images(seed=0):
  rng = np.random.default_rng(seed)
  return {'inputs': rng.normal(1.0, 1.0, (8, 12, 12, 3)).astype(np.float32)}


def clicks(seed=0):
  rng = np.random.default_rng(seed)
  ids = np.stack([rng.integers(n, size=6) for n in SIZES], axis=1)
  integers = rng.normal(size=(6, INTEGERS)).astype(np.float32)
  return {'inputs': {'integers': integers, 'categories': ids.astype('i4')}}


def tiny_resnet(block, stem, dtype='float32'):
  return linen.from_linen(
      resnet.ResNet(
          num_classes=CLASSES,
          stages=(1, 1),
          width=4,
          block=block,
          stem=stem,
          head_init=jax.nn.initializers.normal(0.1),
          axis_name=None,
          dtype=jnp.dtype(dtype),
      )
  )


class Case(NamedTuple):
  """A small model, what it reads, and how far off it is in bfloat16."""

  make: Callable[..., base.Model]
  batch: Callable[..., dict]
  off: float


LANGUAGE_MODELS = {
    'lstm': Case(
        functools.partial(
            lstm.language_model, VOCAB, layers=2, units=5, embedding=3
        ),
        tokens,
        0.05,
    ),
    'transformer': Case(
        functools.partial(
            transformer.language_model,
            VOCAB,
            layers=2,
            units=12,
            heads=3,
            hidden=10,
            memory=2 * T,
        ),
        tokens,
        0.1,
    ),
}
CASES = LANGUAGE_MODELS | {
    'tied transformer': Case(
        functools.partial(LANGUAGE_MODELS['transformer'].make, tied=True),
        tokens,
        0.1,
    ),
    'resnet': Case(
        functools.partial(tiny_resnet, resnet.Plain, resnet.cifar_stem),
        images,
        0.15,
    ),
    'bottleneck': Case(
        functools.partial(tiny_resnet, resnet.Bottleneck, resnet.imagenet_stem),
        images,
        0.15,
    ),
    'clicks': Case(
        functools.partial(dnn.click_model, 2, SIZES, INTEGERS, (8, 5)),
        clicks,
        0.1,
    ),
}
of_every_model = pytest.mark.parametrize('case', CASES.values(), ids=CASES)
of_language_models = pytest.mark.parametrize(
    'case', LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS
)


@functools.cache
def made(case, **kwargs):
  return case.make(**kwargs)


@functools.cache
def variables_of(case, seed=0):
  return fast.random_variables(made(case), case.batch(), seed)


def apply(model, variables, batch, carry, rng=None, train=False):
  outputs, updates = base.forward(model, variables, batch, carry, rng, train)
  return base.logits_of(outputs), updates


@functools.cache
def compiled(model):
  return fast.jit(functools.partial(apply, model))


def carry_of(model, batch):
  return model.init_carry(len(jax.tree.leaves(batch)[0]))


@of_every_model
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_are_finite_and_reach_every_parameter(case, dtype):
  model, batch = made(case, dtype=dtype), case.batch()
  if 'resets' in batch:
    batch['resets'][1:, 0] = True  # From zeros, where a variance is 0.
  rng = np.random.default_rng(0)

  @fast.jit
  def gradient(variables):
    def loss(params):
      logits, _ = apply(
          model,
          variables.replace(params=params),
          batch,
          carry_of(model, batch),
          None,
          case.batch is images,  # By the statistics of the batch.
      )
      return jnp.sum(logits * rng.normal(size=logits.shape))

    return jax.grad(loss)(variables.params)

  for path, x in jax.tree.leaves_with_path(gradient(variables_of(case))):
    assert np.isfinite(x).all(), path
    assert np.abs(x).max() > 0, path


@of_every_model
def test_bfloat16_is_close_and_keeps_parameters_and_statistics(case):
  exact, rough = made(case), made(case, dtype='bfloat16')
  batch = case.batch()
  variables = variables_of(case)
  like = jax.eval_shape(rough.init, jax.random.key(0), batch)
  train = case.batch is images
  (expected, full), (found, updates) = (
      fast.jit(functools.partial(apply, model, train=train))(
          variables, batch, carry_of(model, batch)
      )
      for model in (exact, rough)
  )
  leaves = jax.tree.leaves((like, updates.model_state, found))
  assert {x.dtype for x in leaves} == {jnp.dtype('float32')}
  np.testing.assert_allclose(found, expected, atol=case.off)
  assert np.abs(found - expected).max() > 1e-5
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05),
      updates.model_state,
      full.model_state,
  )


LSTM = functools.partial(lstm.language_model, VOCAB)
TRANSFORMER = functools.partial(
    transformer.language_model, VOCAB, units=12, heads=3
)
CLICKS = functools.partial(
    dnn.click_model, num_classes=2, table_sizes=SIZES, num_integers=INTEGERS
)


@pytest.mark.parametrize(
    'make, kwargs, message',
    [
        (LSTM, {'units': 0}, 'units must be a whole number of at least 1'),
        (LSTM, {'units': 3.5}, 'got 3.5'),
        (LSTM, {'layers': 0}, 'layers'),
        (LSTM, {'dropout': 1.0}, 'dropout'),
        (LSTM, {'dtype': 'float16'}, "got 'float16'"),
        (TRANSFORMER, {'units': 0}, 'units must be a whole number of at leas'),
        (TRANSFORMER, {'units': 12.0}, 'got 12.0'),
        (TRANSFORMER, {'units': 9}, 'units=9 is no even multiple of heads=3'),
        (TRANSFORMER, {'hidden': 0}, 'hidden'),
        (TRANSFORMER, {'memory': -1}, 'memory must be .* of at least 0'),
        (TRANSFORMER, {'dropout': 1.0}, 'dropout'),
        (TRANSFORMER, {'dtype': 'float16'}, "got 'float16'"),
        (CLICKS, {'num_classes': 1}, '2 classes or more, got 1'),
        (CLICKS, {'hidden': (8, 0)}, 'hidden'),
        (CLICKS, {'table_sizes': (3, 0)}, 'table_sizes'),
        (CLICKS, {'embedding': 0}, 'embedding'),
        (CLICKS, {'dtype': 'int8'}, 'dtype'),
        (CLICKS, {'table_sizes': (), 'num_integers': 0}, 'Expected columns'),
        *(
            (functools.partial(make, num_classes=10), kwargs, message)
            for make in (resnet.resnet20, resnet.resnet50)
            for kwargs, message in [
                ({'num_classes': 0}, 'num_classes must be a whole number'),
                ({'batch_norm': 'group'}, "'cross_replica', got 'group'"),
                ({'dtype': 'float16'}, "got 'float16'"),
            ]
        ),
    ],
)
def test_bad_arguments_are_named(make, kwargs, message):
  with pytest.raises(ValueError, match=message):
    make(**kwargs)


# --- Language models: what a token sees, and what it must not -----------------

CUTS = [[6], [4, 8], [4, *range(5, 12)]]  # Where windows of 12 tokens begin.
assert_close = functools.partial(
    np.testing.assert_allclose, rtol=1e-4, atol=1e-5
)


def window(batch, start, stop):
  return {k: v[:, start:stop] for k, v in batch.items()}


def run(case, batch, carry=None, seed=0):
  model = made(case)
  carry = carry_of(model, batch) if carry is None else carry
  logits, updates = compiled(model)(variables_of(case, seed), batch, carry)
  return logits, updates.carry


def in_windows(case, batch, cuts):
  """Logits and the last carry of a batch read in windows."""
  carry, parts = None, []
  for start, stop in zip([0, *cuts], [*cuts, batch['inputs'].shape[1]]):
    logits, carry = run(case, window(batch, start, stop), carry)
    parts.append(logits)
  return np.concatenate(parts, axis=1), carry


def used_carry(case):
  return run(case, tokens(seed=1))[1]


def differ(a, b):
  """Every token of each row is another."""
  return (np.abs(a - b).max(-1) > 1e-5).all()


@of_language_models
@pytest.mark.parametrize('cuts', CUTS)
def test_windows_with_the_carry_between_equal_one_long_window(case, cuts):
  batch, following = tokens(length=2 * T, resets=0.1), tokens(seed=2)
  whole, last = run(case, batch)
  parts, carry = in_windows(case, batch, cuts)
  assert_close(whole, parts)
  assert_close(run(case, following, last)[0], run(case, following, carry)[0])


@of_language_models
@pytest.mark.parametrize('cuts', [[], *CUTS])
def test_nothing_passes_a_document_boundary(case, cuts):
  """In a window, through the carry, and through the carry of a carry."""
  batch = tokens(length=2 * T, resets=0.0)
  batch['resets'][0, T] = True
  other = batch['inputs'].copy()
  other[:, :T] = (other[:, :T] + 1) % VOCAB
  before, _ = in_windows(case, batch, cuts)
  after, _ = in_windows(case, batch | {'inputs': other}, cuts)
  np.testing.assert_array_equal(before[0, T:], after[0, T:])
  # The rows without a boundary do look back over it.
  assert differ(before[1:, T:], after[1:, T:])
  fresh, _ = run(case, window(batch, T, 2 * T))
  assert_close(before[0, T:], fresh[0])


@of_language_models
def test_a_batch_without_resets_has_none(case):
  batch, carry = tokens(resets=0.0), used_carry(case)
  with_resets, _ = run(case, batch, carry)
  without, _ = run(case, {'inputs': batch['inputs']}, carry)
  np.testing.assert_array_equal(with_resets, without)


@of_language_models
def test_teachers_read_the_same_rows_with_carries_of_their_own(case):
  stack = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
  carries = [run(case, tokens(1), seed=seed)[1] for seed in (1, 2)]
  each = [run(case, tokens(), c, seed) for seed, c in enumerate(carries, 1)]
  together = fast.jit(
      jax.vmap(functools.partial(apply, made(case)), in_axes=(0, None, 0))
  )
  logits, updates = together(
      stack([variables_of(case, seed) for seed in (1, 2)]),
      tokens(),
      stack(carries),
  )
  jax.tree.map(assert_close, (logits, updates.carry), stack(each))
  assert np.abs(each[0][0] - each[1][0]).max() > 0.1


@of_language_models
def test_dropout_acts_in_training_only(case):
  model, carry = made(case, dropout=0.5), used_carry(case)

  @functools.partial(fast.jit, static_argnums=1)
  def logits(seed, train):
    variables, key = variables_of(case), jax.random.key(seed)
    return apply(model, variables, tokens(), carry, key, train)[0]

  assert_close(logits(0, False), run(case, tokens(), carry)[0])
  np.testing.assert_array_equal(logits(0, True), logits(0, True))
  assert np.abs(logits(0, True) - logits(1, True)).max() > 0.1


@of_language_models
def test_a_carry_of_another_number_of_rows_is_refused(case):
  with pytest.raises(ValueError, match=r'carry.* the batch has 3 rows'):
    run(case, tokens(), made(case).init_carry(2))


# --- The click model ----------------------------------------------------------

CLICK = CASES['clicks']


def test_a_click_model_computes_what_its_head_says():
  data, variables = clicks(), variables_of(CLICK)
  p = jax.tree.map(np.asarray, variables.params)
  found, _ = compiled(made(CLICK))(variables, data, ())
  ids = data['inputs']['categories']
  looked_up = [p[f'table_{k}'][ids[:, k]] for k in range(3)]
  x = np.concatenate([data['inputs']['integers'], *looked_up], axis=1)
  for name in ('hidden_0', 'hidden_1'):
    x = np.maximum(x @ p[name]['kernel'] + p[name]['bias'][None], 0)
  expected = x @ p['logit']['kernel'] + p['logit']['bias'][None]
  assert found.shape == (6,)
  np.testing.assert_allclose(found, expected[:, 0], rtol=1e-5, atol=1e-6)


def test_widths_of_tables_are_those_of_the_rule():
  widths = {1: 6, 16: 12, 81: 18, 10_000: 60, 13_000: 64, 10**7: 64}
  assert {n: dnn.embedding_width(n) for n in widths} == widths
  for embedding, expected in [(None, (10, 8, 13)), (5, (5, 5, 5))]:
    like = jax.eval_shape(
        CLICKS(embedding=embedding).init, jax.random.key(0), clicks()
    )
    shapes = [like.params[f'table_{k}'].shape for k in range(3)]
    assert shapes == [*zip(SIZES, expected)]


def test_rows_that_were_looked_up_learn_and_no_others():
  data, variables = clicks(), variables_of(CLICK)

  def loss(params):
    now = variables.replace(params=params)
    return jnp.sum(jnp.square(apply(made(CLICK), now, data, ())[0] - 1.0))

  grads = fast.jit(jax.grad(loss))(variables.params)
  for k in range(3):
    moved = np.flatnonzero(np.abs(grads[f'table_{k}']).max(axis=1))
    seen = np.unique(data['inputs']['categories'][:, k])
    np.testing.assert_array_equal(moved, seen)


def test_embeddings_start_at_a_length_of_about_one():
  model = dnn.click_model(2, (4000,), 0, hidden=(4,), embedding=16)
  one = {
      'integers': np.zeros((1, 0), 'f4'),
      'categories': np.zeros((1, 1), int),
  }
  start = fast.jit(model.init)(jax.random.key(0), {'inputs': one})
  lengths = np.sum(start.params['table_0'] ** 2, axis=1)
  np.testing.assert_allclose(np.mean(lengths), 1, atol=0.05)


@pytest.mark.parametrize('bad', [20, -21, 2**31 - 1])
def test_an_id_outside_its_table_is_not_overlooked(bad):
  data = clicks()
  data['inputs']['categories'][1, 2] = bad
  found, _ = compiled(made(CLICK))(variables_of(CLICK), data, ())
  np.testing.assert_array_equal(np.isnan(found), np.arange(6) == 1)


def test_columns_of_another_task_are_refused():
  data = clicks()
  data['inputs']['integers'] = data['inputs']['integers'][:, :3]
  with pytest.raises(ValueError, match=r'\(4, 3\) columns, got \(3, 3\)'):
    made(CLICK).init(jax.random.key(0), data)
