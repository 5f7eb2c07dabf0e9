"""Steps and wall time to the target against workers; dashed on paper."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from experiments import report_style
from experiments.report_style import Plot
from experiments.studies import latency, latency_view
from experiments.studies.latency import Crossover, Fit, Latency
from experiments.studies.latency_view import Measured
from experiments.studies.results import Setting

_ONE = {'color': '#D55E00', 'lw': 1.6}
_TWO = {'color': '#0072B2', 'lw': 1.6}
_PAPER = {'ls': (0, (4, 2))}
_CAPTION = (
    'Left: steps to the target of each group, as measured (points) and by the'
    ' fit (dashed). Right: the same steps times the expected time of an update,'
    ' by the assumptions below; dashed is on paper. Both axes are logarithmic;'
    ' workers are those of all groups together.'
)


def make_plot(
    measured: Measured,
    fit: Fit,
    assumed: Latency,
    setting: Setting,
    crossing: Crossover | None,
) -> Plot:
  """Two panels over the number of workers in all."""
  with report_style.look():
    figure, (left, right) = report_style.figure_of(2)
    _steps(left, measured, fit, assumed)
    _times(right, measured, fit, assumed, setting)
    for ax in (left, right):
      _axis(ax)
    handles = [
        Line2D([], [], label='one group', marker='o', ms=5, **_ONE),
        Line2D([], [], label='on paper', color='#555555', **_PAPER),
    ]
    if measured.two:
      handles.insert(
          1, Line2D([], [], label='two groups', marker='s', ms=5, **_TWO)
      )
    caption = _CAPTION
    if crossing is not None and crossing.first is not None:
      right.axvline(2 * crossing.first, color='#555555', lw=1, ls=(0, (2, 2)))
      label = 'two groups faster'
      style = {'color': '#555555', 'lw': 1, 'ls': (0, (2, 2))}
      handles.append(Line2D([], [], label=f'{label} from here', **style))
    report_style.legend_below(figure, handles)
    png = report_style.save(figure)
  return Plot('latency', 'Wall time, on paper', caption, png)


def _steps(ax: Axes, measured: Measured, fit: Fit, assumed: Latency) -> None:
  ax.set_title('Steps to target')
  ax.set_ylabel('steps to target')
  workers = np.array(latency_view.doublings(measured, assumed))
  ax.plot(workers, [fit.steps(w) for w in workers], **_ONE, **_PAPER)
  _points(ax, 'o', list(measured.one), list(measured.one.values()), _ONE)
  two = [2 * w for w in measured.two]
  _points(ax, 's', two, list(measured.two.values()), _TWO)
  if measured.at:
    steps = [measured.ratio * fit.steps(w / 2) for w in workers]
    ax.plot(workers, steps, **_TWO, **_PAPER)


def _times(
    ax: Axes,
    measured: Measured,
    fit: Fit,
    assumed: Latency,
    setting: Setting,
) -> None:
  ax.set_title('Wall time to target')
  ax.set_ylabel('time (median steps of a worker)')
  size = setting.bytes_of_model
  time = lambda w: latency.step_time(assumed, w, size)
  workers = latency_view.doublings(measured, assumed)
  times = [fit.steps(w) * time(w) for w in workers]
  ax.plot(workers, times, **_ONE, **_PAPER)
  walls = [steps * time(w) for w, steps in measured.one.items()]
  _points(ax, 'o', list(measured.one), walls, _ONE)
  if measured.at:
    _points(ax, 's', *latency_view.measured_two(measured, assumed, size), _TWO)
    halves = [w // 2 for w in workers if w % 2 == 0]
    times = [
        measured.ratio
        * fit.steps(w)
        * latency.step_time(assumed, w, size, measured.compute)
        for w in halves
    ]
    ax.plot([2 * w for w in halves], times, **_TWO, **_PAPER)


def _points(ax: Axes, marker: str, x: list, y: list, style: dict) -> None:
  ax.plot(x, y, marker=marker, ms=5, **style)


def _axis(ax: Axes) -> None:
  ax.set_xscale('log', base=2)
  ax.set_yscale('log')
  ax.set_xlabel('workers in all')
  ax.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
  ax.xaxis.set_major_formatter('{x:,.0f}')
  ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=30))
  ax.yaxis.set_major_formatter('{x:,.0f}')
  ax.yaxis.set_minor_locator(NullLocator())
