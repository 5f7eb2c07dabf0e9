"""A task and a model of milliseconds, for drills: no data set, no carry.

Noisy clusters in the plane of 16 dimensions; every group draws its own rows.
"""

import flax.linen as nn
import numpy as np

from codistill_jax.base import Array, Model, Task
from codistill_jax.models.linen import from_linen

_FEATURES, _CLASSES = 16, 10


class _Rows:
  """The batch of a step is a function of the group and the step."""

  def __init__(self, group_id: int, group_batch: int, rows: slice | None):
    self._key = group_id
    self._size = group_batch
    self._rows = rows or slice(None)

  def batch(self, step: int) -> dict[str, Array]:
    return {k: x[self._rows] for k, x in _draw(self._key, step, self._size)}


def _draw(key: int, step: int, size: int) -> list[tuple[str, Array]]:
  rng = np.random.default_rng([key, step])
  centres = np.random.default_rng(0).normal(size=(_CLASSES, _FEATURES))
  labels = rng.integers(_CLASSES, size=size)
  noise = rng.normal(size=(size, _FEATURES))
  return [
      ('inputs', (centres[labels] + noise).astype(np.float32)),
      ('labels', labels.astype(np.int32)),
  ]


def clusters() -> Task:
  """Ten classes of rows, endless."""

  def train_stream(
      *, group_id: int, num_groups: int, group_batch: int, rows: slice | None
  ) -> _Rows:
    del num_groups
    return _Rows(group_id, group_batch, rows)

  return Task(
      train_stream=train_stream,
      eval_batches=lambda size: [dict(_draw(10**6, n, size)) for n in range(4)],
      num_classes=_CLASSES,
      identity={'task': 'clusters'},
      example_name='row',
      description='noisy clusters',
  )


def network(num_classes: int, units: int = 64) -> Model:
  """One hidden layer."""

  class Network(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Dense(num_classes)(nn.relu(nn.Dense(units)(x)))

  return from_linen(Network())
