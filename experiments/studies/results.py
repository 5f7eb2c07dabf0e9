"""What a study has measured, as the analysis sees it; numpy only.

Shape suffix: N evaluations of a run, in order.
"""

from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
  """One training of one arm, or what an ensemble of its groups would do.

  Attributes:
    arm: Its name.
    seed: Its seed; runs of one seed in different arms see the same data order.
    rate: Learning rate.
    tuning: Whether it was only there to choose the rate.
    steps_N: Updates done at each evaluation, of each group.
    loss_N: Validation loss in nats, the mean over groups.
    accuracy_N: Validation accuracy; empty for a task without it.
    examples_per_step: Of all groups together.
    flops_N: FLOPs spent until each evaluation, by all groups, with teachers.
    bytes_N: Bytes that one worker or group has received until then.
    prior_steps: Steps that had to be done before the first one: of teachers
      that were trained before, all of them together.
    prior_flops: Their FLOPs.
    diverged_at: The step at which loss or gradient were no longer finite; the
      run ends there. None if that did not happen.
    seconds: Wall time of the training, on the machine that it ran on.
  """

  arm: str
  seed: int
  rate: float
  tuning: bool
  steps_N: np.ndarray
  loss_N: np.ndarray
  accuracy_N: np.ndarray
  examples_per_step: float
  flops_N: np.ndarray
  bytes_N: np.ndarray
  prior_steps: float = 0.0
  prior_flops: float = 0.0
  diverged_at: int | None = None
  seconds: float = float('nan')


class Setting(NamedTuple):
  """What all runs of a study have in common, for the head of its page.

  Attributes:
    data: The data set, in words.
    example: What an example is: 'token', 'image', 'click'.
    rows: What a row of the group batch is: '32 tokens', or '' for an example.
    group_batch: Rows per update of one group.
    examples: In them.
    num_steps: Updates of each group.
    exchange_every: Steps between exchanges.
    replicas: R.
    model_parameters: Parameters of one model.
    model: It, in words or as configured.
    bytes_of_model: Of one publication.
    cores: CPU cores of the machine; or 0 if it has an accelerator.
    device: Its kind.
    command: What was typed.
    scale: A name in `declaration.SCALES`.
    seeds: Seeds of each arm.
    rates: The grid of learning rates.
    selection: How the rates were chosen, in words.
    minutes: Of all runs, added up.
  """

  data: str
  example: str
  rows: str
  group_batch: int
  examples: int
  num_steps: int
  exchange_every: int
  replicas: int
  model_parameters: int
  model: str
  bytes_of_model: int
  cores: int
  device: str
  command: str
  scale: str
  seeds: int
  rates: tuple[float, ...]
  selection: str
  minutes: float
