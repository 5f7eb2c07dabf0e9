"""Invertible word pieces: decode(encode(text)) == text, for any UTF-8 text.

Which word pieces, and why: a byte-pair-encoding model of the `sentencepiece`
package, trained on the corpus without any normalisation and with one piece for
each of the 256 bytes.
* WordPiece in the style of BERT (also in tensorflow-text) splits on white space
  and punctuation and forgets what was between; it cannot be inverted.
* A character that the model never saw becomes its UTF-8 bytes, so nothing is
  ever out of vocabulary. `<unk>`, the OOV piece of the paper, keeps its place
  in the vocabulary and is never produced.
* The same model runs inside a TensorFlow graph, as the SentencepieceTokenizer
  of `tensorflow_text`, with the same pieces (a test holds it). Here it is run
  by `sentencepiece` itself: two to three times as fast, and a process needs
  60 MB and starts at once, not 900 MB and seconds, which is what allows a
  worker for each core.

What sentencepiece alone loses is escaped before and restored after it (see
`escape`): it writes U+2581 for a space, so a U+2581 of the text itself would
come back as a space. The escape also puts a space before the first word of the
text and of each line, as within a line, so that a word needs one piece and not
two; other options that touch white space are off.
"""

import contextlib
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator

import numpy as np

UNKNOWN_ID = 0  # <unk>
START_ID = 1  # <s>, the first token of every document
END_ID = 2  # </s>, the last one

# <unk>, <s>, </s> and the bytes; characters of the corpus come on top.
_RESERVED = 3 + 256
_SPACE_MARK = '▁'
_ESCAPE = '\x1a'  # A control character that text has no use for.
ESCAPED = {_ESCAPE: _ESCAPE + _ESCAPE, _SPACE_MARK: _ESCAPE + '_'}
_UNESCAPED = {value: key for key, value in ESCAPED.items()}

# Cut out of what the trainer sees: it drops any sentence with U+2585 in it, and
# of control characters it would make pieces of their own.
_NOT_TRAINED = re.compile('[\n\r\t\0\u2585]+')
_SENTENCE_CHARACTERS = 4000
_PROBE = ' Ein\r\n\n Tür\t\u2581\u2581 \ufb01 e\u0301 \u3000\u1234 \U0001f600\n'

# Texts are encoded in parts of about so many bytes, cut before spaces. As no
# piece reaches over one, the pieces are the same; but sentencepiece needs 50
# bytes of memory for each of a text, and more than proportional time.
_PART_BYTES = 1000


def escape(text: str) -> str:
  """Makes text that sentencepiece does not alter; `unescape` is the inverse.

  Three steps, each of them invertible: U+2581 is replaced; a newline before
  anything but another newline gets a space after it; so does the start.
  """
  text = re.sub(
      f'[{_ESCAPE}{_SPACE_MARK}]', lambda match: ESCAPED[match[0]], text
  )
  text = re.sub('\n(?=[^\n])', '\n ', text)
  return ' ' + text if text else text


def unescape(text: str) -> str:
  """Inverts `escape`; a lone escape character, as a model may write it, is
  left alone."""
  text = text.removeprefix(' ').replace('\n ', '\n')
  return re.sub(
      f'{_ESCAPE}[{_ESCAPE}_]', lambda match: _UNESCAPED[match[0]], text
  )


class NoTextError(ValueError):
  """There is no text to train a tokenizer on."""


class Tokenizer:
  """Text to word pieces and back.

  Attributes:
    model: The serialised sentencepiece model.
    vocab_size: V, with `<unk>`, `<s>`, `</s>` and the bytes.
    sha256: Of the model, in hex; identifies the vocabulary between groups.
  """

  def __init__(self, model: bytes):
    """Loads a model that `train` made.

    Raises:
      ValueError: If it is none, or not one that can be inverted.
    """
    import sentencepiece

    sentencepiece.set_min_log_level(2)
    try:
      # An empty model would load, and then report errors to stderr only.
      if not model:
        raise RuntimeError('it is empty')
      self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
      raise ValueError(f'Not a sentencepiece model: {e}') from e
    self.model = model
    self.vocab_size = self._pieces.vocab_size()
    self.sha256 = hashlib.sha256(model).hexdigest()
    self._check()
    pieces = self._pieces.id_to_piece(list(range(self.vocab_size)))
    spanning = any(_SPACE_MARK in piece[1:] for piece in pieces)
    self._part_bytes = None if spanning else _PART_BYTES

  def _check(self) -> None:
    pieces = self._pieces
    specials = (pieces.unk_id(), pieces.bos_id(), pieces.eos_id())
    if specials != (UNKNOWN_ID, START_ID, END_ID):
      raise ValueError(
          'A tokenizer needs <unk>, <s> and </s> as pieces 0, 1 and 2; this'
          f' one has {specials}. Train one with prepare_data.'
      )
    if self.decode(pieces.encode(escape(_PROBE))) != _PROBE:
      raise ValueError(
          'This sentencepiece model alters text (normalisation, white space'
          ' or unknown characters). Train one with prepare_data.'
      )

  def encode(self, text: str) -> np.ndarray:
    """Encodes a text: word pieces, int32, without `<s>` and `</s>`.

    Raises:
      ValueError: If it cannot be written in UTF-8 (lone surrogates).
    """
    # To bytes here: sentencepiece would say something else of surrogates.
    parts = _parts(escape(text).encode('utf-8'), self._part_bytes)
    found = [self._pieces.encode(part, out_type='numpy') for part in parts]
    return np.concatenate(found, dtype=np.int32)

  def tensorflow_tokenizer(self):
    """Makes a `tensorflow_text.SentencepieceTokenizer` with the same model.

    For graphs that tokenise by themselves. What it is given must have been
    escaped: `tokenize(escape(text))` gives the pieces of `encode(text)`.

    Raises:
      ValueError: If tensorflow-text is missing.
    """
    # What the import logs about CPU features and missing GPUs says nothing.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    try:
      import tensorflow as tf
      import tensorflow_text
    except ImportError as e:
      raise ValueError(
          'The TensorFlow form of a tokenizer needs the package'
          ' tensorflow-text: pip install tensorflow-text.'
      ) from e
    # Otherwise TensorFlow takes the accelerator's memory for itself. It refuses
    # if the caller has used TensorFlow before; the choice was made then.
    with contextlib.suppress(RuntimeError):
      tf.config.set_visible_devices([], 'GPU')
    return tensorflow_text.SentencepieceTokenizer(
        model=self.model, out_type=tf.int32
    )

  def decode(self, ids: Iterable[int]) -> str:
    """Decodes word pieces to their text; `<s>` and `</s>` are left out.

    Pieces that a model sampled may be no valid UTF-8: such bytes come out as
    U+FFFD.

    Raises:
      ValueError: If an id is outside the vocabulary.
    """
    ids = [int(i) for i in ids]
    if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
      raise ValueError(
          f'Word pieces must be in 0..{self.vocab_size - 1}; got'
          f' {min(ids)}..{max(ids)}.'
      )
    return unescape(self._pieces.decode(ids))


def _parts(escaped: bytes, size: int | None) -> Iterator[bytes]:
  """Cuts before the first space after each `size` bytes; None: nowhere."""
  start = 0
  while start >= 0:
    end = -1 if size is None else escaped.find(b' ', start + size)
    yield escaped[start : end if end >= 0 else len(escaped)]
    start = end


def train(texts: Iterable[str], vocab_size: int) -> bytes:
  """Trains word pieces; the same texts always give the same model.

  Args:
    texts: Documents; the trainer holds them all in memory.
    vocab_size: V, with 259 reserved pieces in it.

  Returns:
    The serialised model, for `Tokenizer`.

  Raises:
    ValueError: If the vocabulary is too small for the characters of the texts
      or too large for their words.
  """
  if vocab_size <= _RESERVED:
    raise ValueError(
        f'vocab_size must be more than {_RESERVED} (three special pieces and'
        f' 256 bytes); got {vocab_size}.'
    )
  sentences = _sentences(texts)
  first = next(sentences, None)
  if first is None:
    raise NoTextError('There is no text to train a tokenizer on.')
  import sentencepiece

  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain([first], sentences),
        model_writer=model,
        model_type='bpe',
        vocab_size=vocab_size,
        byte_fallback=True,
        # Rarer characters are spelt in bytes.
        character_coverage=0.9995,
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        max_sentence_length=4 * _SENTENCE_CHARACTERS,
        unk_id=UNKNOWN_ID,
        bos_id=START_ID,
        eos_id=END_ID,
        pad_id=-1,
        # Part of the model file, and so of its hash: never the machine's.
        num_threads=1,
        minloglevel=2,
    )
  except RuntimeError as e:
    raise ValueError(_training_error(str(e), vocab_size)) from e
  return model.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
  """Pieces of text for the trainer: lines, cut where they are very long."""
  for text in texts:
    for line in _NOT_TRAINED.split(escape(text)):
      for i in range(0, len(line), _SENTENCE_CHARACTERS):
        sentence = line[i : i + _SENTENCE_CHARACTERS]
        if sentence.strip():
          yield sentence


def _training_error(message: str, vocab_size: int) -> str:
  """Says in the user's words what the trainer found wrong."""
  if match := re.search(r'set it to a value <= (\d+)', message):
    return (
        f'The text supports at most {match[1]} word pieces, not'
        f' vocab_size={vocab_size}; lower it or use more text.'
    )
  if match := re.search(r'required_chars. (\d+) vs (\d+)', message):
    return (
        f'The characters of the text alone need {match[2]} word pieces, more'
        f' than vocab_size={vocab_size}; raise it.'
    )
  return f'Training the tokenizer failed: {message}'
