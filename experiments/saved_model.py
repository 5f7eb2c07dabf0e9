"""TensorFlow SavedModels that take raw inputs: what training does beforehand to
text, rows and images is done in the graph, to the bit where integers are.

Shape suffixes: B rows, K categorical columns, I numbers, H height, W width, C
channels, O pixels of a side that is resized.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from jax.experimental import jax2tf

from codistill_jax import trained
from codistill_jax.data import images, tables
from codistill_jax.data import tokenizer as tokenizer_lib
from codistill_jax.storage import checkpoints

_CHUNK = 128  # Bytes that blake2b takes at a time.
_BITS = 22  # Of the weights with which Pillow resizes.


def save(
    path: str,
    model: trained.Trained,
    arrays: Any,
    forward: Callable,
    example: Any,
    polymorphic: Any,
) -> np.ndarray:
  """Writes a SavedModel; reads it again and returns its logits of `example`.

  Args:
    path: Of the directory.
    model: What is exported.
    arrays: Its parameters and state.
    forward: Gives logits of arrays and features.
    example: Features of a prepared batch.
    polymorphic: The symbolic shape of each, as text.
  """
  # Otherwise TensorFlow takes the accelerator's memory for itself.
  tf.config.set_visible_devices([], 'GPU')
  module = tf.Module()
  module.arrays = tf.nest.map_structure(tf.Variable, arrays)
  convert = _converted(forward, [None, polymorphic])
  call = lambda features: convert(module.arrays, features)
  structure = jax.tree.structure(example)
  named = {k.replace('/', '_'): x for k, x in checkpoints.flatten(example)}

  def logits(**features):
    leaves = [features[name] for name in named]
    return {'logits': call(jax.tree.unflatten(structure, leaves))}

  rank = 1 + (model.task.tokenizer is not None)
  prepared = {
      name: tf.TensorSpec([None] * rank + list(x.shape[rank:]), x.dtype)
      for name, x in named.items()
  }
  module.logits = tf.function(logits, autograph=False)
  signatures = {'logits': module.logits.get_concrete_function(**prepared)}
  served, raw = _server(model, module, call)
  if served:
    module.serve = tf.function(served, autograph=False)
    signatures['serving_default'] = module.serve.get_concrete_function(**raw)
  else:
    signatures['serving_default'] = signatures['logits']
  tf.saved_model.save(module, path, signatures=signatures)
  read = tf.saved_model.load(path).signatures['logits']
  again = read(**{name: tf.constant(x) for name, x in named.items()})
  return again['logits'].numpy()


def _converted(function: Callable, shapes: Sequence[Any]) -> Callable:
  """Returns a function of jax as one of TensorFlow, wherever it is served."""
  return jax2tf.convert(
      function,
      polymorphic_shapes=shapes,
      with_gradient=False,
      native_serialization_platforms=('cpu', 'cuda', 'tpu'),
  )


def _server(
    model: trained.Trained, module: tf.Module, call: Callable
) -> tuple[Callable | None, dict[str, tf.TensorSpec]]:
  """Returns what makes outputs of raw inputs, and their types by name."""
  raw = model.task.raw_inputs
  if model.task.tokenizer is not None:
    module.pieces = model.tokenizer.tensorflow_tokenizer()
    spec = {'text': tf.TensorSpec([None], tf.string)}
    return lambda text: _score(text, module.pieces, call), spec
  if isinstance(raw, tables.Columns):
    names = raw.arguments
    types = [tf.string] * len(raw.categorical) + [tf.float64] * len(raw.numeric)
    spec = {n: tf.TensorSpec([None], t) for n, t in zip(names, types)}
    module.ids = encoder_of(raw)

    def serve(**columns):
      inputs = inputs_of_columns(raw, module.ids, [columns[n] for n in names])
      return {'logits': call({'inputs': inputs})}

    return serve, spec
  if isinstance(raw, images.Pixels):
    spec = {'images': tf.TensorSpec([None], tf.string)}
    serve = lambda images: {'logits': call({'inputs': decoded(raw, images)})}
    return serve, spec
  return None, {}


# --- Text ---------------------------------------------------------------------


def _score(text, pieces_of, call):
  """Returns what a language model says of texts."""
  start, end = tokenizer_lib.START_ID, tokenizer_lib.END_ID
  pieces = pieces_of.tokenize(_escape(text))
  count = tf.cast(pieces.row_lengths(), tf.int32)
  column = lambda piece: tf.fill([tf.shape(count)[0], 1], piece)
  tokens = tf.concat([column(start), pieces, column(end)], 1).to_tensor(end)
  inputs, labels = tokens[:, :-1], tokens[:, 1:]
  logits = call({'inputs': inputs, 'resets': tf.equal(inputs, start)})
  log_probs = tf.nn.log_softmax(logits)
  # One more than there are pieces: the end of the document is predicted too.
  counted = tf.sequence_mask(count + 1, tf.shape(labels)[1], tf.float32)
  nats = -tf.gather(log_probs, labels, axis=-1, batch_dims=2)
  return {
      'nats': tf.reduce_sum(nats * counted, axis=-1),
      'pieces': count + 1,
      'next_log_probs': tf.gather(log_probs, count, axis=1, batch_dims=1),
  }


def _escape(text):
  """Does what `tokenizer.escape` does."""
  for old, new in tokenizer_lib.ESCAPED.items():
    text = tf.strings.regex_replace(text, old, new)
  text = tf.strings.regex_replace(text, '\n([^\n])', '\n \\1')
  return tf.where(tf.equal(text, ''), text, ' ' + text)


# --- Tables -------------------------------------------------------------------


def inputs_of_columns(
    columns: tables.Columns, ids: Callable, values: Sequence[Any]
) -> dict[str, Any]:
  """Returns the inputs of a model: of K columns of texts and I of numbers."""
  num_texts, rows = len(columns.categorical), tf.shape(values[0])[0]
  stacked = lambda found, dtype: (
      tf.stack(found, 1) if found else tf.zeros([rows, 0], dtype)
  )
  texts_BK = stacked(values[:num_texts], tf.string)
  dense_BI = stacked(values[num_texts:], tf.float64)
  raw = _of_hexadecimal if columns.hexadecimal else raw_of_text
  flat = raw(tf.reshape(texts_BK, [-1]))
  missing_BI = tf.math.is_nan(dense_BI)
  if columns.scaling is None:  # `clicks.log_integers`
    x_BI = tf.cast(
        tf.where(missing_BI, tf.zeros_like(dense_BI), dense_BI), tf.float32
    )
    scaled_BI = tf.sign(x_BI) * tf.math.log1p(tf.abs(x_BI))
    gaps = range(len(columns.numeric))
  else:
    mean_I, deviation_I, gaps = columns.scaling
    scaled_BI = (dense_BI - mean_I) / deviation_I
    scaled_BI = tf.where(missing_BI, tf.zeros_like(scaled_BI), scaled_BI)
  numbers = tf.concat(
      [
          tf.cast(scaled_BI, tf.float32),
          tf.cast(tf.gather(missing_BI, list(gaps), axis=1), tf.float32),
      ],
      axis=1,
  )
  return {
      'categories': ids(tf.reshape(flat, tf.shape(texts_BK))),
      'integers': tf.ensure_shape(
          numbers, [None, len(columns.numeric) + len(gaps)]
      ),
  }


class _Vocabulary(tf.Module):
  """Ids of known values, as of `tables.vocabulary`."""

  def __init__(self, known: Sequence[np.ndarray]):
    super().__init__()
    keys = [
        (np.int64(k) << 32) | values.astype(np.int64)
        for k, values in enumerate(known)
    ]
    ids = [np.arange(2, 2 + len(values)) for values in known]
    self._num_columns = len(known)
    self._table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(
            np.concatenate([*keys, np.zeros(0, np.int64)]),
            np.concatenate([*ids, np.zeros(0, int)]).astype(np.int32),
        ),
        default_value=1,
    )

  def __call__(self, values_BK):
    column = tf.range(self._num_columns, dtype=tf.int64) * (1 << 32)
    ids_BK = self._table.lookup(column + tf.cast(values_BK, tf.int64))
    missing_BK = tf.equal(tf.cast(values_BK, tf.int64), tables.MISSING)
    return tf.where(missing_BK, tf.zeros_like(ids_BK), ids_BK)


def encoder_of(columns: tables.Columns) -> Callable:
  """Returns what `Encoder.encode` is in a graph."""
  known, num = columns.encoder.known, len(columns.categorical)
  if known is not None:
    return _Vocabulary(known)
  return _converted(columns.encoder.encode, [f'(b, {num})'])


def _of_hexadecimal(text_N):
  """Reads eight hexadecimal digits: uint32; nothing is `tables.MISSING`."""
  good_N = tf.strings.regex_full_match(text_N, '([0-9a-fA-F]{8})?')
  check = tf.debugging.Assert(
      tf.reduce_all(good_N), ['a category is 8 hexadecimal digits:', text_N]
  )
  with tf.control_dependencies([check]):
    bytes_ND = tf.cast(
        tf.io.decode_raw(text_N, tf.uint8, fixed_length=8), tf.int64
    )
  letters_ND = tf.cast(bytes_ND > ord('9'), tf.int64)
  digits_ND = bytes_ND % 16 + 9 * letters_ND
  places = 16 ** np.arange(7, -1, -1, dtype=np.int64)
  return _or_missing(text_N, tf.reduce_sum(digits_ND * places, axis=1))


def _or_missing(text_N, raw_N):
  raw_N = tf.maximum(raw_N, 1)
  missing_N = tf.fill(tf.shape(raw_N), np.int64(tables.MISSING))
  return tf.cast(tf.where(tf.equal(text_N, ''), missing_N, raw_N), tf.uint32)


# Of RFC 7693.
_START = np.asarray(
    [
        *(0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B),
        *(0xA54FF53A5F1D36F1, 0x510E527FADE682D1, 0x9B05688C2B3E6C1F),
        *(0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179),
    ],
    np.uint64,
)
_ORDERS = [
    [int(digit, 16) for digit in line]
    for line in (
        '0123456789abcdef',
        'ea489fd61c02b753',
        'b8c052fdae367194',
        '7931dcbe265a40f8',
        '905724afe1bc683d',
        '2c6a0b834d75fe19',
        'c51fed4a0763928b',
        'db7ec13950f4862a',
        '6fe9b308c2d714a5',
        'a2847615fb9e3cd0',
    )
]


def raw_of_text(text_N):
  """Returns what `tables.raw_categories` is: 32 bits of blake2b, uint32."""
  length_N = tf.cast(tf.strings.length(text_N), tf.int64)
  chunks = tf.maximum(tf.reduce_max(length_N) + _CHUNK - 1, _CHUNK) // _CHUNK
  words = tf.io.decode_raw(
      text_N, tf.int64, fixed_length=tf.cast(chunks * _CHUNK, tf.int32)
  )
  words = tf.reshape(tf.bitcast(words, tf.uint64), [-1, chunks, 16])

  def compress(i, state):
    done = tf.minimum(length_N, (i + 1) * _CHUNK)
    last = tf.cast(tf.equal(done, length_N), tf.uint64) * np.uint64(2**64 - 1)
    zero = tf.zeros_like(last)
    a, b = state[:, :4], state[:, 4:]
    c = tf.zeros_like(a) + _START[:4]
    d = _START[4:] ^ tf.stack([tf.cast(done, tf.uint64), zero, last, zero], 1)
    for r in range(12):
      order = _ORDERS[r % 10]
      pick = lambda places: tf.gather(words[:, i], places, axis=1)
      a, b, c, d = _mixed(a, b, c, d, pick(order[0:8:2]), pick(order[1:8:2]))
      b, c, d = (tf.roll(x, -n, 1) for n, x in enumerate((b, c, d), 1))
      a, b, c, d = _mixed(a, b, c, d, pick(order[8::2]), pick(order[9::2]))
      b, c, d = (tf.roll(x, n, 1) for n, x in enumerate((b, c, d), 1))
    new = state ^ tf.concat([a ^ c, b ^ d], 1)
    goes_on = (i * _CHUNK < length_N) | tf.equal(i, 0)
    return i + 1, tf.where(goes_on[:, None], new, state)

  start = _START ^ np.asarray([0x01010000 | 4, *[0] * 7], np.uint64)
  state = tf.zeros_like(words[:, 0, :8]) + start
  _, state = tf.while_loop(
      lambda i, _: i < chunks, compress, (tf.constant(0, tf.int64), state)
  )
  low = tf.cast(state[:, 0] % np.uint64(2**32), tf.int64)
  # The first byte of a digest is its highest here.
  raw = sum(low // 256**i % 256 * 256 ** (3 - i) for i in range(4))
  return _or_missing(text_N, raw)


def _mixed(a, b, c, d, x, y):
  turn = lambda v, n: tf.bitwise.bitwise_or(
      tf.bitwise.right_shift(v, np.uint64(n)),
      tf.bitwise.left_shift(v, np.uint64(64 - n)),
  )
  a = a + b + x
  d = turn(d ^ a, 32)
  c = c + d
  b = turn(b ^ c, 24)
  a = a + b + y
  d = turn(d ^ a, 16)
  c = c + d
  b = turn(b ^ c, 63)
  return a, b, c, d


# --- Images -------------------------------------------------------------------


def decoded(pixels: images.Pixels, files_B):
  """Returns the inputs of a model of image files: float32 (B, H, W, C).

  As in an evaluation, of PNG to the bit. Of JPEG two decoders differ in the
  last bits, and EXIF's orientation is not looked at. Of images that are much
  taller than wide some releases of Pillow resize columns first, and then a
  pixel may be one of 255 off.
  """
  height, width, channels = pixels.shape

  def decode(file):
    image = tf.io.decode_image(file, channels, expand_animations=False)
    rows, columns = tf.shape(image)[0], tf.shape(image)[1]
    left, top = tf.constant(0, tf.float64), tf.constant(0, tf.float64)
    right, bottom = tf.cast(columns, tf.float64), tf.cast(rows, tf.float64)
    if pixels.resize is not None:  # `augment.centre_box`
      side = tf.minimum(right, bottom) * height / pixels.resize
      left, top = (right - side) / 2, (bottom - side) / 2
      right, bottom = left + side, top + side
    image = tf.cast(image, tf.float64)
    across = _weights(columns, width, left, right)
    image = _rounded(tf.einsum('hwc,ow->hoc', image, across))
    down = _weights(rows, height, top, bottom)
    return tf.cast(_rounded(tf.einsum('hwc,oh->owc', image, down)), tf.float32)

  found = tf.map_fn(
      decode,
      files_B,
      fn_output_signature=tf.TensorSpec(pixels.shape, tf.float32),
  )
  mean_C, std_C = np.asarray(pixels.mean), np.asarray(pixels.std)
  scale, offset = 1 / (255 * std_C), mean_C / std_C
  return found * scale.astype(np.float32) - offset.astype(np.float32)


def _weights(inside, outside: int, start, stop):
  """Returns how much each pixel counts, as Pillow's BILINEAR: (O, inside)."""
  # Its box is of float32.
  start, stop = tf.cast(start, tf.float32), tf.cast(stop, tf.float32)
  scale = tf.cast(stop - start, tf.float64) / outside
  reach = tf.maximum(scale, 1.0)
  place = tf.range(outside, dtype=tf.float64)[:, None] + 0.5
  centre = tf.cast(start, tf.float64) + place * scale
  x = tf.cast(tf.range(inside), tf.float64)[None, :]
  weights = tf.nn.relu(1 - tf.abs((x - centre + 0.5) * (1 / reach)))
  low, high = tf.floor(centre - reach + 0.5), tf.floor(centre + reach + 0.5)
  weights = tf.where((low <= x) & (x < high), weights, tf.zeros_like(weights))
  weights /= tf.reduce_sum(weights, axis=1, keepdims=True)
  return tf.floor(weights * 2**_BITS + 0.5)


def _rounded(sums):
  rounded = tf.floor((sums + 2 ** (_BITS - 1)) / 2**_BITS)
  return tf.clip_by_value(rounded, 0, 255)
