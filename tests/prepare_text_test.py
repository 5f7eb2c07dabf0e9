"""Text is prepared: nothing is lost, and every document decodes."""

import gzip
import hashlib
import json
import shutil

import numpy as np
import pytest
from prepared import contents, run_text, texts, write_corpus
from wet_files import write_wet

from codistill_jax import evaluate, metrics
from codistill_jax.data import order, prepare_text, shards, sources, text
from codistill_jax.data.tokenizer import END_ID, START_ID, Tokenizer


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp('corpus') / 'a', texts(120))


def documents_in(output, split):
  """Every document of a split, as tokens, read without `TokenData`."""
  meta = json.loads((output / 'meta.json').read_text())
  documents = []
  for i, shard in enumerate(meta['splits'][split]['shards']):
    if shard['documents']:
      tokens = np.load(output / split / f'{i:05d}.tokens.npy')
      offsets = np.load(output / split / f'{i:05d}.offsets.npy')
      documents += np.split(tokens, offsets[1:-1])
  return documents


def test_every_document_is_there_once_and_decodes(tmp_path, corpus):
  meta, _ = run_text(tmp_path, corpus)
  tokenizer = Tokenizer((tmp_path / 'tokenizer.model').read_bytes())
  assert tokenizer.vocab_size == 320
  for split in ('train', 'validation'):
    expected = [
        text
        for text in texts(120)
        if order.split_of(text, 0.2, 0.0, 0) == split
    ]
    documents = documents_in(tmp_path, split)
    assert [tokenizer.decode(d) for d in documents] == expected
    for document in documents:
      assert document.dtype == np.uint16
      assert document[0] == START_ID and document[-1] == END_ID
      assert (document[1:-1] > END_ID).all()
    sizes = meta['splits'][split]
    assert sizes['documents'] == len(expected) > 0
    assert sizes['words'] == sum(len(text.split()) for text in expected)
    assert sizes['bytes'] == sum(len(text.encode()) for text in expected)
    assert sizes['tokens'] == sum(map(len, documents))
    assert len(sizes['shards']) > 3
    data = shards.open_tokens(tmp_path, split)
    assert len(data) == len(expected) and data.num_tokens == sizes['tokens']
  assert meta['rejects'] == {'bad_json': 2, 'empty': 1, 'no_text': 1}
  assert meta == json.loads((tmp_path / 'meta.json').read_text())
  assert meta['tokenizer_sha256'] == tokenizer.sha256


def test_shard_size_moves_no_document(tmp_path, corpus):
  for name, size in (('small', 300), ('large', 10**6)):
    run_text(tmp_path / name, corpus, shard_tokens=size)
  for split in ('train', 'validation'):
    small = documents_in(tmp_path / 'small', split)
    large = documents_in(tmp_path / 'large', split)
    assert len(small) == len(large)
    for one, other in zip(small, large):
      np.testing.assert_array_equal(one, other)


def test_max_documents_is_the_beginning(tmp_path):
  source = write_corpus(tmp_path / 'all', texts(120), damaged=False)
  head = write_corpus(tmp_path / 'head', texts(50), damaged=False)
  meta, _ = run_text(tmp_path / 'a', source, max_documents=50)
  run_text(tmp_path / 'b', head)
  a, b = contents(tmp_path / 'a'), contents(tmp_path / 'b')
  del a['meta.json'], b['meta.json']
  assert a == b
  assert sum(split['documents'] for split in meta['splits'].values()) == 50


def test_tokenizer_is_trained_on_the_training_split_only(tmp_path, corpus):
  run_text(tmp_path / 'a', corpus)
  train = [t for t in texts(120) if order.split_of(t, 0.2, 0.0, 0) == 'train']
  source = write_corpus(tmp_path / 'train', train)
  run_text(tmp_path / 'b', source, validation_fraction=0)
  models = [(tmp_path / n / 'tokenizer.model').read_bytes() for n in 'ab']
  assert models[0] == models[1]
  # Fewer bytes train another one.
  run_text(tmp_path / 'c', corpus, tokenizer_bytes=3000)
  assert (tmp_path / 'c' / 'tokenizer.model').read_bytes() != models[0]


def test_given_tokenizer_is_used(tmp_path, corpus):
  first, _ = run_text(tmp_path / 'a', corpus)
  other = write_corpus(tmp_path / 'other', texts(60, seed=1), damaged=False)
  model = tmp_path / 'a' / 'tokenizer.model'
  second, _ = run_text(tmp_path / 'b', other, tokenizer=model, vocab_size=None)
  assert second['tokenizer_sha256'] == first['tokenizer_sha256']
  assert second['vocab_size'] == 320
  with pytest.raises(ValueError, match='320 word pieces, not vocab_size=330'):
    run_text(tmp_path / 'c', other, tokenizer=model, vocab_size=330)
  (tmp_path / 'garbage').write_bytes(b'garbage')
  with pytest.raises(ValueError, match='Cannot use the tokenizer'):
    run_text(tmp_path / 'c', other, tokenizer=tmp_path / 'garbage')
  assert not (tmp_path / 'c').exists()


def test_a_swapped_tokenizer_is_noticed_and_a_missing_one_made_again(
    tmp_path, corpus
):
  output, finished = tmp_path / 'data', tmp_path / 'whole'
  run_text(finished, corpus)
  # Killed where all is done but `meta.json`: no text falls into a split.
  with pytest.raises(ValueError, match='0 into validation'):
    run_text(output, corpus, validation_fraction=1e-9)
  options = {'validation_fraction': 1e-9}
  model = (output / 'tokenizer.model').read_bytes()
  shutil.copy(finished / 'tokenizer.model', output)
  with pytest.raises(ValueError, match='not the one that the preparation'):
    run_text(output, corpus, **options)
  (output / 'tokenizer.model').unlink()
  with pytest.raises(ValueError, match='0 into validation'):
    run_text(output, corpus, **options)
  assert (output / 'tokenizer.model').read_bytes() == model


@pytest.mark.parametrize('number', [1, 2])
def test_what_lies_behind_max_documents_is_no_error(
    tmp_path, monkeypatch, number
):
  """However far ahead is read."""
  corpus = write_corpus(tmp_path / 'corpus', texts(3000))
  opened = sources.open_source

  def failing(*arguments, **options):
    source = opened(*arguments, **options)

    def raw():
      for n, record in enumerate(source.raw()):
        if n == 2000:
          raise OSError('the network is gone')
        yield record

    return source._replace(raw=raw)

  monkeypatch.setattr(sources, 'open_source', failing)
  options = {'workers': number, 'shard_tokens': 10**5, 'tokenizer_bytes': 1000}
  meta, _ = run_text(tmp_path / 'b', corpus, max_documents=900, **options)
  assert meta['records'] == 904
  with pytest.raises(OSError, match='the network is gone'):
    run_text(tmp_path / 'c', corpus, **options)


def test_failed_start_leaves_no_settings_behind(tmp_path, corpus):
  with pytest.raises(ValueError, match='at most'):
    run_text(tmp_path, corpus, vocab_size=5000)
  assert list(tmp_path.iterdir()) == []
  run_text(tmp_path, corpus)


def test_empty_splits_are_explained(tmp_path, corpus):
  source = write_corpus(tmp_path / 'a', texts(60), damaged=False)
  for split in ('validation', 'test'):
    with pytest.raises(ValueError, match=f', 0 into {split}'):
      run_text(tmp_path / split, source, **{f'{split}_fraction': 1e-9})
  meta, _ = run_text(tmp_path / 'none', source, validation_fraction=0)
  assert meta['splits']['validation']['documents'] == 0
  with pytest.raises(ValueError, match=r'validation split of .* is empty'):
    shards.open_tokens(tmp_path / 'none', 'validation')


BROKEN = {
    'bad_json': '{"text": "half',
    'no_text': '{"body": "a text under another key"}',
    'not_utf8': '{"text": "\\ud800"}',
    'empty': '{"text": " "}',
}


@pytest.mark.parametrize('reason', BROKEN)
def test_losing_much_is_an_error_that_quotes_the_first(tmp_path, reason):
  good = [json.dumps({'text': text}) for text in texts(90)]
  for share, place in ((10, 0), (10, 70), (5, 33)):
    lines = [*good[:place], *[BROKEN[reason]] * share, *good[place:]]
    (tmp_path / 'a').write_text('\n'.join(lines))
    output, source = tmp_path / f'{place}', f'jsonl:{tmp_path}/a'
    with pytest.raises(ValueError, match='are broken, more') as raised:
      run_text(output, source)
    assert f'{share} are broken, more than max_rejected=0.05' in str(
        raised.value
    )
    quoted = repr(BROKEN[reason])
    assert f'first is record {place}, {reason}: {quoted}.' in str(raised.value)
    # The same preparation goes on when more is allowed.
    meta, said = run_text(output, source, max_rejected=0.11)
    assert meta['rejects'] == {reason: share} and 'Continuing' in said[0]


def test_a_file_cut_short_is_a_file_and_not_a_record(tmp_path):
  for name in 'abcd':
    write_corpus(tmp_path / name, texts(60, seed=ord(name)), damaged=False)
  data = gzip.compress((tmp_path / 'd').read_bytes())
  (tmp_path / 'd').write_bytes(data[: len(data) // 2])
  source = f'jsonl:{tmp_path}/[a-d]'
  with pytest.raises(ValueError, match=r'Of 4 files of .*, 1 are broken'):
    run_text(tmp_path / 'data', source)
  meta, _ = run_text(tmp_path / 'data', source, max_rejected=0.25)
  assert meta['rejects'] == {'damaged_file': 1}


@pytest.mark.parametrize('content', ['half a page', 'another kind'])
def test_a_wet_file_cut_short_is_a_file_too(tmp_path, content):
  pytest.importorskip('fastwarc')
  for name in 'ab':
    path = write_wet(tmp_path / f'{name}.gz', *texts(60, seed=ord(name)))
  data = path.read_bytes()[:-40]
  if content == 'another kind':
    data = gzip.compress(b'{"text": "a page"}\n' * 60)
  path.write_bytes(data)
  with pytest.raises(ValueError, match=r'Of 2 files of .*, 1 are broken'):
    run_text(tmp_path / 'data', f'wet:{tmp_path}/*.gz')


def test_what_was_asked_for_is_no_loss(tmp_path):
  source = write_corpus(tmp_path / 'a', texts(90), damaged=False)
  meta, _ = run_text(
      tmp_path / 'data', source, filters=['long_paragraphs:min_words=30']
  )
  assert meta['rejects']['short'] > 30
  meta, _ = run_text(tmp_path / 'short', source, max_document_bytes=150)
  assert meta['rejects']['too_long'] > 30
  # Of what was not filtered out, three broken ones are too many.
  with open(tmp_path / 'a', 'a') as f:
    f.write('{\n' * 3)
  with pytest.raises(ValueError, match=r'Of \d\d records .*, 3 are broken'):
    run_text(tmp_path / 'few', source, filters=['long_paragraphs:min_words=30'])


# --- several sources ---------------------------------------------------------


def decoded(output, split):
  tokenizer = Tokenizer((output / 'tokenizer.model').read_bytes())
  return [tokenizer.decode(d) for d in documents_in(output, split)]


def plain(path, documents):
  path.write_text('\n\n'.join(documents))
  return f'text:{path}'


def marked(mark, count):
  return [f'{mark} {text.strip()}' for text in texts(count, seed=ord(mark))]


@pytest.mark.parametrize(
    ('weights', 'sizes', 'taken'),
    [
        (('', ''), (60, 30), (60, 30)),
        (('', ''), (10, 80), (10, 80)),
        (('3*', '1*'), (60, 60), (60, 20)),
        (('1*', '3*'), (60, 60), (20, 60)),
        (('0.25*', '0.75*'), (60, 60), (20, 60)),
        (('1*', '1*'), (60, 30), (31, 30)),
    ],
)
def test_sources_are_mixed(tmp_path, weights, sizes, taken):
  documents = marked('a', sizes[0]), marked('b', sizes[1])
  (tmp_path / 'b').write_text(
      '\n'.join(json.dumps({'text': text}) for text in documents[1])
  )
  given = [
      weights[0] + plain(tmp_path / 'a', documents[0]),
      f'{weights[1]}jsonl:{tmp_path}/b',
  ]
  options = {'validation_fraction': 0, 'shard_tokens': 10**6}
  meta, _ = run_text(tmp_path / 'data', given, **options)
  found = decoded(tmp_path / 'data', 'train')
  for mark, texts_, count in zip('ab', documents, taken):
    mine = [text for text in found if text.startswith(mark)]
    assert abs(len(mine) - count) <= 1 and mine == texts_[: len(mine)]
  # Mixed from the start to the end: the tokenizer sees both, and each part.
  half = [text[0] for text in found[: len(found) // 2]]
  assert abs(half.count('a') - taken[0] / 2) <= 0.1 * len(half) + 1
  assert meta['config']['source'] == ' + '.join(given)
  assert f'documents of {given[1].removeprefix(weights[1])}: ' in (
      prepare_text.summary(meta)
  )
  run_text(tmp_path / 'two', given, workers=2, **options)
  assert contents(tmp_path / 'two') == contents(tmp_path / 'data')


@pytest.mark.parametrize(
    'given',
    [
        ['2*bible', 'bible'],
        ['0*bible'],
        ['1.2.3*bible'],
        [],
        ['bible', 'nothing'],
    ],
)
def test_bad_mixtures_are_refused(tmp_path, given):
  with pytest.raises(ValueError, match=r'weight|Weights|Unknown source'):
    run_text(tmp_path / 'data', given)
  assert not (tmp_path / 'data').exists()


def test_a_source_that_gives_nothing_is_named(tmp_path):
  given = [plain(tmp_path / 'a', marked('a', 60)), f'text:{tmp_path}/b']
  for nothing in ('', ' \n\n'):
    (tmp_path / 'b').write_text(nothing)
    with pytest.raises(ValueError, match='/b gave no document'):
      run_text(tmp_path / f'{len(nothing)}', given)


@pytest.mark.parametrize('max_documents', [None, 40])
def test_splits_of_a_benchmark_are_what_they_are(tmp_path, max_documents):
  train, validation, test = marked('t', 80), marked('v', 20), marked('x', 15)
  run_text(
      tmp_path / 'data',
      plain(tmp_path / 'a', train),
      validation_fraction=None,
      validation_source=plain(tmp_path / 'b', validation),
      test_source=plain(tmp_path / 'c', test),
      max_documents=max_documents,
  )
  assert decoded(tmp_path / 'data', 'train') == train[:max_documents]
  assert decoded(tmp_path / 'data', 'validation') == validation
  assert decoded(tmp_path / 'data', 'test') == test
  # The tokenizer saw the training split alone.
  run_text(
      tmp_path / 'alone',
      plain(tmp_path / 'a', train),
      validation_fraction=0,
      max_documents=max_documents,
  )
  models = [(tmp_path / n / 'tokenizer.model') for n in ('data', 'alone')]
  assert models[0].read_bytes() == models[1].read_bytes()


def test_a_task_knows_the_bytes_of_its_splits(tmp_path, corpus):
  """Bits per byte compare models with different tokenizers."""
  run_text(tmp_path, corpus, test_fraction=0.3)
  task = text.language_model_task(tmp_path, unroll=7)
  for split, batches in (
      ('validation', task.eval_batches(3)),
      ('test', task.test_batches(2)),
  ):
    labels = sum(batch['weights'].sum() for batch in batches)
    size = sum(len(text.encode()) for text in decoded(tmp_path, split))
    assert batches.bytes_per_example * labels == pytest.approx(size)
    step = lambda _, batch, carry: (
        {
            'eval/loss': metrics.Mean(
                3 * batch['weights'].sum(), batch['weights'].sum()
            )
        },
        carry,
    )
    found = evaluate.evaluate(step, {}, batches, None)
    expected = 3 * labels / size / np.log(2)
    assert found['eval/bits_per_byte'] == pytest.approx(expected)
  run_text(tmp_path / 'two', corpus)
  two = text.language_model_task(tmp_path / 'two', unroll=7)
  assert two.test_batches is None


def test_source_without_documents_says_what_was_rejected(tmp_path):
  (tmp_path / 'a').write_text('no json\n{}\nnor this\n')
  message = '2 bad_json, 1 no_text. The first is record 0, bad_json: .no json'
  with pytest.raises(ValueError, match=message):
    run_text(tmp_path / 'data', f'jsonl:{tmp_path}/a')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'validation_fraction': 1.0}, r'in \[0, 1\), also together; got 1.0'),
        ({'validation_fraction': float('nan')}, 'got nan'),
        ({'vocab_size': 0}, 'vocab_size must be 1 or more; got 0'),
        ({'max_documents': 0}, 'max_documents must be 1'),
        ({'shard_tokens': 0}, 'shard_tokens must be 1'),
        ({'max_document_bytes': 0}, 'max_document_bytes must be 1'),
        ({'filters': ['french']}, "no filter 'french'"),
        ({'paragraph_unit': 'word'}, 'one of line, record'),
        ({'paragraphs': 'none.csv'}, 'no file'),
        ({'paragraphs': __file__}, 'expected wet:PATH_OR_GLOB'),
        ({'paragraphs': __file__, 'paragraphs_sha256': '0'}, 'the SHA-256'),
        ({'paragraphs_sha256': 'ab'}, 'no list of paragraphs'),
        ({'max_rejected': 5}, r'max_rejected must be in \[0, 1\]; got 5'),
        ({'test_fraction': 0.8}, 'also together; got 0.2 and 0.8'),
        ({'validation_source': 'bible'}, 'both say what the validation split'),
        ({'document_start': 'x'}, 'of plain text, but no source is'),
    ],
)
def test_bad_arguments(tmp_path, corpus, changes, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    run_text(tmp_path / 'data', corpus, **changes)
  assert not (tmp_path / 'data').exists()


def test_filters_are_counted_and_part_of_the_settings(tmp_path):
  long = ['lines of text that are long enough ' * 9, 'also long ' * 30]
  documents = [f'{n} menu\n{n} {long[n % 2]}' for n in range(60)]
  source = write_corpus(tmp_path / 'a', [*documents, 'short', 'x', 'y'])
  options = {'filters': ['long_paragraphs'], 'max_rejected': 0.1}
  meta, _ = run_text(tmp_path / 'data', source, **options)
  full = 'long_paragraphs:min_characters=200,min_words=0'
  assert meta['config']['filters'] == [full]
  assert meta['rejects']['short'] == 3 and meta['records'] == 67
  tokenizer = Tokenizer((tmp_path / 'data' / 'tokenizer.model').read_bytes())
  for split in ('train', 'validation'):
    for document in documents_in(tmp_path / 'data', split):
      assert 'menu' not in tokenizer.decode(document)
  run_text(tmp_path / 'data', source, **options | {'filters': [full]})
  assert 'of 67: 3 bad_json' not in prepare_text.summary(meta)
  assert 'rejected records of 67: 2 bad_json' in prepare_text.summary(meta)


def write_paragraph_list(path, name, ids):
  deltas = np.diff([0, *ids])
  cell = ' '.join(map(str, deltas))
  path.write_text(f'file name,encoded_paragraph_list\n{name},{cell}\n')
  return str(path)


def test_wet_files_and_their_listed_paragraphs(tmp_path):
  pytest.importorskip('fastwarc')
  pages = [f'menu {n}\n{text}\nfooter' for n, text in enumerate(texts(80))]
  lines = [line for page in pages for line in page.split('\n') if line.strip()]
  path = write_wet(tmp_path / 'a.wet.gz', *pages)
  wanted = [i for i, line in enumerate(lines) if ':' in line]
  assert len(wanted) == 80 and len(lines) == 240
  listed = write_paragraph_list(tmp_path / 'list.csv', path.name, wanted)
  meta, _ = run_text(tmp_path / 'data', f'wet:{path}', paragraphs=listed)
  splits = ('train', 'validation')
  found = [t for split in splits for t in decoded(tmp_path / 'data', split)]
  assert sorted(found) == sorted(lines[i].strip() for i in wanted)
  digest = hashlib.sha256((tmp_path / 'list.csv').read_bytes()).hexdigest()
  assert meta['config']['paragraph_ids'] == digest
  with pytest.raises(ValueError, match='prepared with paragraph_ids='):
    run_text(tmp_path / 'data', f'wet:{path}')
