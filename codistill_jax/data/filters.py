"""Filters of documents: text -> text, or a Reject that says why not.

One string names a filter and its parameters, as in the flag --filter:

  english
  english:min_probability=0.9
  long_paragraphs:min_characters=400,min_words=50

Filters are applied in the order given; each sees what the one before it left.
To add one, write a function and name it in `FILTERS`: keyword arguments are its
parameters, their defaults say of which type.
"""

import functools
import inspect
from collections.abc import Callable, Sequence

from codistill_jax.data.records import Record, Reject

Filter = Callable[[str], Record]


def english(
    text: str, *, min_probability: float = 0.5, max_characters: int = 4000
) -> Record:
  """Keeps documents in English; the others are 'not_english'.

  The language is identified by `py3langid` (a naive Bayes classifier over byte
  n-grams, Lui & Baldwin 2012; 97 languages; its model is in the package, and
  nothing is loaded from the network). Chosen over `lingua`, which is as good on
  whole pages, and takes ten times as long and 96 MB.

  The paper says that its set is English, and not how that was found.

  Args:
    text: The document.
    min_probability: Of English, among all languages, by the classifier.
    max_characters: The classifier reads so much of the beginning; more makes no
      difference to a page in one language, and takes longer.
  """
  language, probability = _identifier().classify(text[:max_characters])
  if language == 'en' and probability >= min_probability:
    return text
  return Reject('not_english')


def long_paragraphs(
    text: str, *, min_characters: int = 200, min_words: int = 0
) -> Record:
  """Keeps the long paragraphs of a document; one without is 'short'.

  A paragraph is a line, as WET files have them. Menus, headings and captions
  are short lines; running text makes long ones. The paper says that its set has
  long paragraphs only, and not how long: the bounds here are a choice.

  Args:
    text: The document.
    min_characters: That a paragraph has at least, without white space around.
    min_words: That it has at least, separated by white space.
  """
  kept = [
      line
      for line in text.split('\n')
      if len(line.strip()) >= min_characters and len(line.split()) >= min_words
  ]
  result = '\n'.join(kept)
  return result if result.strip() else Reject('short')


FILTERS = {'english': english, 'long_paragraphs': long_paragraphs}


def parse(spec: str) -> Filter:
  """Returns the filter that `spec` names; can be pickled.

  Raises:
    ValueError: If there is no such filter or parameter, or a value is not of
      the parameter's type.
  """
  name, _, rest = spec.partition(':')
  if name not in FILTERS:
    raise ValueError(
        f'There is no filter {name!r}; there are {", ".join(FILTERS)}.'
    )
  parameters = _defaults(name)
  for setting in filter(None, rest.split(',')):
    key, _, value = setting.partition('=')
    if key not in parameters:
      raise ValueError(
          f'The filter {name} has no parameter {key!r}; it has'
          f' {", ".join(parameters)}.'
      )
    try:
      parameters[key] = type(parameters[key])(value)
    except ValueError as e:
      raise ValueError(
          f'{key} of the filter {name} must be'
          f' {_TYPES[type(parameters[key])]}; got {value!r}.'
      ) from e
    if not parameters[key] >= 0:
      raise ValueError(
          f'{key} of the filter {name} must be 0 or more; got {value!r}.'
      )
  return functools.partial(FILTERS[name], **parameters)


_TYPES = {int: 'a whole number', float: 'a number'}


def help_text(name: str) -> str:
  """Returns 'name (parameter=default, ...)'."""
  settings = ', '.join(f'{k}={v}' for k, v in _defaults(name).items())
  return f'{name} ({settings})'


def full_spec(parsed: Filter) -> str:
  """Names a filter with all its parameters, whatever the defaults are."""
  settings = ','.join(f'{k}={v}' for k, v in sorted(parsed.keywords.items()))
  return f'{parsed.func.__name__}:{settings}'


def apply(filters: Sequence[Filter], record: Record) -> Record:
  """Applies all filters to a record, up to the first that rejects it."""
  for one in filters:
    if isinstance(record, Reject):
      break
    record = one(record)
  return record


def check(filters: Sequence[Filter]) -> None:
  """Fails now and not in the middle of the work if a package is missing.

  Raises:
    ValueError: If so.
  """
  if any(one.func is english for one in filters):
    _identifier()


def _defaults(name: str) -> dict[str, int | float]:
  parameters = inspect.signature(FILTERS[name]).parameters.values()
  return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@functools.cache
def _identifier():
  try:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
  except ImportError as e:
    raise ValueError(
        'The filter english needs the package py3langid: pip install py3langid.'
    ) from e
  # Otherwise its score is no probability.
  return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
