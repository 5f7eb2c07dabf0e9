"""Distillation from what the peers predict for the same batch, in this step.

The third way to teach, beside checkpoints on disk and in memory: groups that
see the same batches in one program send each other their predictions of the
step instead of their parameters. No teacher makes a forward pass, staleness is
0, and all groups are updated at once (Deep Mutual Learning, Zhang et al. 2018,
where they take turns). Each group takes one softmax, whatever G is.

Under `jax.vmap` over all groups of a device what is gathered has no batch axis:
gathering is free there, and what is made of it is made once for all groups.

Shape suffixes: G groups, C classes, K classes sent of a prediction; `...` any
axes of examples.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codistill_jax import losses
from codistill_jax.base import Array, PeerPredictions

# Up to so many a sum that is fused into what needs it beats a matrix product,
# which reads each prediction once for all groups of a device, but writes more.
_FEW_GROUPS = 3
_LEAST_LEFT = 1e-6  # Float32 knows 1 less a sum no better.
_TINY = np.finfo(np.float32).tiny


def mixing_matrix(peers: Sequence[Sequence[int]]) -> np.ndarray:
  """Returns how much each group counts for each: float32 (G, G), rows learn.

  Args:
    peers: For each group the ids of those it learns from.
  """
  mix_GG = np.zeros((len(peers), len(peers)), np.float32)
  for group_id, others in enumerate(peers):
    if others:
      mix_GG[group_id, list(others)] = 1.0 / len(others)
  return mix_GG


def bytes_per_example(num_classes: int, top_k: int | None, output: str) -> int:
  """Returns what one prediction takes on its way to one peer, in bytes.

  A probability is 4 bytes, as is the index of a class, and the rest. Between
  groups of one device nothing moves.
  """
  if output == 'sigmoid':
    return 4 * 2
  return 4 * num_classes if top_k is None else 8 * top_k + 4


def check(
    distill_loss: Callable[..., Array],
    top_k: int | None,
    num_classes: int | None = None,
) -> None:
  """Raises ValueError if predictions cannot be compared in this way."""
  formula = losses.formula_of(_unwrapped(distill_loss))
  if top_k is None:
    return
  if formula is not losses.cross_entropy.formula:
    raise ValueError(
        f'top_k={top_k} is there for the distill_loss cross_entropy'
        ' of a softmax output only; leave top_k=None to send whole'
        ' predictions'
    )
  if type(top_k) is not int or top_k < 1:
    raise ValueError(
        f'top_k={top_k!r}; set it to a number of classes of at'
        ' least 1, or to None to send whole predictions'
    )
  if num_classes is not None and top_k > num_classes:
    raise ValueError(
        f'top_k={top_k}, but there are {num_classes} classes; set'
        ' it to fewer, or to None to send whole predictions'
    )


def peer_loss(
    distill_loss: Callable[..., Array],
    logits: Array,
    peers: PeerPredictions,
    *,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
) -> jax.Array:
  """Returns a distillation loss against the peers' predictions of the batch.

  To be called by every group of the axis `peers.axis_name` alike.

  Args:
    distill_loss: One of `losses.DISTILL_LOSSES`, or a `functools.partial` of
      one that sets the arguments below.
    logits: What this group predicts; (..., C), or (...) for a sigmoid output.
    peers: Who counts, and how much.
    temperature: Divides the logits of all groups.
    scale_by_temperature_squared: As in `losses.cross_entropy`.

  Returns:
    Loss per example in nats, (...); 0 for a group that is alone. No gradient
    flows into the peers.

  Raises:
    ValueError: If the loss is none of them, or `top_k` does not suit it.
  """
  if isinstance(distill_loss, functools.partial):
    return peer_loss(distill_loss.func, logits, peers, **distill_loss.keywords)
  formula = losses.formula_of(distill_loss)
  losses.check_temperature(temperature)
  student = losses.finite(jnp.asarray(logits, jnp.float32) / temperature)
  if peers.top_k is not None:
    check(distill_loss, peers.top_k, student.shape[-1])
    values = _top_k_cross_entropy(student, peers, peers.top_k)
  else:
    target = _of_peers(formula.class_logits(student), peers)
    values = formula.of(student, target)
  if scale_by_temperature_squared:
    values = values * temperature**2
  return jnp.where(jnp.any(peers.mix_G != 0), values, 0.0)


def _unwrapped(loss: Callable[..., Array]) -> Callable[..., Array]:
  return loss.func if isinstance(loss, functools.partial) else loss


def _of_peers(
    class_logits: jax.Array, peers: PeerPredictions
) -> losses.SoftTarget:
  """The mean of what the peers predict, themselves detached."""

  def probabilities() -> jax.Array:
    # Divided where they are mixed: of few groups no array is written for that.
    values, total = losses.exponentials(class_logits)
    share_G = gather(1.0 / total, peers.axis_name)
    return _mix(gather(values, peers.axis_name), peers, share_G[..., None])

  def log_probabilities() -> jax.Array:
    # Of what underflows, the logarithm of the smallest float: the exact one
    # would take a softmax of each peer in every group.
    return jnp.log(jnp.maximum(probabilities(), _TINY))

  return losses.SoftTarget(
      probabilities,
      log_probabilities,
      lambda: _mix(gather(class_logits, peers.axis_name), peers),
      lambda values: jnp.sum(probabilities() * values, axis=-1),
  )


def _mix(
    values_G: jax.Array,
    peers: PeerPredictions,
    share_G: jax.Array | float = 1.0,
) -> jax.Array:
  """Returns the mean of `share * values` by `mix_G`, without the axis G."""
  if len(peers.mix_G) != len(values_G):
    raise ValueError(
        f'mix_G has {len(peers.mix_G)} groups, but the axis'
        f' {peers.axis_name!r} has {len(values_G)}'
    )
  if len(values_G) > _FEW_GROUPS:
    return jnp.tensordot(
        peers.mix_G,
        share_G * values_G,
        axes=1,
        precision=jax.lax.Precision.HIGHEST,
    )
  # Not the sum over all less one's own: that cancels where a group is sure of
  # itself.
  mix_G = peers.mix_G.reshape(-1, *[1] * (values_G.ndim - 1)) * share_G
  return sum(mix * values for mix, values in zip(mix_G, values_G))


def gather(values: Array, axis_name: str | tuple[str, ...]) -> jax.Array:
  """Returns the `values` (...) of all groups of an axis, (G, ...), detached.

  What is not a number counts as 0: a group that has diverged ends its own run,
  and not those of groups that have nothing to do with it.
  """
  values = jax.lax.stop_gradient(values)
  values = jnp.where(jnp.isnan(values), 0, values)
  names = (axis_name,) if isinstance(axis_name, str) else axis_name
  shape = values.shape
  for name in reversed(names):  # The outermost comes last, so it leads.
    # Of a single device XLA would make a copy.
    alone = jax.lax.axis_size(name) == 1
    values = values[None] if alone else jax.lax.all_gather(values, name)
  return values.reshape(-1, *shape)


# --- The K largest probabilities, and the rest as one more class --------------


class Sent(NamedTuple):
  """What a group sends of its prediction with a top_k of K.

  Attributes:
    probabilities_K: The largest (..., K).
    classes_K: Of which classes, int32 (..., K).
    rest: The probability of all other classes together, (...).
  """

  probabilities_K: jax.Array
  classes_K: jax.Array
  rest: jax.Array


def largest(probabilities: jax.Array, top_k: int) -> Sent:
  """Returns the `top_k` largest of probabilities (..., C), and the rest."""
  values_K, classes_K = jax.lax.top_k(probabilities, top_k)
  if top_k == probabilities.shape[-1]:
    return Sent(values_K, classes_K, jnp.zeros(values_K.shape[:-1]))
  rest = jnp.maximum(1.0 - jnp.sum(values_K, axis=-1), 0.0)
  return Sent(values_K, classes_K, rest)


def _top_k_cross_entropy(
    student: jax.Array, peers: PeerPredictions, top_k: int
) -> jax.Array:
  """Mean over the peers of a cross entropy over K + 1 classes.

  The classes are the K that the peer names, and all others as one: nothing is
  renormalised. By the data processing inequality the divergence that it stands
  for is never above that of the whole predictions. What the student leaves to
  the others is 1 less what it gives to the K, and counts as at least 1e-6: it
  takes no pass over all classes for each peer.
  """
  log_q = jax.nn.log_softmax(student)
  mine = largest(jax.lax.stop_gradient(jnp.exp(log_q)), top_k)
  sent = Sent(*(gather(x, peers.axis_name) for x in mine))
  # Of all peers at once: their gradients are added in one go.
  classes_GK = jnp.moveaxis(sent.classes_K, 0, -2)
  lead, named = classes_GK.shape[:-2], classes_GK.shape[-2:]
  log_q_GK = jnp.take_along_axis(
      log_q, classes_GK.reshape(*lead, -1), axis=-1
  ).reshape(*lead, *named)
  log_q_GK = jnp.moveaxis(log_q_GK, -2, 0)
  given_G = jnp.sum(sent.probabilities_K * log_q_GK, axis=-1)
  left_G = 1.0 - jnp.sum(jnp.exp(log_q_GK), axis=-1)
  return -_mix(given_G + sent.rest * _log_at_least(left_G, _LEAST_LEFT), peers)


def _log_at_least(values: jax.Array, least: float) -> jax.Array:
  """The logarithm of no less than `least`, with a gradient there too."""
  raised = jax.lax.stop_gradient(jnp.maximum(values, least) - values)
  return jnp.log(values + raised)
