"""Optimisers of the large-batch recipes, which leave scales and biases alone.

A kernel is a parameter whose name is or ends in 'kernel': of a product or a
convolution, in the models of this package and in flax. What else there is (the
scales and shifts of a normalisation, biases, embeddings) is not decayed, and
has no trust ratio. Learning rates are numbers or schedules; see
`schedules.linear_scaling`.
"""

import contextlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import optax

from codistill_jax import base


def init(tx: optax.GradientTransformation, params: base.PyTree) -> base.PyTree:
  """Returns the state of an optimiser, random keys as `base.KeyData`.

  Raises:
    ValueError: If it asks for other parameters than a tree of arrays.
  """
  with _refusing('started'):
    return base.without_keys(tx.init(params))


def update(
    tx: optax.GradientTransformation,
    grads: base.PyTree,
    state: base.PyTree,
    params: base.PyTree,
    loss: base.Array,
) -> tuple[base.PyTree, base.PyTree]:
  """Applies an optimiser; returns parameters and its state.

  Args:
    tx: The optimiser. It may ask for `value` and `grad` besides, which are
      `loss` and `grads`.
    grads: Of the mean over the group batch.
    state: From `init` or the update before.
    params: Before the update.
    loss: The total loss of which `grads` is the gradient.

  Raises:
    ValueError: If it asks for anything else, such as a function of the loss.
  """
  held = base.with_keys(state)
  with _refusing('updated'):
    try:
      changes, after = optax.with_extra_args_support(tx).update(
          grads, held, params, value=loss, grad=grads
      )
    except TypeError as e:
      # As of `optax.contrib.sam`, which says that it takes more, and does not.
      if 'unexpected keyword' not in str(e):
        raise
      changes, after = tx.update(grads, held, params)
  if jax.tree.map(jnp.shape, changes) != jax.tree.map(jnp.shape, params):
    raise ValueError(
        'this optimiser does not give one update for each parameter, of its'
        ' shape, as one of optax that measures does not; put it in an'
        ' optax.chain or optax.monitor, or choose another'
    )
  return optax.apply_updates(params, changes), base.without_keys(after)


@contextlib.contextmanager
def _refusing(doing: str) -> Iterator[None]:
  try:
    yield
  except (AttributeError, TypeError) as e:
    raise ValueError(
        f'this optimiser cannot be {doing} here: {e}; an update has the'
        ' gradient, the parameters (a tree of arrays), and the loss as'
        ' value= at one point: choose an optimiser that needs no more, such as'
        ' optax.lbfgs without its line search'
    ) from e


def chain(
    transformations: Sequence[optax.GradientTransformation],
) -> optax.GradientTransformation:
  """Applies transformations one after another: `optax.chain`, for gin files.

  In a gin file::

    experiment.Experiment.optimizer = @optimizers.chain()
    optimizers.chain.transformations = [@optax.clip_by_global_norm(), ...]
    optax.clip_by_global_norm.max_norm = 1.0

  Args:
    transformations: In order, the gradient going through the first one first.
  """
  return optax.chain(*transformations)


def momentum_sgd(
    learning_rate: float | optax.Schedule,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
  """SGD with momentum and L2, as in Goyal et al. 2017, section 5.1.

    u' = momentum u + g + weight_decay w        (the decay for kernels only)
    w' = w - learning_rate u'

  The rate is outside the momentum, so that a change of it needs no correction
  (their equation 9). With `nesterov` the step is along g + momentum u'.

  Args:
    learning_rate: A number or a schedule.
    momentum: Factor of the past.
    nesterov: Whether the momentum looks ahead.
    weight_decay: Factor of the kernels in their gradient: of the loss
      weight_decay |w|^2 / 2.
  """
  return optax.chain(
      optax.add_decayed_weights(weight_decay, mask=kernels),
      optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
  )


def lars(
    learning_rate: float | optax.Schedule,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 1e-4,
    trust_coefficient: float = 1e-3,
) -> optax.GradientTransformation:
  """Layer-wise adaptive rates for very large batches (You et al. 2017).

    d = g + weight_decay w
    u' = momentum u + learning_rate trust_coefficient |w| / |d| d
    w' = w - u'

  for each kernel; for other parameters d = g and no ratio of norms. The paper's
  algorithm 1 has |g| + weight_decay |w| for |d|, which differs where the two
  are not parallel; |d| is what optax and most others use.

  Args:
    learning_rate: A number or a schedule; larger than that of SGD by orders of
      magnitude, for kernels.
    momentum: Factor of the past.
    nesterov: Whether the momentum looks ahead.
    weight_decay: Factor of the kernels in their gradient.
    trust_coefficient: Size of a step relative to the kernel, at rate 1.
  """
  return optax.lars(
      learning_rate,
      weight_decay=weight_decay,
      weight_decay_mask=kernels,
      trust_coefficient=trust_coefficient,
      trust_ratio_mask=kernels,
      momentum=momentum,
      nesterov=nesterov,
  )


def kernels(params: base.PyTree) -> base.PyTree:
  """Returns whether each parameter is a kernel: a mask for optax.

  Raises:
    ValueError: If none is: the model names its parameters otherwise.
  """
  mask = jax.tree.map_with_path(lambda path, _: _is_kernel(path), params)
  if not any(jax.tree.leaves(mask)):
    names = sorted(
        {_name(path) for path, _ in jax.tree.leaves_with_path(params)}
    )
    raise ValueError(
        'Expected parameters whose names end in kernel, got'
        f' {", ".join(names)}; rename them, or use an optimiser of optax with a'
        ' mask of your own.'
    )
  return mask


def _is_kernel(path: tuple) -> bool:
  return _name(path).endswith('kernel')


def _name(path: tuple) -> str:
  """The last name on the way to a parameter."""
  return jax.tree_util.keystr(path[-1:], simple=True)
