"""Codistillation in JAX and Flax: the public names.

They load when they are first used, so that `codistill_jax.run_directory` and
what builds on it start without jax.
"""

import importlib

_HOMES = {
    'base': (
        'HeadOutputs',
        'Model',
        'PeerPredictions',
        'Task',
        'Teachers',
        'TrainState',
        'Updates',
        'Variables',
    ),
    'data.clicks': ('criteo_task', 'flights_task'),
    'data.images': (
        *('cifar10_task', 'digits_task', 'fashion_mnist_task'),
        *('hugging_face_images_task', 'image_folder_task'),
    ),
    'data.tables': ('table_task',),
    'data.text': ('language_model_task',),
    'data.tokenizer': ('Tokenizer',),
    'storage.resume': ('ResumeCheckpoints',),
    'exchange.plan': ('Exchange', 'NoExchange', 'Plan', 'Waiting'),
    'exchange.kinds': ('PredictionExchange',),
    'group': ('StepResult', 'run_group'),
    'losses': ('DISTILL_LOSSES',),
    'exchange.store_exchange': ('CheckpointExchange', 'memory_exchanges'),
    'one_program': ('JointUpdate', 'Population', 'SharedStream'),
    'models.linen': ('from_linen',),
    'peer_predictions': ('mixing_matrix',),
    'replicas': ('REPLICA_AXIS', 'PmapStep'),
    'schedules': ('distill_weight',),
    'run_directory': ('read_metrics',),
    'trained': ('load',),
    'step': ('init_state', 'make_eval_step', 'make_train_step'),
}
_MODULES = (
    *('base', 'baselines', 'data', 'evaluate', 'exchange', 'experiment'),
    *('group', 'losses', 'metrics', 'models', 'one_program', 'optimizers'),
    *('peer_predictions', 'replicas', 'run_directory', 'schedules'),
    *('statistics', 'step', 'trained', 'writers'),
)
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str):
  if name in _MODULES:
    return importlib.import_module(f'{__name__}.{name}')
  if name not in _HOME:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.{_HOME[name]}')
  globals()[name] = getattr(module, name)
  return globals()[name]


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
