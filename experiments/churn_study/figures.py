"""Rows of figures, one per arm, from predictions; no jax.

Shape suffixes: N examples, K retrains.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from codistill_jax import statistics
from codistill_jax.statistics import Estimate

# What is measured, by key: title, and whether of each retrain or of each pair.
TITLES = {
    'log_loss': 'log loss',
    'error': 'error',
    'churn': 'mean absolute difference between retrains',
    'relative': 'relative difference',
    'disagreement': 'disagreement',
}


class Row(NamedTuple):
  """One arm.

  Attributes:
    arm: Its name in files.
    title: Its name for people.
    retrains: K.
    figures: By key of `TITLES`; without those that cannot be had.
    change: Of the churn against the baseline's; None for the baseline.
  """

  arm: str
  title: str
  retrains: int
  figures: Mapping[str, Estimate]
  change: Estimate | None


def summarise(
    arms: Mapping[str, Sequence[np.ndarray]],
    labels: np.ndarray | None,
    titles: Mapping[str, str] | None = None,
    baseline: str | None = None,
) -> list[Row]:
  """A row for each arm.

  Args:
    arms: By name, the predictions of its K >= 2 independent retrains.
    labels: (N,), or None.
    titles: Names for people.
    baseline: The arm whose churn is that of 100 %; default: the first.

  Raises:
    ValueError: What `statistics.measure` raises, with the name of the arm.
  """
  measured = {}
  for name, predictions in arms.items():
    try:
      measured[name] = statistics.measure(predictions, labels)
    except ValueError as e:
      raise ValueError(f'{name}: {e}') from e
  baseline = baseline or next(iter(arms))
  base_KK = measured[baseline].churn_KK
  return [
      Row(
          arm=name,
          title=(titles or {}).get(name, name),
          retrains=len(m.churn_KK),
          figures=_figures(m),
          change=(
              None
              if name == baseline
              else statistics.change_of_churn(m.churn_KK, base_KK)
          ),
      )
      for name, m in measured.items()
  ]


def _figures(measured: statistics.Measured) -> dict[str, Estimate]:
  per_retrain = {'log_loss': measured.log_loss_K, 'error': measured.error_K}
  per_pair = {
      'churn': measured.churn_KK,
      'relative': measured.relative_KK,
      'disagreement': measured.disagreement_KK,
  }
  figures = {
      key: statistics.mean_over_retrains(values)
      for key, values in per_retrain.items()
      if values is not None
  }
  return figures | {
      key: statistics.mean_over_pairs(values)
      for key, values in per_pair.items()
      if values is not None
  }
