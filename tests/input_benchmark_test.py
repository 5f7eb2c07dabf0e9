"""The benchmark of input speed runs, and its table is complete."""

import json
import pathlib
import subprocess

from benchmarks import input as input_benchmark

ROOT = pathlib.Path(__file__).parents[1]


def test_a_pipeline_is_measured_against_a_need(python):
  command = [python, '-m', 'benchmarks.input', '--only=digits', '--nostep']
  command += ['--seconds=0.01', '--repeats=2', '--need=100']
  done = subprocess.run(
      command, cwd=ROOT, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout)
  (result,) = found['results']
  assert not found['skipped'] and found['load'] >= 0
  assert result['name'] == 'digits' and result['batch'] == 64
  assert result['per_sec'] > 0 and result['cores_needed'] > 0
  assert abs(result['share_of_need'] * 100 / result['per_sec'] - 1) < 0.01
  header, row = done.stderr.splitlines()[-2:]
  assert header.split()[0] == 'name' and row.split()[0] == 'digits'


def test_every_pipeline_has_a_configuration():
  for pipeline in input_benchmark.PIPELINES:
    assert (ROOT / 'gin_configs' / 'tasks' / pipeline.config).is_file()
