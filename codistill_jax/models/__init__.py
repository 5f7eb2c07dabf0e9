"""Models as pairs of pure functions (`base.Model`)."""

import importlib

from codistill_jax.models.linen import from_linen
from codistill_jax.models.lstm import language_model

_MODULES = ['dnn', 'linen', 'lstm', 'resnet', 'transformer']

__all__ = [*_MODULES, 'from_linen', 'language_model']


def __getattr__(name: str):
  if name in _MODULES:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
