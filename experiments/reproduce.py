r"""The figures and the table of the paper, in miniature or at full size.

    python -m experiments.reproduce --study=lm_codistillation --scale=cpu \
        --jobs=2

Trains the arms of a study over seeds, and makes a page of it: the paper's
claim, what came out, and whether that agrees. Stopped or killed, the same
command goes on where it was. `--list` shows what there is.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from codistill_jax import gin_utils
from codistill_jax.storage import files

from . import cli
from .studies import costs, retrains, worker
from .studies import study_plan as plan_lib
from .studies.catalogue import STUDIES
from .studies.costs import Latency
from .studies.study_plan import SCALES, Study

_FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this binary."""
  gin_utils.define_flags()
  worker.define_flags()
  flags.DEFINE_enum('study', None, sorted(STUDIES), 'Which study.')
  flags.DEFINE_enum(
      'scale',
      'cpu',
      list(SCALES),
      'How large: smoke (seconds; no result), cpu (two cores, an hour at most),'
      ' gpu (one accelerator), paper (a cluster).',
  )
  flags.DEFINE_bool('list', False, 'Print the studies and stop.')
  flags.DEFINE_integer(
      'seeds', None, 'Seeds of each arm; default: as the scale says.'
  )
  flags.DEFINE_integer(
      'worker_rows',
      None,
      'Rows of the group batch for each worker; default: as the scale says.',
  )
  flags.DEFINE_list(
      'rates', None, 'Grid of learning rates; default: as the scale says.'
  )
  flags.DEFINE_list(
      'arms', [], 'Arms to train, with those that they need; default: all.'
  )
  flags.DEFINE_enum(
      'one_program',
      'auto',
      ['auto', 'yes', 'no'],
      'Whether all seeds of an arm are trained as one program; auto: on an'
      ' accelerator, where that is faster.',
  )
  cli.define_path(
      'step_times',
      None,
      'File with measured step times of one worker, a number a line, for the'
      ' wall time of sgd_scaling; default: log-normal, see --tail.',
  )
  flags.DEFINE_float(
      'tail',
      Latency().tail,
      '99th percentile of the step times of a worker over their median, if'
      ' there is no --step_times.',
  )
  flags.DEFINE_list(
      'all_reduce',
      [str(Latency().alpha), str(Latency().model_time)],
      'What an all-reduce takes, in median steps: its fixed time, and the time'
      ' in which a worker receives as many bytes as one model has.',
  )
  flags.DEFINE_bool(
      'report_only', False, 'Train nothing; make the page of what is there.'
  )


def main(argv: Sequence[str]) -> None:
  """Trains and reports."""
  del argv
  if _FLAGS.list:
    _print_studies()
    return
  plan = _plan()
  if plan.study.predictions:
    worker.refuse(
        ('rates', 'one_program', 'step_times', 'tail', 'all_reduce'),
        f'would act nowhere in the study {plan.study.name}',
    )
  _latency()  # Raises now rather than after the training.
  default = f'runs/{_FLAGS.study}_{_FLAGS.scale}'
  workdir = _FLAGS.workdir or files.absolute(default)
  if not _FLAGS.report_only:
    worker.train(cli.module_of('reproduce'), workdir, plan, _FLAGS.one_program)
  if not _FLAGS.worker:
    _report(workdir, plan)


def _plan() -> plan_lib.StudyPlan:
  """Returns the plan of the study that the flags name.

  Raises:
    ValueError: If they do not fit.
  """
  if _FLAGS.study is None:
    raise ValueError(
        f'give --study, one of {", ".join(sorted(STUDIES))}; --list tells more'
    )
  worker.check_least(seeds=1, worker_rows=1)
  return _make_plan(
      STUDIES[_FLAGS.study],
      _FLAGS.scale,
      gin_files=gin_utils.flag_values()[0],
      seeds=_FLAGS.seeds,
      rates=_FLAGS.rates and worker.positive('rates', 'learning rate'),
      worker_rows=_FLAGS.worker_rows,
      arms=_FLAGS.arms,
  )


def _make_plan(study: Study, scale: str, **flags: Any) -> plan_lib.StudyPlan:
  plan = plan_lib.make_plan(study, scale, **flags)
  if not study.predictions:
    return plan
  controls = min(retrains.CONTROL_RETRAINS, plan.scale.seeds)
  return retrains.with_controls(plan, controls)


def _latency() -> Latency:
  """Returns what the flags say of step times and all-reduces."""
  if not 1 <= _FLAGS.tail < float('inf'):
    raise ValueError(f'--tail={_FLAGS.tail:g}; set it to 1 or more')
  sample = ()
  if path := _FLAGS.step_times:
    try:
      words = pathlib.Path(path).read_text().split()
      sample = costs.sampled(list(map(float, words)))
    except (OSError, ValueError) as e:
      said = getattr(e, 'strerror', None) or e
      raise ValueError(f'--step_times={path}: {said}') from e
  try:
    alpha, model_time = map(float, _FLAGS.all_reduce)
  except ValueError:
    alpha = model_time = -1.0
  if not (alpha >= 0 and model_time >= 0):
    raise ValueError(
        f'--all_reduce={",".join(_FLAGS.all_reduce)}; expected two numbers of'
        ' at least 0, such as --all_reduce=0.05,0.05'
    )
  return Latency(_FLAGS.tail, sample, alpha, model_time)


def _report(workdir: str, plan: plan_lib.StudyPlan) -> None:
  from .studies import churn_page, outcomes, study_page

  output = _FLAGS.output or os.path.join(workdir, 'report')
  if plan.study.predictions:
    found = retrains.load_study(workdir)
    churn_page.report(found, output, _FLAGS.note, plan.study)
    return
  settings, runs = outcomes.load(workdir, plan)
  study = plan.study
  if _FLAGS.note:
    study = study._replace(notes=(_FLAGS.note, *study.notes))
  study_page.report(study, settings, runs, output, _latency())


def _print_studies() -> None:
  for study in STUDIES.values():
    cli.tell(f'{study.name}: {study.question} ({study.source})')
    for scale in study.scales:
      plan = _make_plan(study, scale)
      runs = plan.runs()
      cli.tell(
          f'  {scale}: {len(plan.study.arms)} arms, {plan.scale.seeds} seeds,'
          f' {len(runs)} runs'
      )


if __name__ == '__main__':
  define_flags()
  cli.run(main)
