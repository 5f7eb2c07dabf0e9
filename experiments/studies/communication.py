"""Bytes that a worker or group receives per update, by pattern.

A pure function of what is exchanged, see 'formulas' in `words.jinja`; nothing
is measured here. Gradients are as many bytes as parameters. A ring passes each
of W parts on 2 (W - 1) times, W - 1 to add up and W - 1 to hand round
(Patarasuk & Yuan 2009). An update of a server is the work of one worker.
"""

PATTERNS = ('none', 'all_reduce', 'exchange', 'outer', 'server')


def bytes_per_update(
    pattern: str,
    parameter_bytes: float,
    *,
    workers: int = 1,
    exchange_every: int = 1,
    peers: int = 1,
    outer_every: int = 1,
) -> float:
  """Returns bytes received per update, averaged over an interval.

  Args:
    pattern: One of `PATTERNS`.
    parameter_bytes: b, of one set of parameters or gradients.
    workers: W, of one group.
    exchange_every: n, updates between exchanges.
    peers: P, publications that a group fetches at each.
    outer_every: H, updates between outer steps.

  Raises:
    ValueError: If there is no such pattern, or a number makes no sense.
  """
  _check(pattern, parameter_bytes, workers, exchange_every, peers, outer_every)
  match pattern:
    case 'all_reduce':
      return all_reduce_bytes(parameter_bytes, workers)
    case 'exchange':
      fetched = peers * parameter_bytes / exchange_every
      return fetched + all_reduce_bytes(parameter_bytes, workers)
    case 'outer':
      return all_reduce_bytes(parameter_bytes, workers) / outer_every
    case 'server':
      return 2.0 * parameter_bytes
  return 0.0


def all_reduce_bytes(parameter_bytes: float, workers: int) -> float:
  """Returns what each worker of a ring receives in one all-reduce."""
  return 2.0 * (workers - 1) / workers * parameter_bytes


def _check(pattern, parameter_bytes, workers, exchange_every, peers, outer):
  if pattern not in PATTERNS:
    raise ValueError(
        f'No pattern of communication {pattern!r}; there are'
        f' {", ".join(PATTERNS)}.'
    )
  least = {
      'parameter_bytes': (parameter_bytes, 0),
      'workers': (workers, 1),
      'exchange_every': (exchange_every, 1),
      'peers': (peers, 0),
      'outer_every': (outer, 1),
  }
  for name, (value, low) in least.items():
    if value < low:
      raise ValueError(f'Expected {name} to be at least {low}, got {value}.')
