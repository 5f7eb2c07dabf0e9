"""Trains all groups of a run in this process, as `train_lockstep` does."""

import signal

from codistill_jax import gin_utils
from experiments.running import driver, watch
from experiments.running import job as job_lib
from experiments.running.job import Job


class StopAt:
  """Asked to stop before a certain round of updates; None: never."""

  def __init__(self, rounds=None):
    self._rounds = rounds
    self.unsaved, self.last_words = {}, {}

  @property
  def signal_number(self):
    if self._rounds is None:
      return None
    self._rounds -= 1
    return signal.SIGTERM if self._rounds < 0 else None

  def __call__(self):
    return True

  def put_off(self):
    pass


def jobs_of(experiment, model, steps, workdir, stop=None, stream=None):
  """One for each step."""
  return [
      Job(
          experiment=experiment,
          model=model,
          train_step=step,
          workdir=str(workdir),
          group_id=group_id,
          num_groups=len(steps),
          stop=stop or StopAt(),
          shared_stream=stream,
      )
      for group_id, step in enumerate(steps)
  ]


def train(experiment, model, steps, workdir, stop_after=None, stream=None):
  """Trains a group with each step, to the end or for so many rounds."""
  gin_utils.parse([])
  latch = job_lib.Latch(StopAt(stop_after))
  jobs = jobs_of(experiment, model, steps, workdir, latch, stream)
  job_lib.keep_common_checkpoints(jobs)
  start = driver.new_state(jobs[0])
  exchanges = experiment.exchange.join_all(
      jobs[0], start.state.variables, start.examples
  )
  groups = [
      driver.train(
          job,
          lambda variables, exchange=exchange: exchange,
          watch.group_writer(job, progress=False),
      )
      for job, exchange in zip(jobs, exchanges)
  ]
  job_lib.train_in_turn(groups, latch)
