"""Per-example losses in nats. Pure; no reduction over examples here.

Logits have any leading axes: (B, C) for images, (B, T, C) for a language
model; teachers have one more axis P in front. A sigmoid output has no C.
Everything is computed in float32, whatever the dtype of the logits. A logit of
minus infinity (a padded class) counts nowhere: a loss is that of the others.

Shape suffixes: B examples, C classes, P peers; `...` any axes of examples.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codistill_jax import base

SMOOTHING_DISTRIBUTIONS = ('uniform', 'unigram')
DISTILL_TARGETS = ('mean', 'each')

# Stands for minus infinity: exp of it is 0, and 0 times it is 0 and not NaN,
# so that x log x and its gradient are right at 0 without a mask.
_LOWEST = -1e30
_PADDED = 1e-3 * _LOWEST  # What at most is left of it in a mean over peers.


def task_loss(
    logits: base.Array,
    labels: base.Array,
    *,
    label_smoothing: float = 0.0,
    smoothing_distribution: base.Array | None = None,
) -> jax.Array:
  """Softmax cross entropy against integer labels.

  Args:
    logits: (..., C).
    labels: Integers (...) of any width. Outside [0, C), or at a padded class,
      the loss is NaN: pad with any class and weight 0.
    label_smoothing: Share of the target, in [0, 1), that is taken from the
      label and given to `smoothing_distribution`. A Python number.
    smoothing_distribution: (C,); the uniform distribution if None. The unigram
      frequencies of a corpus are the other usual choice. What it gives to
      padded classes is shared by the others.

  Returns:
    Loss per example in nats, (...).

  Raises:
    ValueError: If shapes disagree, or an argument is out of range.
  """
  logits = finite(logits)
  labels = jnp.asarray(labels)
  if not logits.ndim or logits.shape[:-1] != labels.shape:
    raise ValueError(
        f'Expected logits (..., C) and labels (...), got {logits.shape} and'
        f' {labels.shape}.'
    )
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f'Labels must be integers, got dtype {labels.dtype}.')
  _check_smoothing(label_smoothing)
  # A narrow type may hold fewer numbers than there are classes.
  labels = labels.astype(jnp.int32)
  shifted, log_sum = _normalized(logits)
  num_classes = logits.shape[-1]
  picked = _picked(shifted, labels)
  wrong = (labels < 0) | (labels >= num_classes) | (picked <= _PADDED)
  loss = jnp.where(wrong, jnp.nan, log_sum - picked)
  if not label_smoothing:
    return loss
  target = jnp.ones(num_classes)
  if smoothing_distribution is not None:
    target = _checked_distribution(
        'smoothing_distribution', smoothing_distribution, num_classes
    )
  target = jnp.broadcast_to(target, logits.shape)
  target = jnp.where(logits > _PADDED, target, 0.0)
  total = jnp.sum(target * shifted, axis=-1)
  smooth = log_sum - total / jnp.sum(target, axis=-1)
  return (1.0 - label_smoothing) * loss + label_smoothing * smooth


def sigmoid_task_loss(
    logits: base.Array,
    labels: base.Array,
    *,
    label_smoothing: float = 0.0,
    smoothing_probability: float = 0.5,
) -> jax.Array:
  """Log loss of a single logistic output.

  Args:
    logits: (...).
    labels: (...); 0 or 1 (or a probability), of any dtype. Outside [0, 1] the
      loss is NaN.
    label_smoothing: Share of the target, in [0, 1), that is taken from the
      label and given to `smoothing_probability`.
    smoothing_probability: Of the positive class; 0.5 is the uniform
      distribution, the base rate of the data the unigram one.

  Returns:
    Loss per example in nats, (...).

  Raises:
    ValueError: If shapes disagree, or an argument is out of range.
  """
  logits = finite(logits)
  labels = jnp.asarray(labels, jnp.float32)
  if logits.shape != labels.shape:
    raise ValueError(
        'Expected logits and labels of one shape, got'
        f' {logits.shape} and {labels.shape}.'
    )
  _check_smoothing(label_smoothing)
  if not 0.0 <= smoothing_probability <= 1.0:
    raise ValueError(
        'smoothing_probability must lie in [0, 1], got'
        f' {smoothing_probability}.'
    )
  labels = jnp.where((labels < 0) | (labels > 1), jnp.nan, labels)
  positive = (
      1.0 - label_smoothing
  ) * labels + label_smoothing * smoothing_probability
  return _log_loss(logits, positive, 1.0 - positive)


def soft_target(
    teacher_logits_P: base.Array, present_P: base.Array
) -> jax.Array:
  """Mean probability of the teachers that are present.

  A mean, never a sum: it does not grow with P. What an absent teacher says is
  ignored, be it NaN.

  Args:
    teacher_logits_P: (P, ..., C).
    present_P: (P,); nonzero where the teacher is present.

  Returns:
    Probabilities (..., C); the uniform distribution if nobody is present.
  """
  return _soft_target(_checked_teachers(teacher_logits_P, present_P), present_P)


def _soft_target(teachers, present_P):
  mean = _mean_over_present([softmax(x) for x in teachers], present_P)
  return jnp.where(_anyone(present_P), mean, 1.0 / mean.shape[-1])


def _log_soft_target(teachers, present_P):
  """Logarithm of the soft target, exact also where that underflows to 0."""
  logits = jnp.stack(teachers)
  num_classes = logits.shape[-1]
  present = (
      jnp.asarray(present_P).reshape((-1,) + (1,) * (logits.ndim - 1)) != 0
  )
  present = jnp.broadcast_to(present, logits.shape)
  # -1e30 rather than `logsumexp(where=)`: nobody present stays finite.
  log_p = jnp.where(present, jax.nn.log_softmax(logits), _LOWEST)
  count = jnp.maximum(_count(present_P), 1.0)
  mean = jax.nn.logsumexp(log_p, axis=0) - jnp.log(count)
  return jnp.where(_anyone(present_P), mean, -np.log(num_classes))


class SoftTarget(NamedTuple):
  """What a loss may ask of the teachers; what it does not ask is not computed.

  Attributes:
    probabilities: () -> mean probability (..., C).
    log_probabilities: () -> its logarithm.
    logits: () -> mean logits (..., C).
    mean_of: (..., C) -> its mean (...) over classes drawn by the probabilities.
  """

  probabilities: Callable[[], jax.Array]
  log_probabilities: Callable[[], jax.Array]
  logits: Callable[[], jax.Array]
  mean_of: Callable[[jax.Array], jax.Array]


class Formula(NamedTuple):
  """A distillation loss, wherever its soft target comes from.

  Attributes:
    of: `(student_logits, SoftTarget) -> (...)`, of finite float32 logits over
      the temperature.
    class_logits: Logits as a model gives them -> those (..., C) that a soft
      target is made of.
  """

  of: Callable[[jax.Array, SoftTarget], jax.Array]
  class_logits: Callable[[jax.Array], jax.Array]


def formula_of(loss: Callable[..., jax.Array]) -> Formula:
  """Returns the formula of one of the distillation losses of this module.

  Raises:
    ValueError: If `loss` is none of them.
  """
  formula = getattr(loss, 'formula', None)
  if formula is None:
    name = getattr(loss, '__name__', loss)
    raise ValueError(
        f'distill_loss {name} has no formula of a soft target, as predictions'
        f' of peers need it; use one of {", ".join(DISTILL_LOSSES)}'
    )
  return formula


def _of_teachers(teachers, present_P) -> SoftTarget:
  """Of finite float32 logits (..., C), an array for each teacher."""
  return SoftTarget(
      lambda: _soft_target(teachers, present_P),
      lambda: _log_soft_target(teachers, present_P),
      lambda: _mean_over_present(teachers, present_P),
      lambda values: _mean_of(values, teachers, present_P),
  )


def _mean_of(values, teachers, present_P):
  """`SoftTarget.mean_of`; the soft target itself is never written."""
  means = []
  for present, logits in zip(jnp.asarray(present_P) != 0, teachers):
    weights, total = exponentials(jnp.where(present, logits, 0.0))
    means.append(jnp.sum(weights * values, axis=-1) / total)
  return _mean_over_present(means, present_P)


def _distillation(core, class_logits=lambda logits: logits):
  """A distillation loss with the common arguments around its formula."""

  def loss(
      student_logits: base.Array,
      teacher_logits_P: base.Array,
      present_P: base.Array,
      *,
      temperature: float = 1.0,
      scale_by_temperature_squared: bool = False,
  ) -> jax.Array:
    student, teachers = _prepare(
        student_logits, teacher_logits_P, present_P, temperature
    )
    teachers = [class_logits(x) for x in teachers]
    if teachers[0].shape == student.shape:
      # Of a class that the student lacks no teacher says anything.
      lacking = student <= _PADDED
      teachers = [jnp.where(lacking, _LOWEST, x) for x in teachers]
    values = core(student, _of_teachers(teachers, present_P))
    if scale_by_temperature_squared:
      values = values * temperature**2
    return jnp.where(_anyone(present_P), values, 0.0)

  # Not functools.wraps, which would show the signature of `core`.
  loss.__name__ = loss.__qualname__ = core.__name__
  loss.__doc__ = core.__doc__
  loss.formula = Formula(core, class_logits)  # type: ignore[attr-defined]
  return loss


@_distillation
def cross_entropy(student_logits, target):
  """Cross entropy of the student against the soft target: -sum p log q.

  The distillation loss of Anil et al. 2018, algorithm 1. Teachers are averaged
  as probabilities. Its gradient is that of `kl`; at agreement it is 0, while
  the loss is the entropy of the soft target.

  Args:
    student_logits: (..., C).
    teacher_logits_P: (P, ..., C); no gradient flows into them.
    present_P: (P,); nonzero where the teacher is present.
    temperature: Divides the logits of both sides.
    scale_by_temperature_squared: Multiplies the loss by temperature**2, which
      keeps the size of the gradient (Hinton et al. 2015).

  Returns:
    Loss per example in nats, (...); 0 if nobody is present.

  Raises:
    ValueError: If shapes disagree, or `temperature` is not positive.
  """
  shifted, log_sum = _normalized(student_logits)
  return log_sum - target.mean_of(shifted)


@_distillation
def kl(student_logits, target):
  """KL(p || q) of the soft target p from the student q: sum p log(p / q).

  `cross_entropy` less the entropy of the soft target; arguments as there.
  """
  log_p = target.log_probabilities()
  return _kl(log_p, jax.nn.log_softmax(student_logits))


@_distillation
def reverse_kl(student_logits, target):
  """KL(q || p) of the student q from the soft target p: sum q log(q / p).

  Arguments as in `cross_entropy`.
  """
  log_p = target.log_probabilities()
  student_logits = jnp.where(log_p <= _PADDED, _LOWEST, student_logits)
  return _kl(jax.nn.log_softmax(student_logits), log_p)


@_distillation
def jsd(student_logits, target):
  """Jensen-Shannon divergence of student and soft target, in [0, log 2].

  (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2. Arguments as in
  `cross_entropy`.
  """
  log_p = target.log_probabilities()
  log_q = jax.nn.log_softmax(student_logits)
  log_m = jnp.logaddexp(log_p, log_q) - np.log(2.0)
  return 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


@_distillation
def squared_logits(student_logits, target):
  """Half the mean over C of the squared difference of centred logits.

  The one loss here that averages teachers as LOGITS, not as probabilities
  (after Ba & Caruana 2014). The difference is centred over C, because a
  constant added to all logits changes no prediction. So defined, it is what
  temperature**2 times `kl` of a single teacher tends to as the temperature
  grows. Arguments as in `cross_entropy`.
  """
  teacher = target.logits()
  real = (student_logits > _PADDED) & (teacher > _PADDED)
  count = jnp.maximum(jnp.sum(real, axis=-1, keepdims=True), 1)
  mean = lambda x: jnp.sum(x, axis=-1, keepdims=True) / count
  difference = jnp.where(real, student_logits - teacher, 0.0)
  centred = jnp.where(real, difference - mean(difference), 0.0)
  return 0.5 * mean(jnp.square(centred))[..., 0]


@functools.partial(_distillation, class_logits=base.two_class_logits)
def sigmoid_cross_entropy(student_logits, target):
  """Log loss of a logistic output against the peers' mean probability.

  Logits (...) and (P, ...) without a class axis; else as `cross_entropy`.
  """
  p = target.probabilities()
  # Not 1 - positive, which loses what a confident teacher leaves to the rest.
  return _log_loss(student_logits, positive=p[..., 1], negative=p[..., 0])


DISTILL_LOSSES: dict[str, Callable[..., jax.Array]] = {
    'cross_entropy': cross_entropy,
    'kl': kl,
    'reverse_kl': reverse_kl,
    'jsd': jsd,
    'squared_logits': squared_logits,
    'sigmoid_cross_entropy': sigmoid_cross_entropy,
}


_TASK_LOSSES: dict[str, Callable[..., jax.Array]] = {
    'softmax': task_loss,
    'sigmoid': sigmoid_task_loss,
}


def task_loss_of(output: str) -> Callable[..., jax.Array]:
  """Returns the task loss of a kind of output, 'softmax' or 'sigmoid'.

  Raises:
    ValueError: If it is neither.
  """
  if output not in _TASK_LOSSES:
    raise ValueError(
        f"output={output!r} is no kind of output; choose 'softmax' or"
        " 'sigmoid'."
    )
  return _TASK_LOSSES[output]


def distill_loss(
    name: str | Callable[..., jax.Array], output: str = 'softmax'
) -> Callable[..., jax.Array]:
  """Returns the distillation loss of that name, for a kind of output.

  For a sigmoid output a loss over classes is that of the two classes which the
  output stands for; `cross_entropy` is `sigmoid_cross_entropy` then. A function
  is taken as it is: `(student_logits, teacher_logits_P, present_P) -> (...)`.

  Raises:
    ValueError: If there is none; the message lists the names.
  """
  if callable(name):
    # Without a formula, which knows nothing of what gin binds.
    loss = lambda *logits_and_presence: name(*logits_and_presence)
    loss.__name__ = getattr(name, '__name__', repr(name))
    return loss
  names = [n for n in DISTILL_LOSSES if n not in _SIGMOID_ONLY]
  if output == 'sigmoid':
    names = list(DISTILL_LOSSES)
  if name not in names:
    raise ValueError(
        f'Unknown distillation loss {name!r} for a {output} output; choose one'
        f' of {", ".join(names)}.'
    )
  loss = DISTILL_LOSSES[name]
  if output != 'sigmoid' or name in _SIGMOID_ONLY:
    return loss
  return sigmoid_cross_entropy if loss is cross_entropy else _of_two(loss)


_SIGMOID_ONLY = ('sigmoid_cross_entropy',)


def _of_two(loss: Any) -> Any:
  """A loss over classes, of the two classes of a sigmoid output."""
  two = base.two_class_logits

  def of_two(student_logits, teacher_logits_P, present_P, **kwargs):
    return loss(two(student_logits), two(teacher_logits_P), present_P, **kwargs)

  of_two.formula = Formula(  # type: ignore[attr-defined]
      lambda student, target: loss.formula.of(two(student), target), two
  )
  return of_two


def finite(logits: base.Array) -> jax.Array:
  """Float32 logits with minus infinity replaced; NaN stays NaN."""
  return _finite(jnp.asarray(logits, jnp.float32))


# No loss has a gradient at a class of probability 0. Its own gradient would
# be a mask as large as the logits, written and read again.
@jax.custom_jvp
def _finite(logits):
  return jnp.maximum(logits, _LOWEST)


_finite.defjvp(lambda x, dx: (_finite(*x), *dx))


@jax.custom_jvp
def _picked(values, labels):
  """The value (...) of each label of (..., C); 0 for one outside [0, C)."""
  if jax.default_backend() != 'cpu':
    # There it is fused with other sums over C, which a CPU does not do.
    return _sum_at(values, labels)
  found = jnp.take_along_axis(
      values, labels[..., None], axis=-1, mode='fill', fill_value=0.0
  )
  return found[..., 0]


@_picked.defjvp
def _picked_jvp(primals, tangents):
  # Not that of a gather: to scatter takes an array of zeros of its own.
  return _picked(*primals), _sum_at(tangents[0], primals[1])


def _sum_at(values, labels):
  classes = jax.lax.broadcasted_iota(jnp.int32, values.shape, labels.ndim)
  at_label = jnp.where(classes == labels[..., None], values, 0.0)
  return jnp.sum(at_label, axis=-1)


def _normalized(logits):
  """Logits less their maximum (..., C), and the log of their sum of exp (...).

  The difference is `log_softmax`. Apart, a cross entropy is one minus a sum
  over classes, and its gradient, softmax minus target, is made in one pass
  without an array of log probabilities.
  """
  highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  shifted = logits - highest
  return shifted, jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))


def exponentials(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns probabilities (..., C) times a total, and that (...).

  By the exp that the losses use, of finite logits.
  """
  shifted, _ = _normalized(logits)
  values = jnp.exp(shifted)
  return values, jnp.sum(values, axis=-1)


def softmax(logits: jax.Array) -> jax.Array:
  """Returns probabilities (..., C) of finite logits (softmax)."""
  values, total = exponentials(logits)
  # A division of each row, not of each class.
  return values * (1.0 / total)[..., None]


def _kl(log_p, log_q):
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _log_loss(logits, positive, negative):
  return positive * jax.nn.softplus(-logits) + negative * jax.nn.softplus(
      logits
  )


def _anyone(present_P):
  return jnp.any(jnp.asarray(present_P) != 0)


def _count(present_P):
  return jnp.sum(jnp.asarray(present_P) != 0, dtype=jnp.float32)


def _checked_teachers(teacher_logits_P, present_P):
  """Finite float32 logits of each teacher, of as many as `present_P` has.

  Apart: what is done to those of one teacher is done in one go, while they are
  in the cache. For all of them at once it takes half as long again.
  """
  shape, peers = jnp.shape(teacher_logits_P), jnp.shape(present_P)
  if not shape or not shape[0] or peers != shape[:1]:
    raise ValueError(
        'Expected teacher logits (P, ...) and presence (P,) with P >= 1, got'
        f' {shape} and {peers}.'
    )
  logits_P = jnp.asarray(teacher_logits_P)
  return [finite(logits_P[i]) for i in range(shape[0])]


def _mean_over_present(values_P, present_P):
  """Mean of a sequence, of those present; 0 if nobody is."""
  share = 1.0 / jnp.maximum(_count(present_P), 1.0)
  present_P = jnp.asarray(present_P) != 0
  return sum(
      jnp.where(present, values * share, 0.0)
      for present, values in zip(present_P, values_P)
  )


def _prepare(student_logits, teacher_logits_P, present_P, temperature):
  """Checked float32 student and teacher logits over the temperature."""
  check_temperature(temperature)
  student = jnp.asarray(student_logits, jnp.float32)
  if jnp.shape(teacher_logits_P)[1:] != student.shape:
    raise ValueError(
        'Expected teacher logits (P,) + the shape of the student logits, got'
        f' {jnp.shape(teacher_logits_P)} and {student.shape}.'
    )
  teachers = jax.lax.stop_gradient(jnp.asarray(teacher_logits_P, jnp.float32))
  teachers = _checked_teachers(teachers, present_P)
  cooled = [finite(x / temperature) for x in teachers]
  return finite(student / temperature), cooled


def check_temperature(temperature: float | base.Array) -> None:
  """Raises ValueError unless it is positive and finite, where it is known."""
  known = not isinstance(temperature, jax.core.Tracer)
  if known and not 0 < temperature < np.inf:
    raise ValueError(
        f'temperature must be positive and finite, got {temperature}.'
    )


def _check_smoothing(label_smoothing):
  if not 0.0 <= label_smoothing < 1.0:
    raise ValueError(
        f'label_smoothing must lie in [0, 1), got {label_smoothing}.'
    )


def _checked_distribution(name, distribution, num_classes):
  """The distribution as float32 (C,); checked where its values are known."""
  if jnp.shape(distribution) != (num_classes,):
    raise ValueError(
        f'{name} has the shape {jnp.shape(distribution)}, expected'
        f' {(num_classes,)}: one number for each class.'
    )
  if not isinstance(distribution, jax.core.Tracer):
    values = np.asarray(distribution, np.float64)
    if not (np.all(values >= 0) and abs(values.sum() - 1) < 1e-5):
      raise ValueError(
          f'{name} must be >= 0 and sum to 1, got a sum of'
          f' {values.sum():.6g} and a minimum of {values.min():.6g}.'
      )
  return jnp.asarray(distribution, jnp.float32)


# --- What a run trains with, by its settings ----------------------------------


def training_loss(
    task: base.Task, label_smoothing: float, smoothing_distribution: str
) -> Callable[[base.Array, base.Array], jax.Array]:
  """Returns the task loss with a share of each target given to a distribution.

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
  plain = task_loss_of(task.output)
  if not label_smoothing:
    return plain
  smoothed = functools.partial(plain, label_smoothing=label_smoothing)
  if smoothing_distribution == 'uniform':
    return smoothed
  assert task.label_frequencies is not None  # Checked above.
  frequencies_C = _checked_distribution(
      'Task.label_frequencies', task.label_frequencies(), task.num_classes
  )
  if task.output == 'sigmoid':
    return functools.partial(
        smoothed, smoothing_probability=float(frequencies_C[1])
    )
  return functools.partial(smoothed, smoothing_distribution=frequencies_C)


def check_smoothing(
    task: base.Task, label_smoothing: float, smoothing_distribution: str
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


def towards(
    target: str, distill_loss: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
  """Returns a distillation loss towards the peers' mean, or towards each.

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
    distill_loss: With the arguments of those above.

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
      student_logits: base.Array,
      teacher_logits_P: base.Array,
      present_P: base.Array,
      **kwargs,
  ) -> jax.Array:
    present_P = jnp.asarray(present_P) != 0
    if jnp.shape(teacher_logits_P)[:1] != present_P.shape:
      raise ValueError(
          'Expected teacher logits (P, ...) and presence (P,), got'
          f' {jnp.shape(teacher_logits_P)} and {present_P.shape}.'
      )
    share = 1.0 / jnp.maximum(jnp.sum(present_P, dtype=jnp.float32), 1.0)
    total = jnp.float32(0.0)
    # One after another, as above: each stays in the cache.
    for present, logits in zip(present_P, jnp.asarray(teacher_logits_P)):
      # Absent, it may say NaN, and 0 times the gradient of that is NaN too.
      logits = jnp.where(present, logits, 0.0)
      towards_one = distill_loss(
          student_logits, logits[None], np.ones(1, np.float32), **kwargs
      )
      total += jnp.where(present, towards_one * share, 0.0)
    return total

  return each
