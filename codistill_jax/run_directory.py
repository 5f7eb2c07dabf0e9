"""The run directory as a contract: every path in it, and its readers.

    <workdir>/config.gin                            operative config
    <workdir>/run.json                              the run, see `write_run`
    <workdir>/exchange/group_<i>/<step>/            publications
    <workdir>/exchange/group_<i>/restart_step.json  where a restart may begin
    <workdir>/exchange/group_<i>/reading.json       what the group reads now, of
                                                    its peers: kept until then
    <workdir>/exchange/group_<i>/lease.json         who may publish for it
    <workdir>/groups/group_<i>/checkpoints/<step>/  resume state
    <workdir>/groups/group_<i>/metrics.jsonl        see writers.JsonlWriter
    <workdir>/groups/group_<i>/tensorboard/         TensorBoard events
    <workdir>/groups/group_<i>/profile/             traces, by --profile_steps
    <workdir>/groups/group_<i>/status.json          see `write_status`
    <workdir>/groups/group_<i>/lease.json           who may train it
    <workdir>/groups/group_<i>/log.txt              its output, by train_local,
                                                    unless in an object store
    <workdir>/groups/group_<i>/DONE                 the last step was reached
    <workdir>/report/                               pages, comparison.json,
                                                    samples.json

With `--exchange_dir`, which run.json names, exchange/ lies there. In a group of
several processes the one with index n > 0 reads under the mark
`process_<n>_reading.json`; all else is written by the primary alone.

Readers work beside a live writer: a missing file is None or empty, a damaged
line is skipped and counted, a damaged JSON file is a ValueError that names it.
Nothing here imports jax, so that `experiments/status.py` starts at once.
"""

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from codistill_jax.storage.files import (
    ANY,
    NUMBER,
    PLACE,
    TEXT,
    TIME,
    VALUE,
    WHOLE,
    PathLike,
    RefusedError,
    exists,
    is_step,
    names,
    opened,
    parse_json,
    read_json,
    read_text,
    write_json,
)

# --- Paths -------------------------------------------------------------------


def config_path(workdir: PathLike) -> epath.Path:
  """Returns the path of the operative gin config, written once."""
  return epath.Path(workdir) / 'config.gin'


def run_path(workdir: PathLike) -> epath.Path:
  """Returns the path of what the run is, as JSON."""
  return epath.Path(workdir) / 'run.json'


def exchange_root(workdir: PathLike) -> epath.Path:
  """Returns the directory in which all groups publish, as run.json says."""
  try:
    elsewhere = read_run(workdir).get('exchange_dir')
  except (OSError, ValueError):
    elsewhere = None
  return epath.Path(elsewhere or epath.Path(workdir) / 'exchange')


def publications_dir(workdir: PathLike, group_id: int) -> epath.Path:
  """Returns the directory of the publications of one group."""
  return exchange_root(workdir) / f'group_{group_id}'


def groups_root(workdir: PathLike) -> epath.Path:
  """Returns the parent of all group directories."""
  return epath.Path(workdir) / 'groups'


def group_dir(workdir: PathLike, group_id: int) -> epath.Path:
  """Returns the directory of what one group writes for itself."""
  return groups_root(workdir) / f'group_{group_id}'


def metrics_path(workdir: PathLike, group_id: int) -> epath.Path:
  """Returns the path of the metrics of one group, a JSON object a line."""
  return group_dir(workdir, group_id) / 'metrics.jsonl'


def tensorboard_dir(workdir: PathLike, group_id: int) -> epath.Path:
  """Returns the directory of the TensorBoard events of one group."""
  return group_dir(workdir, group_id) / 'tensorboard'


def profile_dir(workdir: PathLike, group_id: int) -> epath.Path:
  """Returns the directory of the traces of one group."""
  return group_dir(workdir, group_id) / 'profile'


def checkpoints_dir(workdir: PathLike, group_id: int) -> epath.Path:
  """Returns the directory of the resume checkpoints of one group."""
  return group_dir(workdir, group_id) / 'checkpoints'


def status_path(workdir: PathLike, group_id: int) -> epath.Path:
  """Returns the path of the newest sign of life of one group."""
  return group_dir(workdir, group_id) / 'status.json'


def done_path(workdir: PathLike, group_id: int) -> epath.Path:
  """Returns the path that exists once the group has reached its last step."""
  return group_dir(workdir, group_id) / 'DONE'


def report_dir(workdir: PathLike) -> epath.Path:
  """Returns the directory of plots and pages made from the run."""
  return epath.Path(workdir) / 'report'


def comparison_path(
    workdir: PathLike, step: int | None = None, split: str = 'validation'
) -> epath.Path:
  """Returns the path of a final evaluation of models and ensembles, as JSON.

  A report shows the one of the newest step (None), on the validation split.
  """
  rest = [] if split == 'validation' else [split]
  rest += [] if step is None else [str(step)]
  return report_dir(workdir) / ('_'.join(['comparison', *rest]) + '.json')


def samples_path(workdir: PathLike) -> epath.Path:
  """Returns the path of what the models of a run have written, as JSON."""
  return report_dir(workdir) / 'samples.json'


def list_groups(workdir: PathLike) -> list[int]:
  """Returns the ids of the groups that have a directory, in order.

  Raises:
    FileNotFoundError: If there is no directory `workdir`.
  """
  if not names(workdir) and not os.path.isdir(workdir):
    raise FileNotFoundError(
        f'No run directory at {os.fspath(workdir)}; check --workdir.'
    )
  return sorted(_numbered(groups_root(workdir), 'group_'))


def _numbered(directory: epath.Path, prefix: str) -> list[int]:
  found = (n.removeprefix(prefix) for n in names(directory) if prefix in n)
  return [int(number) for number in found if is_step(number)]


# --- Checkpoints and publications, without orbax -----------------------------


def newest_saved(directory: PathLike) -> int | None:
  """Returns the newest finished step under a directory of steps, or None.

  A step counts once `commit_success.txt` is in it, which is written last.
  """
  directory = epath.Path(directory)
  for step in sorted(_numbered(directory, ''), reverse=True):
    if exists(directory / str(step) / 'commit_success.txt'):
      return step
  return None


# --- Facts and signs of life, as JSON -----------------------------------------


_RUN: dict[Any, Any] = {
    **dict.fromkeys(('arm', 'mode', 'example', 'data', 'command'), TEXT),
    **dict.fromkeys(('init_from', 'config_sha256'), TEXT),
    'exchange_dir': PLACE,
    **dict.fromkeys(('num_groups', 'replicas', 'group_batch'), WHOLE),
    **dict.fromkeys(('num_steps', 'burn_in_steps', 'exchange_every'), WHOLE),
    **dict.fromkeys(('model_parameters', 'prior_steps'), WHOLE),
    'configuration': [TEXT],
    'earlier': [TEXT],
    ...: ANY,
}
_STATUS: dict[Any, Any] = {
    **dict.fromkeys(('step', 'num_steps', 'num_groups', 'pid'), WHOLE),
    **dict.fromkeys(('time', 'started', 'since'), TIME),
    **dict.fromkeys(('phase', 'reason', 'host', 'last_rejection'), TEXT),
    'steps_per_sec': NUMBER,
    'rejected': WHOLE,
    'replicas': WHOLE,
    'device': TEXT,
    'peers': [WHOLE],
    'teachers': [{'peer': WHOLE, 'step': WHOLE, 'time': TIME}],
    'troubles': [
        {'doing': TEXT, 'reason': TEXT, 'since': TIME, 'count': WHOLE}
    ],
}
_COMPARISON: dict[Any, Any] = {
    'models': {...: {...: VALUE}},
    'ensembles': {...: {...: VALUE}},
    'pairs': {...: [{'a': TEXT, 'b': TEXT, ...: VALUE}]},
}


def write_run(workdir: PathLike, run: Mapping[str, Any]) -> None:
  """Writes run.json: what a report needs to know about a run.

  Args:
    workdir: The run directory.
    run: Known keys are `arm`, `num_groups`, `replicas`, `group_batch`, `seed`,
      `num_steps`, `burn_in_steps`, `exchange_every`, `mode`, `example` (what
      one example is, such as 'token'), `data`, `model_parameters`,
      `config_sha256` (of config.gin), `exchange_dir` (if it lies elsewhere) and
      `command`; and of whoever began it `device` (its kind), `host` and
      `versions` (of `python`, packages, and the `commit` of a clone); others
      are shown as they are. With fixed teachers `teacher_runs`, a list of
      `{'workdir': path, 'steps': [of each group]}`, and `prior_steps`: all
      updates that had to be done before, which belong to the cost of the run.
  """
  write_json(run_path(workdir), run, sync=True)


def read_run(workdir: PathLike) -> dict[str, Any]:
  """Reads what `write_run` wrote; empty if the run has written nothing yet.

  Raises:
    ValueError: If the file is damaged, or a value of the wrong kind.
  """
  return read_json(run_path(workdir), _RUN) or {}


def read_config(workdir: PathLike) -> str:
  """Reads config.gin as text; '' if there is none.

  Raises:
    ValueError: If it is no text, no regular file, or larger than any run's.
  """
  try:
    return read_text(config_path(workdir))
  except (FileNotFoundError, NotADirectoryError):
    return ''


def check_same_configuration(
    what: str, theirs: Sequence[str], ours: Sequence[str], remedy: str
) -> None:
  """Raises ValueError if two lists of statements differ.

  Args:
    what: Who holds the first, such as 'runs/two holds another run'.
    theirs: What is there.
    ours: What is wanted.
    remedy: What to do about it.
  """
  missing = 'no such binding'
  there = next((s for s in theirs if s not in ours), missing)
  here = next((s for s in ours if s not in theirs), missing)
  if there != here:
    raise ValueError(f'{what}: it has {there}, this one has {here}; {remedy}')


def write_status(
    workdir: PathLike, group_id: int, status: Mapping[str, Any]
) -> None:
  """Replaces the sign of life of a group.

  Args:
    workdir: The run directory.
    group_id: The group.
    status: `step`, `num_steps`, `time` and `started` (Unix seconds), `pid`,
      `host`, `phase` (starting, compiling, training, evaluating, saving; done,
      stopped, failed), `reason` (of a failure), `since` (Unix seconds of the
      last update or change of phase), `steps_per_sec`, `num_groups`; and of
      the exchange:
      `peers`: the ids of the groups that could teach this one.
      `teachers`: of those that do, a list of `{'peer': id, 'step': n, 'time':
      Unix seconds}`, the time being that of the publication.
      `rejected`: bad publications of peers, since the process began.
      `last_rejection`: which was the last of them, and why; '' if none.
      `troubles`: what fails now and is tried again, a list of `{'doing': text,
      'reason': text, 'since': Unix seconds, 'count': failures in a row}`.
      Readers do without any of them: older runs do not have all.
  """
  write_json(status_path(workdir, group_id), status)


def read_status(workdir: PathLike, group_id: int) -> dict[str, Any] | None:
  """Reads what `write_status` wrote last, or None.

  Raises:
    ValueError: If the file is damaged, or a value of the wrong kind; an object
      store or a killed writer may leave half of it.
  """
  return read_json(status_path(workdir, group_id), _STATUS)


def read_comparison(workdir: PathLike) -> dict[str, Any]:
  """Reads the final evaluation (`models`, `ensembles`, `pairs`), or nothing."""
  return read_json(comparison_path(workdir), _COMPARISON) or {}


def read_samples(workdir: PathLike) -> list[dict[str, Any]]:
  """Reads what `experiments.sample` drew last, or nothing; each has a text."""
  found = (read_json(samples_path(workdir)) or {}).get('samples')
  texts = lambda s: isinstance(s, dict) and isinstance(s.get('text'), str)
  return list(filter(texts, found if isinstance(found, list) else []))


# --- Metrics -----------------------------------------------------------------

_LONGEST_LINE = 4 << 20  # Bytes: of some 100,000 metrics.


class MetricsLog(NamedTuple):
  """The records of one metrics.jsonl.

  Attributes:
    records: In the order of the file; each has `step` and `time`, and floats
      under metric keys.
    damaged: How many whole lines were no record and were skipped.
  """

  records: list[dict[str, Any]]
  damaged: int


def parse_record(line: bytes) -> dict[str, Any] | None:
  """Parses one line of metrics.jsonl: numbers by key; None if it is damaged."""
  try:
    record = parse_json(line)
  except ValueError:
    return None
  if not isinstance(record, dict):
    return None
  step, time = record.get('step'), record.get('time', 0.0)
  if not {*map(type, record.values())} <= {float, int}:
    return None
  sound = type(step) is int and 0 <= step < 1 << 31 and TIME.test(time)
  return record if sound else None


def records(path: PathLike) -> Iterator[dict[str, Any] | None]:
  """Yields the records of a metrics.jsonl; None for each damaged line.

  What follows the last newline is being written, or was torn by a kill; it is
  left out and not counted as damage.

  Args:
    path: The file, complete or still growing; a missing one is empty.

  Raises:
    ValueError: If it is no regular file, or has a line too long for a record.
  """
  return _parsed(lines(path))


def lines(path: PathLike, start: int = 0) -> Iterator[bytes]:
  """Yields the lines of a metrics.jsonl; raises as `records`.

  Args:
    path: The file; a missing one is empty.
    start: The byte at which the first of them begins.
  """
  try:
    with opened(path) as f:
      f.seek(start)
      while line := f.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE:
          raise RefusedError(
              f'{os.fspath(path)} has a line of more than {_LONGEST_LINE} bytes'
          )
        yield line
  except (FileNotFoundError, NotADirectoryError):
    return


def _parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
  for line in lines:
    if line.strip() and line.endswith(b'\n'):
      yield parse_record(line)


def read_metrics(path: PathLike, tail_bytes: int | None = None) -> MetricsLog:
  """Reads a metrics.jsonl into memory; see `records`.

  Args:
    path: The file.
    tail_bytes: If given, read only the whole lines within that many last bytes.
  """
  found = lines(path) if tail_bytes is None else _tail(path, tail_bytes)
  parsed = list(_parsed(found))
  good = [r for r in parsed if r is not None]
  return MetricsLog(good, len(parsed) - len(good))


def _tail(path: PathLike, num_bytes: int) -> list[bytes]:
  try:
    with opened(path) as f:
      size = f.seek(0, os.SEEK_END)
      # One byte more, so that a line which starts exactly at the cut is kept.
      f.seek(max(0, size - num_bytes - 1))
      found = io.BytesIO(f.read(num_bytes + 1)).readlines()
  except (FileNotFoundError, NotADirectoryError):
    return []
  return found[1:] if size > num_bytes else found
