"""The runs of a churn study, and the files in which their predictions lie.

    <workdir>/study.json                               what the study is
    <workdir>/config.gin                               operative config
    <workdir>/labels_<split>.npy                       in the order of the split
    <workdir>/runs/<arm>/<retrain>/group_<g>_<split>.npy   probabilities
    <workdir>/runs/<arm>/<retrain>/run.json            what made them; the last
    <workdir>/report/                                  tables, page, plot

A run is done when it has its run.json; one that was killed begins again.
Nothing here imports jax.
"""

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from codistill_jax.storage import files

SPLITS = ('validation', 'test')
SINGLE = 'single'
REPEAT = 'repeat_'  # Of the arm that is trained again with the same seeds.
FIXED_INIT, FIXED_ORDER = 'fixed_init', 'fixed_order'
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]*')


class Run(NamedTuple):
  """One training: a number of groups together, or one alone.

  Attributes:
    arm: Whose retrain it is; a directory.
    retrain: Its number, from 0.
    num_groups: G.
    init: Added to the seed of the parameters.
    order: Added to the seed of the order of the training data.
    weight: Distill weight in the end; None for that of the configuration.
    config: Name of the arm's own gin file; '' for none.
  """

  arm: str
  retrain: int
  num_groups: int = 1
  init: int = 0
  order: int = 0
  weight: float | None = None
  config: str = ''

  @property
  def name(self) -> str:
    return f'{self.arm} {self.retrain}'


def codistilled(weight: float) -> str:
  """The name of the arm that codistils at a weight."""
  return f'codistilled_{weight:g}'


def weight_of(arm: str) -> float | None:
  """The distill weight in the name of an arm; None of others."""
  found = re.fullmatch(r'codistilled_(.+)', arm)
  return float(found[1]) if found else None


def plan(
    retrains: int,
    weights: Sequence[float],
    *,
    num_groups: int = 2,
    own: Mapping[str, int] | None = None,
    control_retrains: int = 3,
) -> list[Run]:
  """All runs of a study, in the order in which they are trained.

  Args:
    retrains: K of every arm. The single models are `num_groups` times as many,
      so that there are K ensembles that share no member.
    weights: Distill weights; an arm each.
    num_groups: G of the codistilled arms, and the size of an ensemble.
    own: Groups of each arm that has a gin file of its own, by name.
    control_retrains: Of the controls with one seed fixed; 0 for none.
  """
  runs = [_retrain(SINGLE, k) for k in range(num_groups * retrains)]
  runs += [Run(REPEAT + SINGLE, 0)]
  for weight in weights:
    arm = codistilled(weight)
    runs += [_retrain(arm, k, num_groups, weight) for k in range(retrains)]
  if weights:
    arm = REPEAT + codistilled(weights[0])
    runs += [Run(arm, 0, num_groups, weight=weights[0])]
  # Retrain 0 of both would be the first single model.
  controls = range(1, control_retrains)
  runs += [Run(FIXED_INIT, k, order=k) for k in controls]
  runs += [Run(FIXED_ORDER, k, init=k) for k in controls]
  # Last: each makes another configuration that of the process.
  for arm, groups in (own or {}).items():
    runs += [_retrain(arm, k, groups, config=arm) for k in range(retrains)]
  return runs


def _retrain(arm, k, num_groups=1, weight=None, config='') -> Run:
  return Run(arm, k, num_groups, k, k, weight, config)


def check_name(arm: str) -> None:
  """Raises ValueError unless an arm of one's own may be called so."""
  taken = weight_of(arm) is not None or arm.startswith(REPEAT)
  if (
      not _NAME.fullmatch(arm)
      or taken
      or arm
      in (
          SINGLE,
          FIXED_INIT,
          FIXED_ORDER,
          'ensemble',
      )
  ):
    raise ValueError(
        f'an arm cannot be called {arm!r}; use letters, digits, dots, dashes'
        ' and underscores, and none of the names of the built-in arms'
    )


# --- Files -------------------------------------------------------------------


def study_path(workdir: files.PathLike) -> epath.Path:
  """What the study is, as JSON."""
  return epath.Path(workdir) / 'study.json'


def claimed_at(workdir: files.PathLike) -> int:
  """When study.json was last written; 0 if it was not."""
  path = study_path(workdir)
  return path.stat().mtime if path.exists() else 0


def config_path(workdir: files.PathLike, config: str) -> epath.Path:
  """The operative gin configuration of the arm, or of all others for ''."""
  name = f'config_{config}.gin' if config else 'config.gin'
  return epath.Path(workdir) / name


def run_dir(workdir: files.PathLike, run: Run) -> epath.Path:
  """What one run writes."""
  return epath.Path(workdir) / 'runs' / run.arm / str(run.retrain)


def read_record(workdir: files.PathLike, run: Run) -> dict[str, Any] | None:
  """The run.json of a run; None if it is not done.

  Raises:
    ValueError: If what is there was made by another run.
  """
  path = run_dir(workdir, run) / 'run.json'
  record = files.read_json(path)
  if record is not None and record.get('run') != run._asdict():
    raise ValueError(
        f'{os.fspath(path)} was made by {record.get("run")}, this study asks'
        f' for {run._asdict()}; use another --workdir, or the first flags'
    )
  return record


def write_run(
    workdir: files.PathLike,
    run: Run,
    predictions: Sequence[Mapping[str, np.ndarray]],
    record: Mapping[str, Any],
) -> None:
  """Writes the predictions of each group by split, then run.json."""
  directory = run_dir(workdir, run)
  for group_id, by_split in enumerate(predictions):
    for split, array in by_split.items():
      path = directory / f'group_{group_id}_{split}.npy'
      files.write_bytes(path, _npy(array))
  record = {'run': run._asdict(), **record}
  files.write_json(directory / 'run.json', record)


def read_predictions(
    workdir: files.PathLike,
    arm: str,
    retrain: int,
    split: str,
    group_id: int = 0,
) -> np.ndarray:
  """What a group of a run predicts; by default the one copy that is compared.

  Never two copies of one run: they are no independent retrains.
  """
  directory = run_dir(workdir, Run(arm, retrain))
  return _load(directory / f'group_{group_id}_{split}.npy')


def read_labels(workdir: files.PathLike, split: str) -> np.ndarray:
  """The labels of a split."""
  return _load(epath.Path(workdir) / f'labels_{split}.npy')


def keep_labels(
    workdir: files.PathLike, split: str, labels: np.ndarray
) -> None:
  """Writes the labels of a split, or checks that they are still the same."""
  path = epath.Path(workdir) / f'labels_{split}.npy'
  if not path.exists() or not has_begun(workdir):
    files.write_bytes(path, _npy(labels))
  if not np.array_equal(_load(path), labels):
    raise ValueError(
        f'the {split} split is not the one of {os.fspath(workdir)}: its labels'
        ' differ; use another --workdir'
    )


def has_begun(workdir: files.PathLike, config: str = '') -> bool:
  """Whether a run is done: until then all may still be corrected.

  Args:
    workdir: The study's.
    config: Ask for the runs of this arm's own configuration; '': for all runs.
  """
  return any(
      not config or record['run']['config'] == config
      for _, _, record in done(workdir)
  )


def done(workdir: files.PathLike) -> Iterator[tuple[str, int, dict[str, Any]]]:
  """Arm, retrain and record of all runs that are done, in order."""
  root = epath.Path(workdir) / 'runs'
  for arm in sorted(p.name for p in root.iterdir()) if root.exists() else ():
    numbers = [p.name for p in (root / arm).iterdir() if p.name.isdecimal()]
    for retrain in sorted(map(int, numbers)):
      record = files.read_json(root / arm / str(retrain) / 'run.json')
      if record is not None:
        yield arm, retrain, record


def _npy(array: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  np.save(buffer, array, allow_pickle=False)
  return buffer.getvalue()


def _load(path: epath.Path) -> np.ndarray:
  data = path.read_bytes()
  try:
    return np.load(io.BytesIO(data), allow_pickle=False)
  except (ValueError, EOFError) as e:
    raise ValueError(
        f'{os.fspath(path)} is damaged ({e}); delete it, and the run.json'
        ' beside it, if any, and both are made again'
    ) from e


def own_cores() -> int:
  """The cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
