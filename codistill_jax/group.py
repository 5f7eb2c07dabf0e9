"""The life of one group: fetch, step, publish, report; in that order.

A group publishes at the end of a turn, not at the start of the next: then
groups that are stepped in turn in one process find each other's publications
of the same step, in whatever order they are stepped. A run that starts on an
exchange step publishes first, in case a killed predecessor did not get to.
"""

import collections
import concurrent.futures
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax

from codistill_jax.base import Batch, Metrics, Stream, TrainState, Variables
from codistill_jax.exchange.plan import Exchange, NoExchange
from codistill_jax.step import fault_error, fault_of

_BEHIND = 8  # Updates that may be under way while their faults are unread.


class PlacedState(Protocol):
  """A state on the devices, of which the loop reads the variables alone."""

  @property
  def variables(self) -> Variables:
    ...


class GroupStep(Protocol):
  """The update of a group on its replicas: a `PmapStep`, `one_program.Seat`."""

  def place(self, state: TrainState) -> PlacedState:
    """Puts a state on the devices."""

  def place_teachers(self, teachers: Any) -> Any:
    """Puts what `Exchange.fetch` gave on the devices."""

  def __call__(
      self, state: Any, batch: Batch, teachers: Any, distill_weight: float
  ) -> tuple[Any, Metrics]:
    """Returns the next state and the metrics of the update."""


class StepResult(NamedTuple):
  """One turn of `run_group`.

  Attributes:
    step: Updates done.
    state: The state after them, on the devices; donated to the next turn, so
      read it (`collect` of the step) before taking the next result.
    metrics: Of this update; device arrays and floats. `exchange/stall_ms` is
      the time that the loop was held by the exchange in this turn.
  """

  step: int
  state: PlacedState
  metrics: Metrics


def run_group(
    train_step: GroupStep,
    state: TrainState,
    stream: Stream,
    *,
    num_steps: int,
    exchange: Exchange | None = None,
    distill_weight: Callable[[int], float] = lambda step: 1.0,
) -> Iterator[StepResult]:
  """Trains one group from `state.step` to `num_steps`; writes nothing.

  Args:
    train_step: The step on all replicas.
    state: Fresh from `init_state`, or restored; not altered.
    stream: Batches by step; this process's rows of the group batch.
    num_steps: The step to stop at.
    exchange: Default: none, the group trains alone. Not closed.
    distill_weight: Step to weight. While it is 0 (burn-in) nothing is fetched
      and no teacher is evaluated.

  Yields:
    A `StepResult` for each update.

  Raises:
    FloatingPointError: At the first, the last and each exchange step, if loss
      or gradient of the update are not finite, with what was so first; nothing
      is published then. In between it is a few updates late.
    ValueError: If an argument is of another kind; likewise, if the data are
      wrong.
    What `Exchange.fetch` raises, before an update; the last result stands.
  """
  exchange = NoExchange() if exchange is None else exchange
  for name, part, has, advice in (
      (
          'train_step',
          train_step,
          'place',
          'PmapStep(make_train_step(model, tx, axis_name=REPLICA_AXIS))',
      ),
      ('state', state, 'carry', 'the TrainState of init_state'),
      ('stream', stream, 'batch', 'an object with batch(step) -> dict'),
      ('exchange', exchange, 'fetch', 'that of one group, as exchanges[0]'),
      ('distill_weight', distill_weight, '__call__', 'lambda step: 1.0'),
      ('num_steps', num_steps, '__index__', 'a whole number'),
  ):
    if isinstance(part, type) or not hasattr(part, has):
      kind = 'a class' if isinstance(part, type) else type(part).__name__
      raise ValueError(f'run_group: {name} is of type {kind}; give {advice}')
  pure = getattr(train_step, 'train_step', None)
  if num_steps > (made_for := getattr(pure, 'num_steps', num_steps)):
    raise ValueError(
        f'num_steps={num_steps}, but the step was made for'
        f' num_steps={made_for}; make it for as many'
    )
  step = int(state.step)
  exchange.begin(step)
  state = train_step.place(state)
  # At the call and not in the first turn: groups that go on from an exchange
  # step and are stepped in turn look for each other's publication of it.
  if exchange.due(step):
    exchange.publish_if_due(step, state.variables)
  batches = prefetch(stream, step, num_steps)
  turns = _turns(
      train_step, state, batches, step, num_steps, exchange, distill_weight
  )
  return _telling(exchange, turns)


def _telling(
    exchange: Exchange, turns: Iterator[StepResult]
) -> Iterator[StepResult]:
  try:
    yield from turns
  except Exception as e:
    exchange.fail(e)
    raise


class _Faults:
  """Finds the first update that went wrong, a few behind the newest.

  To look at the newest would hold the loop until it is made.
  """

  def __init__(self):
    self._unread: collections.deque[tuple[int, Metrics]] = collections.deque()
    self._first: tuple[int, Exception] | None = None

  def add(self, step: int, metrics: Metrics) -> None:
    """Takes note of an update."""
    self._unread.append((step, dict(metrics)))

  def check(self, now: bool) -> None:
    """Raises what `fault_error` gives of the first update that went wrong.

    Args:
      now: Whether not to let the newest pass. Otherwise a few may, as of an
        optimiser that leaves out such gradients; wrong data may not.
    """
    while len(self._unread) > (0 if now else _BEHIND):
      step, metrics = self._unread.popleft()
      name, said = fault_of(metrics)
      if not name:
        self._first = None
        continue
      if self._first is None:
        self._first = step, fault_error(name, f'update {step}: {said}')
      since, error = self._first
      wrong_data, newest = isinstance(error, ValueError), not self._unread
      if wrong_data or newest or step - since >= _BEHIND:
        raise error


def _turns(
    train_step: GroupStep,
    state: PlacedState,
    batches: Iterator[Batch],
    step: int,
    last: int,
    exchange: Exchange,
    distill_weight: Callable[[int], float],
) -> Iterator[StepResult]:
  teachers = placed = None
  faults, first = _Faults(), step + 1
  for batch in batches:
    held = time.perf_counter()
    weight = float(distill_weight(step))
    # No weight, no fetch: burn-in costs nothing.
    fetched = exchange.fetch(step) if weight else None
    if fetched is not teachers:
      teachers = fetched
      placed = None if fetched is None else train_step.place_teachers(fetched)
    held = time.perf_counter() - held

    state, metrics = train_step(state, batch, placed, weight)
    if placed is None:
      metrics['distill/weight'] = 0.0
    else:
      metrics['distill/weight'] = weight
    if weight:
      metrics |= exchange.metrics(step)
    step += 1

    due = exchange.due(step)
    faults.add(step, metrics)
    faults.check(due or step in (first, last))
    if due:
      variables = state.variables  # Read only now: it may be a slice.
      # The update itself is no stall: the copy would wait for it.
      jax.block_until_ready(variables)
      start = time.perf_counter()
      exchange.publish_if_due(step, variables, metrics)
      held += time.perf_counter() - start
    metrics['exchange/stall_ms'] = 1e3 * held
    yield StepResult(step, state, metrics)


def prefetch(
    stream: Stream, start: int, stop: int, ahead: int = 2
) -> Iterator[Batch]:
  """Yields `stream.batch(n)`, start <= n < stop, loaded ahead in a thread."""
  loader = concurrent.futures.ThreadPoolExecutor(1, 'load')
  steps = iter(range(start, stop))
  pending = collections.deque(
      loader.submit(stream.batch, n) for n in itertools.islice(steps, ahead)
  )
  try:
    while pending:
      batch = pending.popleft().result()
      for n in itertools.islice(steps, 1):
        pending.append(loader.submit(stream.batch, n))
      if not pending:
        # No idle thread while the caller holds on to the last result.
        loader.shutdown(wait=False)
      yield batch
  finally:
    # Without waiting, and without `cancel_futures`, which fails while the
    # interpreter shuts down.
    for future in pending:
      future.cancel()
    loader.shutdown(wait=False)
