"""The loss over blocks of examples is the loss of all logits at once."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from codistill_jax import blocks, jaxprs, losses
from codistill_jax.base import HeadOutputs, logits_of


def head(rng, lead, features, classes, peers=None, dtype=jnp.float32):
  """Random `HeadOutputs`, with a leading axis of peers if their number is."""
  first = () if peers is None else (peers,)
  make = lambda *shape: jnp.asarray(rng.normal(size=first + shape), dtype)
  return HeadOutputs(
      make(*lead, features), make(features, classes), make(classes)
  )


def loss_of(name='cross_entropy', temperature=1.0, smoothing=0.0):
  """A codistillation loss in the form that `blocks` takes, by name."""
  distill = functools.partial(
      losses.distill_loss(name), temperature=temperature
  )

  def loss(logits, teacher_logits, rows, shared):
    labels, weights = rows
    task = losses.task_loss(logits, labels, label_smoothing=smoothing)
    total = jnp.sum(jnp.where(weights == 0, 0.0, task) * weights)
    sums = {'task': total}
    if teacher_logits is not None:
      present_P, distill_weight = shared
      values = distill(logits, teacher_logits, present_P)
      sums['distill'] = jnp.sum(jnp.where(weights == 0, 0.0, values) * weights)
      total += distill_weight * sums['distill']
    return total, sums

  return loss


def plain(loss, student, teachers, rows, shared):
  """The same of all logits at once."""
  teacher_logits = None
  if teachers is not None:
    teacher_logits = jax.vmap(logits_of)(teachers)
  return loss(logits_of(student), teacher_logits, rows, shared)


def with_gradient(summed):
  """`(total, sums), gradient` of the student's outputs, compiled."""

  def of(student, teachers, rows, shared):
    return jax.value_and_grad(
        lambda s: summed(s, teachers, rows, shared), has_aux=True
    )(student)

  return jax.jit(of)


def both(loss, block, args, lanes=None):
  """Results of the loss over blocks and of the plain one."""
  fused = functools.partial(blocks.summed, loss, block=block, lanes=lanes)
  return [with_gradient(f)(*args) for f in (fused, lambda *a: plain(loss, *a))]


def assert_close(got, expected, rtol):
  """Close, relative to the largest number of each array."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = np.float32(a), np.float32(b)
    np.testing.assert_allclose(
        a, b, rtol=rtol, atol=rtol * max(1e-3, np.abs(b).max(initial=0))
    )


def arguments(seed, lead, features, classes, peers, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  weights = rng.choice([0.0, 0.5, 1.0, 2.0], size=lead).astype('f4')
  teachers = head(rng, lead, features, classes, peers, dtype) if peers else None
  present = (rng.random(peers) < 0.7).astype('f4')
  return (
      head(rng, lead, features, classes, dtype=dtype),
      teachers,
      (rng.integers(classes, size=lead).astype('i4'), weights),
      (present, np.float32(0.7)) if peers else None,
  )


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(2, 37),
    st.integers(0, 3),
    st.integers(1, 40),
    st.sampled_from([None, 8]),
    st.sampled_from([n for n in losses.DISTILL_LOSSES if 'sigmoid' not in n]),
    st.sampled_from([1.0, 2.5]),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 2**16),
)
def test_value_and_gradient_are_those_of_all_logits_at_once(
    lead,
    features,
    classes,
    peers,
    block,
    lanes,
    name,
    temperature,
    smoothing,
    seed,
):
  args = arguments(seed, tuple(lead), features, classes, peers)
  loss = loss_of(name, temperature, smoothing)
  assert_close(*both(loss, block, args, lanes), rtol=1e-5)


def test_unigram_smoothing_sees_every_block():
  rng = np.random.default_rng(0)
  unigram = rng.dirichlet(np.ones(11)).astype('f4')

  def loss(logits, teacher_logits, rows, shared):
    del teacher_logits, shared
    values = losses.task_loss(
        logits, *rows, label_smoothing=0.2, smoothing_distribution=unigram
    )
    return jnp.sum(values), ()

  student = head(rng, (9,), 4, 11)
  args = student, None, (rng.integers(11, size=9),), None
  assert_close(*both(loss, 4, args), rtol=1e-5)


def test_bfloat16_features_stay_within_their_own_precision():
  """8 bits: 2^-8 of the largest value, for gradients summed up in float32."""
  args = arguments(3, (40,), 16, 21, 2, jnp.bfloat16)
  fused, reference = both(loss_of(), 7, args)
  assert_close(fused[0], reference[0], rtol=1e-5)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), (args[0], args[1]))
  _, exact = with_gradient(lambda *a: plain(loss_of(), *a))(*exact, *args[2:])
  exact = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
  assert_close(fused[1], exact, rtol=2**-7)


@pytest.mark.parametrize('block', [2, None])
def test_a_batch_of_padding_alone_has_loss_and_gradient_zero(block):
  student, teachers, (labels, weights), shared = arguments(0, (5,), 3, 6, 2)
  # What pads may be no label at all.
  rows = np.full_like(labels, -1), np.zeros_like(weights)
  fused = functools.partial(blocks.summed, loss_of(), block=block)
  results = with_gradient(fused)(student, teachers, rows, shared)
  for x in jax.tree.leaves(results):
    np.testing.assert_array_equal(x, 0.0)


def test_no_gradient_flows_into_teachers_or_through_the_sums():
  student, teachers, rows, shared = arguments(1, (6,), 3, 5, 2)
  fused = functools.partial(blocks.summed, loss_of(), block=4)
  gradient = jax.grad(lambda t: fused(student, t, rows, shared)[0])(teachers)
  assert not any(np.any(x) for x in jax.tree.leaves(gradient))
  gradient = jax.grad(lambda s: fused(s, teachers, rows, shared)[1]['distill'])(
      student
  )
  assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_many_groups_at_once_are_each_as_if_alone():
  many = [arguments(seed, (3, 5), 4, 7, 1) for seed in range(3)]
  fused = with_gradient(functools.partial(blocks.summed, loss_of(), block=4))
  together = jax.vmap(fused)(*jax.tree.map(lambda *x: np.stack(x), *many))
  alone = jax.tree.map(lambda *x: np.stack(x), *(fused(*x) for x in many))
  assert_close(together, alone, rtol=1e-5)


@pytest.mark.parametrize('summed, exists', [('fused', False), ('plain', True)])
def test_logits_of_all_tokens_never_exist(summed, exists):
  tokens, features, classes = 4096, 8, 1000
  args = arguments(0, (tokens // 32, 32), features, classes, 2)
  loss = loss_of()
  of = functools.partial({'fused': blocks.summed, 'plain': plain}[summed], loss)
  jaxpr = jax.make_jaxpr(with_gradient(of))(*args)
  arrays = [v.aval for e in jaxprs.equations(jaxpr.jaxpr) for v in e.outvars]
  largest = max(x.size for x in arrays)
  assert (largest >= tokens * classes) == exists
  if not exists:
    assert largest <= 2 * tokens * classes / 8  # Two teachers in one array.


@pytest.mark.parametrize('peers', [0, 3])
def test_the_student_has_one_softmax_and_so_has_each_teacher(peers):
  """Task loss, distillation and the gradient of both share the student's."""
  examples, classes = 64, 1000
  args = arguments(0, (examples,), 4, classes, peers)
  fused = with_gradient(functools.partial(blocks.summed, loss_of()))
  cost = fused.lower(*args).compile().cost_analysis()
  exponentials = cost['transcendentals'] / (examples * classes)
  assert 1 + peers <= exponentials < 1.01 + peers
  # On a CPU no mask, chosen class or soft target is an array of that size.
  arrays = cost['bytes accessed'] / (4 * examples * classes)
  assert arrays < 13 + 13.4 * peers


@hypothesis.given(
    st.integers(1, 2**20), st.integers(2, 2**20), st.integers(0, 15)
)
def test_blocks_are_large_enough_to_be_fast_and_small_enough_to_fit(
    examples, classes, peers
):
  size = blocks.block_size(examples, classes, peers)
  assert min(128, examples) <= size <= min(1024, examples)
  if size > 128:
    assert 4 * size * classes * (1 + peers) <= 2**28
    assert size <= max(672, -(-examples // 8))


@pytest.mark.parametrize('peers', [0, 3])
def test_blocks_keep_within_the_memory_that_they_are_given(peers):
  """What is held on a CPU besides arguments and results, as compiled."""
  args = arguments(0, (512,), 32, 4096, peers)
  found = []
  for budget in (2**23, 2**24, 2**26):
    of = functools.partial(blocks.summed, loss_of(), most_bytes=budget)
    compiled = with_gradient(of).lower(*args).compile()
    found.append(compiled.memory_analysis().temp_size_in_bytes)
    # And makes use of it, as far as there are examples.
    assert min(budget, 2**25) / 3 < found[-1] <= budget
  assert found == sorted(found)
  with pytest.raises(ValueError, match=r'fused_loss_bytes=1000 .* at least'):
    blocks.summed(loss_of(), *args, most_bytes=1000)


def test_shapes_that_disagree_are_named():
  student, teachers, rows, shared = arguments(0, (4, 3), 2, 5, 1)
  with pytest.raises(ValueError, match=r'rows of leading shape \(4, 3\)'):
    blocks.summed(loss_of(), student, None, (np.zeros(4),), None)
  short = teachers._replace(features=teachers.features[:, :3])
  with pytest.raises(ValueError, match='features of teachers'):
    blocks.summed(loss_of(), student, short, rows, shared)
