"""The losses that a run trains with, made of those in `losses` by its settings.

Evaluation uses the plain task loss, whatever training smooths.

Shape suffixes: B examples, C classes, P peers; `...` any axes of examples.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from codistill_jax import losses
from codistill_jax.base import Array, Task

SMOOTHING_DISTRIBUTIONS = ('uniform', 'unigram')
DISTILL_TARGETS = ('mean', 'each')


def training_loss(
    task: Task, label_smoothing: float, smoothing_distribution: str
) -> Callable[[Array, Array], jax.Array]:
  """The task loss with a share of each target given to a distribution.

  (1 - s) phi(y, q) + s phi(u, q), with the share s (Szegedy et al. 2016, who
  have a uniform u; the unigram u of Anil et al. 2018 is how often each label
  occurs in the training data).

  Args:
    task: Data.
    label_smoothing: s, in [0, 1); 0 is the plain loss.
    smoothing_distribution: 'uniform' or 'unigram'. Of a sigmoid output the one
      is a probability of 1/2, the other the base rate.

  Returns:
    `(logits (..., C), labels (...)) -> (...)`, in nats.

  Raises:
    ValueError: As `check_smoothing`; or if the frequencies are no distribution
      over the classes.
  """
  check_smoothing(task, label_smoothing, smoothing_distribution)
  plain = losses.task_loss_of(task.output)
  if not label_smoothing:
    return plain
  smoothed = functools.partial(plain, label_smoothing=label_smoothing)
  if smoothing_distribution == 'uniform':
    return smoothed
  frequencies_C = _checked(task.label_frequencies(), task.num_classes)
  if task.output == 'sigmoid':
    return functools.partial(
        smoothed, smoothing_probability=float(frequencies_C[1])
    )
  return functools.partial(smoothed, smoothing_distribution=frequencies_C)


def check_smoothing(
    task: Task, label_smoothing: float, smoothing_distribution: str
) -> None:
  """Raises ValueError on settings that cannot be; counts no labels."""
  share = label_smoothing
  if not isinstance(share, int | float) or not 0 <= share < 1:
    raise ValueError(
        f'Experiment.label_smoothing={share!r}; set it to a number in [0, 1)'
    )
  if smoothing_distribution not in SMOOTHING_DISTRIBUTIONS:
    raise ValueError(
        f'Experiment.smoothing_distribution={smoothing_distribution!r} is not'
        f' one of {", ".join(SMOOTHING_DISTRIBUTIONS)}'
    )
  if smoothing_distribution == 'uniform':
    return
  if not share:
    raise ValueError(
        f'Experiment.smoothing_distribution={smoothing_distribution!r} acts'
        ' nowhere without label_smoothing; set Experiment.label_smoothing to'
        " more than 0, or leave 'uniform'"
    )
  if task.label_frequencies is None:
    raise ValueError(
        f'Experiment.smoothing_distribution={smoothing_distribution!r}, but'
        ' the task does not count its labels; give it Task.label_frequencies,'
        " or set 'uniform'"
    )


def _checked(frequencies: Array, num_classes: int) -> np.ndarray:
  """Frequencies (C,) as float32, of which none is negative and the sum is 1."""
  found = np.asarray(frequencies, np.float64)
  if found.shape != (num_classes,):
    raise ValueError(
        f'Task.label_frequencies gives the shape {found.shape}, expected'
        f' {(num_classes,)}: one for each class'
    )
  if found.min() < 0 or not abs(found.sum() - 1) < 1e-6:
    raise ValueError(
        'Task.label_frequencies must be >= 0 and sum to 1, got a sum of'
        f' {found.sum():.6g} and a minimum of {found.min():.6g}'
    )
  return found.astype(np.float32)


def towards(
    target: str, distill_loss: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
  """A distillation loss towards the peers' mean prediction, or each of theirs.

  With 'each' it is the mean over the peers that are present of the loss towards
  that peer alone: psi averaged over peers, where algorithm 1 of Anil et al.
  2018 has psi of their average (Zhang et al. 2018 found the former better, with
  KL). Cross entropy is linear in the target, so that of it both are the same.
  The gradient of KL is that of cross entropy, and hence the same too: of `kl`
  the values differ, by what the peers disagree, and no update does. Squared
  logits differ by the variance of the peers' logits, again without a gradient.
  Reverse KL and JSD train differently.

  Args:
    target: 'mean', which is the loss as it is, or 'each'.
    distill_loss: With the arguments of those in `losses`.

  Returns:
    A loss with the same arguments; of one peer, and with 'mean', the same loss.

  Raises:
    ValueError: If `target` is neither.
  """
  if target not in DISTILL_TARGETS:
    raise ValueError(
        f'Experiment.distill_target={target!r} is not one of'
        f' {", ".join(DISTILL_TARGETS)}'
    )
  if target == 'mean':
    return distill_loss

  def each(
      student_logits: Array, teacher_logits_P: Array, present_P: Array, **kwargs
  ) -> jax.Array:
    present_P = jnp.asarray(present_P) != 0
    if jnp.shape(teacher_logits_P)[:1] != present_P.shape:
      raise ValueError(
          'Expected teacher logits (P, ...) and presence (P,), got'
          f' {jnp.shape(teacher_logits_P)} and {present_P.shape}.'
      )
    share = 1.0 / jnp.maximum(jnp.sum(present_P, dtype=jnp.float32), 1.0)
    total = 0.0
    # One after another, as in `losses`: each stays in the cache.
    for present, logits in zip(present_P, jnp.asarray(teacher_logits_P)):
      # Absent, it may say NaN, and 0 times the gradient of that is NaN too.
      logits = jnp.where(present, logits, 0.0)
      towards_one = distill_loss(
          student_logits, logits[None], np.ones(1, np.float32), **kwargs
      )
      total += jnp.where(present, towards_one * share, 0.0)
    return total

  return each
