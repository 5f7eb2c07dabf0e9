"""Further figures of a study, by the names in its declaration.

'latency' wall time from a tail-latency model; 'bytes' loss against bytes
received; 'topology', 'staleness' and every other study with `x_label` measures
against it; 'speed-accuracy' accuracy beside loss, among the curves.
"""

from experiments.report_pages import Block, Bullets, Heading, Paragraph, Table
from experiments.studies import axis_plot, bytes_view, communication
from experiments.studies.analysis import Analysis
from experiments.studies.latency import Latency
from experiments.studies.results import Setting

NAMES = ('bytes', 'latency', 'speed-accuracy', 'staleness', 'topology')


def blocks(found: Analysis, setting: Setting, latency: Latency) -> list[Block]:
  """All views of the study, in a fixed order.

  Raises:
    ValueError: If the study names one that does not exist.
  """
  for name in found.study.views:
    if name not in NAMES:
      raise ValueError(
          f'No view {name!r} for {found.study.name}; there are'
          f' {", ".join(NAMES)}.'
      )
  made = []
  plot = axis_plot.make_plot(found, setting)
  if plot is not None:
    made += [Heading(plot.title), plot]
  if 'bytes' in found.study.views:
    made += _bytes(found, setting)
  if 'latency' in found.study.views:
    from experiments.studies import latency_view

    made += latency_view.blocks(found, setting, latency)
  return made


def _bytes(found: Analysis, setting: Setting) -> list[Block]:
  plot = bytes_view.make_plot(found, setting)
  if plot is None:
    return []
  header, rows = bytes_view.equal_bytes(found)
  return [
      Heading(plot.title),
      plot,
      Table(header, rows, names=1),
      Paragraph(
          'Smoothed validation loss, mean over seeds, at the last evaluation'
          ' within so many bytes; each column is what one of the arms has'
          ' received in all. A dash: more than that by the first evaluation.'
      ),
      Bullets(communication.FORMULAS),
  ]
