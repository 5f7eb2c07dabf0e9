"""Filters keep what they say, and are named with all they depend on."""

import pickle
import subprocess
from pathlib import Path

import pytest

from codistill_jax.data import sources
from codistill_jax.data.records import Reject

ROOT = Path(__file__).parent.parent
ENGLISH = 'It was the best of times, it was the worst of times, and then rain.'
GERMAN = 'Es war die beste und die schlechteste Zeit, und dann kam der Regen.'
FRENCH = "C'était le meilleur et le pire des temps, et puis vint la pluie."


def test_english_is_kept_as_it_is_and_nothing_else():
  pytest.importorskip('py3langid')
  keep, rejected = sources.english, Reject('not_english')
  for text in (ENGLISH, f' {ENGLISH}\n\n{ENGLISH}\t'):
    assert keep(text) == keep(text, min_probability=0.9) == text
    assert keep(text, min_probability=1.1) == rejected
  for text in (GERMAN, FRENCH, '天地玄黃宇宙洪荒', '12 %'):
    assert keep(text) == rejected
  # The beginning decides.
  text = ENGLISH * 3 + GERMAN * 30
  assert keep(text, max_characters=150) == text
  assert keep(text) == rejected


def test_long_paragraphs_are_kept_and_short_ones_dropped():
  text = 'menu\n' + 'x' * 10 + '\n   short    \n' + 'a b c d e ' + '\nend'
  keep = sources.long_paragraphs
  assert keep(text, min_characters=9) == 'x' * 10 + '\na b c d e '
  assert keep(text, min_characters=10) == 'x' * 10
  assert keep(text, min_characters=0, min_words=5) == 'a b c d e '
  assert keep(text, min_characters=11) == Reject('short')
  assert keep('\n \n', min_characters=0) == Reject('short')
  assert keep(text) == Reject('short')
  assert keep('y' * 200) == 'y' * 200


def test_filters_see_what_those_before_them_left():
  seen = []

  def note(text):
    seen.append(text)
    return text

  long = sources.parse_filter('long_paragraphs:min_characters=5')
  assert sources.apply_filters([long, note], 'abc\nabcdef') == 'abcdef'
  assert sources.apply_filters([note, long, note], 'abc') == Reject('short')
  assert sources.apply_filters([note], Reject('empty')) == Reject('empty')
  assert seen == ['abcdef', 'abc']


@pytest.mark.parametrize(
    ('spec', 'full'),
    [
        ('english', 'english:max_characters=4000,min_probability=0.5'),
        (
            'english:min_probability=0.9',
            'english:max_characters=4000,min_probability=0.9',
        ),
        ('long_paragraphs', 'long_paragraphs:min_characters=200,min_words=0'),
        (
            'long_paragraphs:min_words=7,min_characters=1',
            'long_paragraphs:min_characters=1,min_words=7',
        ),
    ],
)
def test_the_full_name_holds_every_parameter(spec, full):
  parsed = sources.parse_filter(spec)
  assert sources.filter_spec(parsed) == full
  assert sources.filter_spec(sources.parse_filter(full)) == full
  assert sources.filter_spec(pickle.loads(pickle.dumps(parsed))) == full


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ('french', "no filter 'french'; there are english, long_paragraphs"),
        ('', "no filter ''"),
        ('english:words=3', "no parameter 'words'; it has min_probability"),
        ('long_paragraphs:min_words=x', "must be a whole number; got 'x'"),
        ('english:min_probability=', "must be a number; got ''"),
        ('english:min_probability=nan', "0 or more; got 'nan'"),
        ('long_paragraphs:min_words=-1', "0 or more; got '-1'"),
    ],
)
def test_malformed_filters_are_refused(spec, message):
  with pytest.raises(ValueError, match=message):
    sources.parse_filter(spec)


def test_a_missing_package_is_named(python):
  program = (
      'import sys; sys.modules["py3langid"] = None\n'
      'from codistill_jax.data import sources\n'
      'try:\n'
      '  sources.check_filters([sources.parse_filter("english")])\n'
      'except ValueError as e:\n'
      '  print(e)\n'
      'sources.check_filters([sources.parse_filter("long_paragraphs")])\n'
  )
  output = subprocess.run(
      [python, '-c', program], cwd=ROOT, capture_output=True, text=True
  )
  assert 'pip install py3langid' in output.stdout, output.stderr
