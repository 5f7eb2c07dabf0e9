"""Keeps orbax from printing what it also raises.

Where one array of several cannot be read or written, orbax logs the traceback
in each of its threads, then raises; it closes its event loop while the work on
the other arrays still reports to it, which prints 'Event loop is closed'; and
it leaves tasks behind that failed as well, of which asyncio complains (2026-11,
orbax 0.12). On a full disk that is a hundred lines at every try.
"""

import contextlib
import logging
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

_lock = threading.Lock()
_calls: list[threading.Thread] = []


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """No tracebacks by orbax about what it raises in this block."""
  logger = logging.getLogger('absl')  # Where orbax logs.
  with _lock:
    if not _calls:
      logger.addFilter(_is_news)
    _calls.append(threading.current_thread())
  try:
    yield
  except BaseException:
    _ignore_what_comes_later()
    raise
  finally:
    with _lock:
      _calls.remove(threading.current_thread())
      if not _calls:
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
  raised_as_well = '_SignalingThread.run() raised' in str(record.msg)
  return not (raised_as_well and record.exc_info)


def _ignore_what_comes_later() -> None:
  """From now on: the rest of the work reports after the call has failed."""
  with _lock:
    logging.getLogger('asyncio').addFilter(_is_not_of_orbax)
    if not isinstance(sys.unraisablehook, _Hook):
      sys.unraisablehook = _Hook(sys.unraisablehook)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  text = record.getMessage()
  return 'exception was never retrieved' not in text or '/orbax/' not in text


class _Hook:
  """Passes on all but reports to a closed event loop."""

  def __init__(self, passed_on: Any):
    self._passed_on = passed_on

  def __call__(self, unraisable: Any) -> None:
    if not (
        isinstance(unraisable.exc_value, RuntimeError)
        and str(unraisable.exc_value) == 'Event loop is closed'
        and _in_a_report(unraisable.exc_traceback)
    ):
      self._passed_on(unraisable)


def _in_a_report(traceback: types.TracebackType | None) -> bool:
  return (
      traceback is not None
      and traceback.tb_frame.f_code.co_name == 'call_soon_threadsafe'
  )
