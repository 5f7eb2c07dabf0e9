"""Word pieces lose nothing, whatever the text."""

import importlib.util
import io
import json
import pathlib
import random
import subprocess

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from codistill_jax.data import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parent.parent
WORDS = ['the', 'and', 'of', 'that', 'he', 'his', 'for', 'they', 'be', 'is']


def corpus(num_documents=60):
  rng = random.Random(0)
  line = lambda: ' '.join(rng.choices(WORDS, k=12)).capitalize() + '.'
  return ['\n'.join(line() for _ in range(4)) for _ in range(num_documents)]


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.Tokenizer(tokenizer_lib.train(corpus(), 320))


# What has been lost by one tokenizer or another.
WORD_LIKE = (
    '▁ ▁▁ _ ▅ ⁇ ﬁ 😀 👩\u200d👩\u200d👧 中文 <s> </s> <unk> <0x0A> the The'
)
SPACE_LIKE = 'e\u0301 \0 \x1a \x1a_ \x1a\x1a \ufffd \ufeff \u0301 \u200b'
SPACES = [' ', '  ', '\n', '\n ', '\r\n', '\t', '\xa0', '\u2028', '\u3000']
NASTY = [*WORD_LIKE.split(' '), *SPACE_LIKE.split(' '), *SPACES, ' the']
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(NASTY)).map(''.join))


@given(TEXTS)
@example('\n')
@example(' ')
@example('\n \n\n  x\n')
def test_escape_is_inverted_and_leaves_no_space_mark(text):
  escaped = tokenizer_lib.escape(text)
  assert '▁' not in escaped
  assert tokenizer_lib.unescape(escaped) == text


@settings(deadline=None, max_examples=300)
@given(TEXTS)
@example('')
@example('\0')
@example('▁')
@example('a\r\n\r\n b\n')
@example(' the  the\n the\n\nthe ')
def test_decode_inverts_encode(tokenizer, text):
  pieces = tokenizer.encode(text)
  assert pieces.dtype == np.int32 and pieces.ndim == 1
  assert tokenizer.decode(pieces) == text
  # No text, whatever it looks like, contains a special piece.
  assert (pieces > tokenizer_lib.END_ID).all()
  assert (pieces < tokenizer.vocab_size).all()


def whole(tokenizer, text):
  """The pieces by sentencepiece itself, of the text at once."""
  import sentencepiece

  pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
  return pieces.encode(tokenizer_lib.escape(text))


def test_a_long_text_has_the_pieces_of_the_whole(tokenizer):
  """Though it is encoded in parts."""
  rng = random.Random(0)
  for between in ('', ' ', '  '):
    text = between.join(rng.choices([*NASTY, *WORDS], k=5000))
    assert tokenizer.encode(text).tolist() == whole(tokenizer, text)


def test_a_text_is_not_cut_where_pieces_reach_over_spaces():
  tokenizer = tokenizer_lib.Tokenizer(
      other_model(vocab_size=340, split_by_whitespace=False)
  )
  text = ' '.join(corpus())
  assert tokenizer.encode(text).tolist() == whole(tokenizer, text)


def other_model(**changes):
  """A model of the same corpus with other options."""
  import sentencepiece

  options = {
      'normalization_rule_name': 'identity',
      'remove_extra_whitespaces': False,
      'byte_fallback': True,
      'add_dummy_prefix': False,
      'model_type': 'bpe',
      'vocab_size': 320,
      'hard_vocab_limit': False,
      'minloglevel': 2,
  }
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(corpus()),
      model_writer=model,
      **(options | changes),
  )
  return model.getvalue()


GRAPH = """
import json, pathlib, sys
from codistill_jax.data import tokenizer
model, texts, found = map(pathlib.Path, sys.argv[1:])
graph = tokenizer.Tokenizer(model.read_bytes()).tensorflow_tokenizer()
escaped = [tokenizer.escape(t).encode() for t in json.loads(texts.read_text())]
found.write_text(json.dumps(graph.tokenize(escaped).to_list()))
"""


def test_tensorflow_text_gives_the_same_pieces(tokenizer, tmp_path, python):
  """In a process of its own: TensorFlow stays in memory, 0.7 GB of it."""
  if not importlib.util.find_spec('tensorflow_text'):
    pytest.skip('tensorflow-text is not installed')
  rng = random.Random(0)
  texts = [
      ''.join(rng.choices([*NASTY, *WORDS], k=rng.randint(0, 12)))
      for _ in range(1000)
  ]
  texts += [*corpus(5), 'Unseen: ÄÖ\n\n 中 \0 end ', '', ' ']
  paths = [tmp_path / name for name in ('model', 'texts', 'found')]
  paths[0].write_bytes(tokenizer.model)
  paths[1].write_text(json.dumps(texts))
  subprocess.run([python, '-c', GRAPH, *paths], cwd=ROOT, check=True)
  expected = json.loads(paths[2].read_text())
  assert [tokenizer.encode(text).tolist() for text in texts] == expected


def test_words_of_the_corpus_are_single_pieces_wherever_they_stand(tokenizer):
  start, line, inside = (
      tokenizer.encode(text) for text in ('the', 'of\nthe', 'of the')
  )
  assert len(start) == 1 and len(inside) == 2
  assert line[-1] == inside[-1] == start[0]
  assert len(line) == 3


@pytest.mark.parametrize('ids', [[-1], [5, 320], [10**12]])
def test_only_pieces_decode_and_special_ones_to_nothing(tokenizer, ids):
  with pytest.raises(ValueError, match=r'must be in 0\.\.319'):
    tokenizer.decode(ids)
  with pytest.raises(ValueError, match='surrogates'):
    tokenizer.encode('\ud800')
  tokenizer.decode(reversed(range(tokenizer.vocab_size)))  # Sampled nonsense.
  pieces = tokenizer.encode('the and').tolist()
  start, end = tokenizer_lib.START_ID, tokenizer_lib.END_ID
  assert tokenizer.decode([start, *pieces, end]) == 'the and'


def test_training_is_the_same_in_every_process(tokenizer, python):
  program = (
      'import sys; sys.path.append("tests")\n'
      'import tokenizer_test as t\n'
      'model = t.tokenizer_lib.train(t.corpus(), 320)\n'
      'print(t.tokenizer_lib.Tokenizer(model).sha256)\n'
  )
  for _ in range(2):
    output = subprocess.run(
        [python, '-c', program], cwd=ROOT, capture_output=True, text=True
    )
    assert output.stdout.strip() == tokenizer.sha256, output.stderr


def test_other_texts_or_sizes_have_another_hash(tokenizer):
  others = [
      tokenizer_lib.train(corpus(), 321),
      tokenizer_lib.train(corpus(59), 320),
  ]
  hashes = {tokenizer_lib.Tokenizer(model).sha256 for model in others}
  assert len(hashes | {tokenizer.sha256}) == 3


def test_training_survives_what_the_trainer_dislikes():
  # U+2585 is a mark of its own: it would drop every line here.
  marked = [text.replace('\n', '▅') for text in corpus()]
  texts = [*marked, 'a\tb\0c▅d▁e\x1af', 'x' * 50_000, '\n\n', ' ']
  model = tokenizer_lib.Tokenizer(tokenizer_lib.train(texts, 330))
  assert model.vocab_size == 330


@pytest.mark.parametrize(
    ('texts', 'vocab_size', 'message'),
    [
        (corpus(), 259, 'must be more than 259'),
        (
            corpus(),
            265,
            r'alone need \d+ word pieces, more than vocab_size=265',
        ),
        (corpus(), 5000, r'at most \d+ word pieces, not vocab_size=5000'),
        ([], 320, 'no text'),
        (['\n\n', '\t'], 320, 'no text'),
    ],
)
def test_impossible_vocabularies_are_explained(texts, vocab_size, message):
  with pytest.raises(ValueError, match=message) as raised:
    tokenizer_lib.train(texts, vocab_size)
  assert '\n' not in str(raised.value)


def test_advised_vocabulary_size_works():
  with pytest.raises(ValueError) as raised:
    tokenizer_lib.train(corpus(), 5000)
  words = str(raised.value).split()
  advised = int(words[words.index('most') + 1])
  tokenizer_lib.Tokenizer(tokenizer_lib.train(corpus(), advised))


@pytest.mark.parametrize('model', [b'', b'garbage', b'\x0a\xff\xff'])
def test_garbage_is_no_tokenizer(model):
  with pytest.raises(ValueError, match='Not a sentencepiece model'):
    tokenizer_lib.Tokenizer(model)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'normalization_rule_name': 'nfkc'}, 'alters text'),
        ({'remove_extra_whitespaces': True}, 'alters text'),
        ({'byte_fallback': False}, 'alters text'),
        ({'bos_id': 2, 'eos_id': 1}, 'pieces 0, 1 and 2'),
    ],
)
def test_models_that_lose_text_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    tokenizer_lib.Tokenizer(other_model(**changes))
