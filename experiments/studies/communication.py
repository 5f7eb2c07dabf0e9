"""Bytes that a worker or group receives per update, by pattern.

A pure function of what is exchanged, see 'formulas' in `words.jinja`; nothing
is measured here. Gradients are as many bytes as parameters.
"""

PATTERNS = ('none', 'all_reduce', 'exchange', 'outer', 'server')


def bytes_per_update(
    pattern: str,
    parameter_bytes: float,
    *,
    workers: int = 1,
    outer_every: int = 1,
) -> float:
  """Returns bytes received per update; publications of peers come besides.

  Args:
    pattern: One of `PATTERNS`.
    parameter_bytes: b, of one set of parameters or gradients.
    workers: W, of one group.
    outer_every: H, updates between outer steps.

  Raises:
    ValueError: If there is no such pattern.
  """
  match pattern:
    case 'none':
      return 0.0
    case 'all_reduce' | 'exchange':
      return all_reduce_bytes(parameter_bytes, workers)
    case 'outer':
      return all_reduce_bytes(parameter_bytes, workers) / outer_every
    case 'server':  # An update is the work of one worker, whatever W.
      return 2.0 * parameter_bytes
  raise ValueError(
      f'No pattern of communication {pattern!r}; there are'
      f' {", ".join(PATTERNS)}.'
  )


def all_reduce_bytes(parameter_bytes: float, workers: int) -> float:
  """Returns what each worker of a ring receives in one all-reduce.

  A ring passes each of W parts on 2 (W - 1) times, W - 1 to add up and W - 1 to
  hand round (Patarasuk & Yuan 2009).
  """
  return 2.0 * (workers - 1) / workers * parameter_bytes
