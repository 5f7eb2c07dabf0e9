"""Types: heads make logits, copies are copies, casts touch floats only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax import base

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('lead', [(4,), (4, 3)])
def test_a_head_makes_the_logits_that_it_stands_for(lead):
  features, kernel = RNG.normal(size=(*lead, 5)), RNG.normal(size=(5, 7))
  bias = RNG.normal(size=7)
  outputs = base.HeadOutputs(*map(jnp.float32, (features, kernel, bias)))
  expected = features @ kernel + bias.reshape((1,) * len(lead) + (-1,))
  np.testing.assert_allclose(
      base.logits_of(outputs), expected, rtol=1e-5, atol=1e-5
  )


def test_logits_are_float32_also_of_a_bfloat16_head():
  features, kernel = jnp.ones((2, 300)), jnp.full((300, 3), 1.01)
  outputs = base.HeadOutputs(
      *(x.astype(jnp.bfloat16) for x in (features, kernel, jnp.ones(3)))
  )
  logits = base.logits_of(outputs)
  assert logits.dtype == jnp.float32
  # Rounded once, on the way in: a sum in bfloat16 would be a multiple of 2.
  exact = 300 * float(jnp.bfloat16(1.01)) + 1
  np.testing.assert_allclose(logits, np.full((2, 3), exact), rtol=1e-6)
  assert base.logits_of(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32


def test_host_copy_shares_no_memory_with_the_device():
  tree = {'a': jnp.arange(1000.0), 'b': {'c': jnp.arange(3), 'd': np.ones(2)}}
  copy = base.host_copy(tree)
  for ours, theirs in zip(jax.tree.leaves(copy), jax.tree.leaves(tree)):
    assert type(ours) is np.ndarray and ours.flags.writeable
    assert not np.shares_memory(ours, np.asarray(theirs))
    np.testing.assert_array_equal(ours, theirs)
  assert copy['b']['c'].dtype == np.int32


def test_host_copy_uses_memory_again_only_if_it_is_given():
  tree = {'a': jnp.arange(6.0), 'n': jnp.int32(3)}
  first, second = base.host_copy(tree), base.host_copy(tree)
  assert not np.shares_memory(first['a'], second['a'])
  newer = jax.tree.map(lambda x: x + 1, tree)
  again = base.host_copy(newer, into=first)
  assert again['a'] is first['a'] and again['n'] is first['n']
  np.testing.assert_array_equal(again['a'], np.arange(6.0) + 1)
  np.testing.assert_array_equal(second['a'], np.arange(6.0))
  with pytest.raises(TypeError):  # Nothing is rounded on the way.
    base.host_copy({'a': jnp.arange(6), 'n': jnp.int32(3)}, into=first)


def test_cast_floats_leaves_integers_and_booleans_alone():
  tree = {
      'w': np.array([1.01, 2.0], np.float32),
      'half': np.ones(2, jnp.bfloat16),
      'count': np.array([2**24 + 1], np.int32),
      'mask': np.array([True]),
  }
  cast = base.cast_floats(tree, 'bfloat16')
  assert {k: str(x.dtype) for k, x in cast.items()} == {
      'w': 'bfloat16',
      'half': 'bfloat16',
      'count': 'int32',
      'mask': 'bool',
  }
  assert cast['count'][0] == 2**24 + 1
  assert float(cast['w'][0]) == float(jnp.bfloat16(1.01))
  assert base.cast_floats(cast, 'float32')['half'].dtype == np.float32
  assert base.cast_floats(tree, None)['w'] is tree['w']
