r"""Prepares text: source -> filters -> tokenizer -> token shards on disk.

  python -m experiments.prepare_data --output=DIR
  python -m experiments.prepare_data --output=DIR --vocab_size=24006 \
      --source=jsonl:'c4/*.json.gz'
  python -m experiments.prepare_data --output=DIR --vocab_size=24006 \
      --source=wet:'CC-MAIN-*.warc.wet.gz' \
      --filter=long_paragraphs --filter=english
  python -m experiments.prepare_data --output=DIR --verify

Streaming: the corpus is never in memory. Killed at any moment, the same command
continues; when all is done it says so. The files do not depend on --workers.
"""

from collections.abc import Sequence

from absl import flags

from codistill_jax.data import (
    paragraph_ids,
    prepare,
    prepare_text,
    prepared_files,
    shards,
    sources,
)

from . import cli

_STOPPED = 'stopped; the same command goes on'


_FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this binary."""
  cli.define_preparation_flags(
      'documents',
      'chosen by a hash of the text; default: 0.05, or 0 with'
      ' --validation_source',
      'decode, filter and tokenise, about 0.5 GB each with large shards;'
      ' default: up to one for each core that this process may use',
      validation=None,
  )
  flags.DEFINE_float(
      'test_fraction',
      0.0,
      'Share of the documents in the test split, likewise.',
      lower_bound=0.0,
      upper_bound=1.0,
  )
  flags.DEFINE_multi_string(
      'source',
      ['bible'],
      'The corpus: bible (packaged default, King James Bible),'
      ' text:PATH_OR_GLOB (plain text, documents separated by blank lines),'
      ' files:PATH_OR_GLOB (a file a document), jsonl:PATH_OR_GLOB (JSON lines,'
      ' as C4 and dolma have them), wet:PATH_OR_GLOB (WET files of Common'
      ' Crawl, a page a document) or hf:NAME[:CONFIG[:SPLIT]] (Hugging Face,'
      ' streamed, as hf:allenai/c4:en). Files may be compressed (gzip,'
      ' bzip2, xz, Zstandard). Quote globs. Repeat it for several, which are'
      ' mixed: all their documents; or with a weight before each, as 0.7*bible,'
      ' in these shares of the documents, up to where the first of them ends.',
  )
  flags.DEFINE_string(
      'document_start',
      None,
      'With text: sources: a regular expression. A document starts with each'
      ' line whose beginning matches it, as " = [^=]" in WikiText or "CHAPTER",'
      ' and blank lines belong to it. Default: they separate documents.',
  )
  flags.DEFINE_string(
      'validation_source',
      None,
      'The validation split, written as --source is: that of a benchmark, as'
      ' hf:NAME:CONFIG:validation. Nothing of --source is in it then.',
  )
  flags.DEFINE_string(
      'test_source',
      None,
      'The test split, likewise. Default: there is none.',
  )
  flags.DEFINE_string(
      'text_key',
      'text',
      'Key (jsonl) or column (hf) that holds the text of a document.',
  )
  flags.DEFINE_integer(
      'vocab_size',
      None,
      'Word pieces in the vocabulary, with <unk>, <s>, </s> and 256 bytes;'
      f' 24006 in the paper. Default: {prepare_text.DEFAULT_VOCAB_SIZE}, or'
      ' those of --tokenizer.',
      lower_bound=1,
  )
  cli.define_path(
      'tokenizer',
      None,
      'Use this tokenizer.model of another preparation and train none.',
  )
  flags.DEFINE_integer(
      'tokenizer_bytes',
      prepare_text.DEFAULT_TOKENIZER_BYTES,
      'Train the tokenizer on the first so many bytes of the training split;'
      ' they are held in memory.',
      lower_bound=1,
  )
  flags.DEFINE_integer(
      'max_documents',
      None,
      'Stop after so many documents of --source, all splits together; rejected'
      ' records are not counted. Default: all.',
      lower_bound=1,
  )
  flags.DEFINE_integer(
      'shard_tokens',
      prepare_text.DEFAULT_SHARD_TOKENS,
      'Tokens of a shard, about; shards of small sources are smaller. A killed'
      ' run loses at most the shards that it was writing, one for each worker.',
      lower_bound=1,
  )
  flags.DEFINE_multi_string(
      'filter',
      [],
      'A filter of documents, with parameters as in'
      ' long_paragraphs:min_characters=400,min_words=50; repeat it for several,'
      ' which are applied in this order. There are: '
      + ', '.join(map(sources.filter_help, sources.FILTERS))
      + '. What they reject is counted.',
  )
  flags.DEFINE_integer(
      'max_document_bytes',
      sources.DEFAULT_MAX_DOCUMENT_BYTES,
      'Skip documents (lines of JSON, pages, files, text between blank lines)'
      ' that are longer, without holding them in memory; counted as too_long.',
      lower_bound=1,
  )
  cli.define_path(
      'paragraph_ids',
      None,
      "With a wet: source: take only the paragraphs of this list, the paper's"
      ' common_crawl_paragraph_ids_for_codistillation-csv-delta.tar.bz2, or a'
      ' path or glob of the CSV files in it. It is read once for each start,'
      ' which takes minutes.',
  )
  flags.DEFINE_string(
      'paragraph_ids_sha256',
      None,
      'SHA-256 that the file of --paragraph_ids must have; none: any. Default:'
      ' for a tar that of the released file, otherwise any.',
  )
  flags.DEFINE_enum(
      'paragraph_unit',
      'line',
      paragraph_ids.UNITS,
      'What the IDs of --paragraph_ids number, through each WET file, from 0:'
      ' lines that are not blank, or records (pages). The authors do not say.'
      ' record shows as missing_paragraphs if it is wrong, line as paragraphs'
      ' that are no text.',
  )
  flags.DEFINE_bool(
      'verify',
      False,
      'Prepare nothing: compare the files of the prepared data in --output with'
      ' their checksums.',
  )


def main(argv: Sequence[str]) -> None:
  del argv
  if not _FLAGS.output:
    raise ValueError('--output is missing: a directory for the data.')
  if _FLAGS.verify:
    _verify()
    return
  # Nothing is to be saved: whenever it ends, the same command goes on. But the
  # training of a tokenizer is C++, which would not hear of a signal.
  cli.StopRequest(_STOPPED).install()
  meta = prepare_text.prepare_text(
      _FLAGS.output,
      _FLAGS.source,
      document_start=_FLAGS.document_start,
      validation_source=_FLAGS.validation_source,
      test_source=_FLAGS.test_source,
      text_key=_FLAGS.text_key,
      vocab_size=_FLAGS.vocab_size,
      tokenizer=_FLAGS.tokenizer,
      tokenizer_bytes=_FLAGS.tokenizer_bytes,
      validation_fraction=_FLAGS.validation_fraction,
      test_fraction=_FLAGS.test_fraction,
      seed=_FLAGS.seed,
      max_documents=_FLAGS.max_documents,
      shard_tokens=_FLAGS.shard_tokens,
      filters=_FLAGS.filter,
      max_document_bytes=_FLAGS.max_document_bytes,
      paragraphs=_FLAGS.paragraph_ids,
      paragraphs_sha256=_FLAGS.paragraph_ids_sha256,
      paragraph_unit=_FLAGS.paragraph_unit,
      source_checksums=_FLAGS.checksums,
      max_rejected=_FLAGS.max_rejected,
      workers=_FLAGS.workers or prepare.usable_cores(),
      report=lambda line: print(line, flush=True),
  )
  print(prepare_text.summary(meta))


def _verify() -> None:
  files, size = prepared_files.verify(_FLAGS.output, shards.KIND)
  print(f'{files} files, {size:,} bytes: as they were written.')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
