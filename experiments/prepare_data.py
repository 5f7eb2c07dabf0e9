r"""Prepares text: source -> tokenizer -> token shards on disk.

  python -m experiments.prepare_data --output=DIR
  python -m experiments.prepare_data --output=DIR --vocab_size=24006 \
      --source=jsonl:'c4/*.json.gz'

Streaming: the corpus is never in memory. Killed at any moment, the same command
continues; when all is done it says so.
"""

from collections.abc import Sequence

from absl import flags

from codistill_jax.data import prepare as prepare_lib
from experiments import cli
from experiments.stopping import Rescue, StopRequest

_STOPPED = 'stopped; the same command goes on from the last whole shard'

_OUTPUT = flags.DEFINE_string(
    'output',
    None,
    'Directory of the prepared data; made if missing. A preparation in it with'
    ' the same settings is continued.',
)
_SOURCE = flags.DEFINE_string(
    'source',
    'bible',
    'The corpus: bible (packaged default, King James Bible), text:PATH_OR_GLOB'
    ' (plain text, documents separated by blank lines), files:PATH_OR_GLOB (a'
    ' file a document), jsonl:PATH_OR_GLOB (JSON lines) or'
    ' hf:NAME[:CONFIG[:SPLIT]] (Hugging Face, streamed, as hf:allenai/c4:en).'
    ' Files may end in .gz or .xz. Quote globs.',
)
_TEXT_KEY = flags.DEFINE_string(
    'text_key',
    'text',
    'Key (jsonl) or column (hf) that holds the text of a document.',
)
_VOCAB_SIZE = flags.DEFINE_integer(
    'vocab_size',
    None,
    'Word pieces in the vocabulary, with <unk>, <s>, </s> and 256 bytes; 24006'
    f' in the paper. Default: {prepare_lib.DEFAULT_VOCAB_SIZE}, or those of'
    ' --tokenizer.',
    lower_bound=1,
)
_TOKENIZER = flags.DEFINE_string(
    'tokenizer',
    None,
    'Use this tokenizer.model of another preparation and train none.',
)
_TOKENIZER_BYTES = flags.DEFINE_integer(
    'tokenizer_bytes',
    prepare_lib.DEFAULT_TOKENIZER_BYTES,
    'Train the tokenizer on the first so many bytes of the training split;'
    ' they are held in memory.',
    lower_bound=1,
)
_VALIDATION_FRACTION = flags.DEFINE_float(
    'validation_fraction',
    0.05,
    'Share of the documents in the validation split, chosen by a hash of the'
    ' text; 0 for none.',
    lower_bound=0.0,
    upper_bound=1.0,
)
_SEED = flags.DEFINE_integer(
    'seed', 0, 'Of the choice of validation documents.', lower_bound=0
)
_MAX_DOCUMENTS = flags.DEFINE_integer(
    'max_documents',
    None,
    'Stop after so many documents of the source, both splits together.'
    ' Default: all.',
    lower_bound=1,
)
_SHARD_TOKENS = flags.DEFINE_integer(
    'shard_tokens',
    prepare_lib.DEFAULT_SHARD_TOKENS,
    'Close a shard at about so many tokens. A killed run loses at most the'
    ' shard that it was writing.',
    lower_bound=1,
)


def main(argv: Sequence[str]) -> None:
  del argv
  if not _OUTPUT.value:
    raise ValueError('--output is missing: a directory for the data.')
  # Nothing is to be saved: whenever it ends, the same command goes on. But the
  # training of a tokenizer is C++, which would not hear of a signal.
  StopRequest(Rescue(_STOPPED)).install()
  meta = prepare_lib.prepare(
      _OUTPUT.value,
      _SOURCE.value,
      text_key=_TEXT_KEY.value,
      vocab_size=_VOCAB_SIZE.value,
      tokenizer=_TOKENIZER.value,
      tokenizer_bytes=_TOKENIZER_BYTES.value,
      validation_fraction=_VALIDATION_FRACTION.value,
      seed=_SEED.value,
      max_documents=_MAX_DOCUMENTS.value,
      shard_tokens=_SHARD_TOKENS.value,
      report=lambda line: print(line, flush=True),
  )
  print(prepare_lib.summary(meta))


if __name__ == '__main__':
  cli.run(main)
