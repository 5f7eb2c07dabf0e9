"""Models as pairs of pure functions (`base.Model`)."""

from codistill_jax.models.linen import from_linen
from codistill_jax.models.lstm import language_model

__all__ = ['from_linen', 'language_model']
