"""The studies by name; each a declaration in a file of its name."""

import importlib

STUDIES = {
    name: importlib.import_module(f'{__name__}.{name}').STUDY
    for name in (
        *('sgd_scaling', 'async_sgd', 'lm_codistillation'),
        *('offline_distillation', 'data_partition', 'staleness'),
        *('image_codistillation', 'churn', 'communication', 'topology', 'map'),
        'factors',
    )
}
