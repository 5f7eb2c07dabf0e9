"""What is in deploy/ is well formed, and says what train_group understands."""

import copy
import re
import sys

import jsonschema
import pytest
import run_cases
import tiny_run
import yaml

from experiments import launch

ROOT = tiny_run.ROOT
MANIFEST = yaml.safe_load(
    (ROOT / 'deploy' / 'kubernetes' / 'jobset.yaml').read_text()
)
RECIPE = (ROOT / 'deploy' / 'slurm' / 'groups.sbatch').read_text()


def _object(required='', **properties):
  return {
      'type': 'object',
      'properties': properties,
      'required': required.split(),
      'additionalProperties': False,
  }


def _list(items):
  return {'type': 'array', 'items': items, 'minItems': 1}


def _one_of(*values):
  return {'enum': list(values)}


_TEXT = {'type': 'string'}
_COUNT = {'type': 'integer', 'minimum': 0}
_TEXTS = _list(_TEXT)
_NAME = {'type': 'string', 'pattern': '^[a-z]([a-z0-9-]*[a-z0-9])?$'}
_AMOUNTS = {
    'type': 'object',
    'additionalProperties': {'type': ['string', 'integer']},
}
# The fields used here and their neighbours, of jobset.x-k8s.io/v1alpha2 (the
# definition that JobSet publishes, with batch/v1 Jobs inside) and of v1 pods.
_ENV = _object(
    'name',
    name=_TEXT,
    value=_TEXT,
    valueFrom=_object(fieldRef=_object('fieldPath', fieldPath=_TEXT)),
)
_CONTAINER = _object(
    'name',
    name=_NAME,
    image=_TEXT,
    command=_TEXTS,
    args=_TEXTS,
    env=_list(_ENV),
    resources=_object(limits=_AMOUNTS, requests=_AMOUNTS),
    volumeMounts=_list(
        _object('name mountPath', name=_NAME, mountPath=_TEXT, readOnly={})
    ),
    workingDir=_TEXT,
)
_POD = _object(
    'containers',
    containers=_list(_CONTAINER),
    restartPolicy=_one_of('Never', 'OnFailure'),
    terminationGracePeriodSeconds=_COUNT,
    nodeSelector={'type': 'object'},
    serviceAccountName=_TEXT,
    volumes=_list(
        _object(
            'name',
            name=_NAME,
            persistentVolumeClaim=_object('claimName', claimName=_TEXT),
        )
    ),
)
_POD_FAILURE = _object(
    'action',
    action=_one_of('FailJob', 'FailIndex', 'Ignore', 'Count'),
    onExitCodes=_object(
        'operator values',
        containerName=_TEXT,
        operator=_one_of('In', 'NotIn'),
        values=_list({'type': 'integer'}),
    ),
    onPodConditions=_list(
        _object('type', type=_TEXT, status=_one_of('True', 'False', 'Unknown'))
    ),
)
_JOB = _object(
    'template',
    template=_object('spec', metadata={}, spec=_POD),
    parallelism=_COUNT,
    completions=_COUNT,
    completionMode=_one_of('Indexed', 'NonIndexed'),
    backoffLimit=_COUNT,
    podFailurePolicy=_object('rules', rules=_list(_POD_FAILURE)),
    podReplacementPolicy=_one_of('Failed', 'TerminatingOrFailed'),
)
_JOB_FAILURE = _object(
    'action name',
    name={
        'type': 'string',
        'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$',
    },
    action=_one_of(
        *('FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts'),
        *('RestartJob', 'RestartJobAndIgnoreMaxRestarts'),
    ),
    onJobFailureReasons=_TEXTS,
    targetReplicatedJobs=_TEXTS,
)
_REPLICATED = _object(
    'name template',
    name=_NAME,
    replicas=_COUNT,
    template=_object('spec', metadata={}, spec=_JOB),
)
JOBSET = _object(
    'apiVersion kind metadata spec',
    apiVersion=_one_of('jobset.x-k8s.io/v1alpha2'),
    kind=_one_of('JobSet'),
    metadata=_object(
        'name', name=_NAME, namespace=_NAME, labels={}, annotations={}
    ),
    spec=_object(
        replicatedJobs=_list(_REPLICATED),
        failurePolicy=_object(
            maxRestarts=_COUNT,
            restartStrategy=_one_of(
                'Recreate', 'BlockingRecreate', 'InPlaceRestart'
            ),
            rules=_list(_JOB_FAILURE),
        ),
        network=_object(enableDNSHostnames={}, subdomain=_NAME),
    ),
)


def _places(tree, path=()):
  """All places of a manifest: each key of an object, by its path."""
  for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
    if isinstance(tree, dict):
      yield *path, key
    if isinstance(value, dict | list):
      yield from _places(value, (*path, key))


def test_the_jobset_is_one_and_a_misspelled_key_is_none():
  """Wherever it is, but among the names of resources, which are anybody's."""
  jsonschema.validate(MANIFEST, JOBSET)
  places = [p for p in _places(MANIFEST) if 'limits' not in p[:-1]]
  assert len(places) > 40
  for *above, key in places:
    spoiled = copy.deepcopy(MANIFEST)
    tree = spoiled
    for step in above:
      tree = tree[step]
    tree[f'{key}s'] = tree.pop(key)
    with pytest.raises(jsonschema.ValidationError):
      jsonschema.validate(spoiled, JOBSET)


def test_the_jobset_restarts_one_group_and_numbers_all():
  (group,) = MANIFEST['spec']['replicatedJobs']
  job = group['template']['spec']
  (container,) = job['template']['spec']['containers']
  flags = dict(x.removeprefix('--').split('=', 1) for x in container['args'])
  assert int(flags['num_groups']) == group['replicas']
  assert int(flags['num_processes']) == job['parallelism'] == job['completions']
  name = MANIFEST['metadata']['name']
  assert flags['coordinator'].startswith(
      f'{name}-{group["name"]}-$(GROUP)-0.{name}:'
  )
  # Each failed pod is made again by its Job, but after a clear error; a Job
  # that gives up starts again alone.
  rules = job['podFailurePolicy']['rules']
  assert rules[0]['onExitCodes']['values'] == [1]
  assert [rule['action'] for rule in rules] == ['FailJob', 'Ignore']
  (rule,) = MANIFEST['spec']['failurePolicy']['rules']
  assert rule['action'] == 'RestartJob'
  assert 'onJobFailureReasons' not in rule  # For whatever reason.


def test_both_recipes_are_short_and_every_line_is_explained():
  page = (ROOT / 'docs' / 'cluster.md').read_text()
  for text in (RECIPE, (ROOT / 'deploy/kubernetes/jobset.yaml').read_text()):
    assert len(text.splitlines()) < 60
  explained = re.findall(r'#SBATCH (--[\w-]+)', RECIPE)
  keys = {p[-1] for p in _places(MANIFEST['spec']) if 'limits' not in p[:-1]}
  # Of Kubernetes itself, and what stands beside the name of its value.
  keys -= {'name', 'type', 'status', 'template', 'spec', 'rules', 'fieldRef'}
  for word in (*explained, *keys):
    assert word in page, word


def test_launch_says_what_it_lacks(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'submitit', None)
  status, output = run_cases.run(launch, [f'--workdir={tmp_path}'])
  assert status == 1 and len(output.splitlines()) == 1
  assert "submitit is missing; pip install 'codistill_jax[launch]'" in output
