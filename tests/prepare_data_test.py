"""Preparation: nothing is lost, and a killed one ends as if it was not."""

import fcntl
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from waits import PATIENCE, until
from wet_files import packed, wet, write_wet

from codistill_jax.data import (
    order,
    prepare,
    prepare_summary,
    rounds,
    shards,
)
from codistill_jax.data.tokenizer import END_ID, START_ID, Tokenizer

ROOT = pathlib.Path(__file__).parent.parent
SHARED = pathlib.Path(
    os.environ.get('CODISTILL_SHARED_DATA', ROOT.parent / 'shared' / 'data')
)
WORDS = ['the', 'and', 'of', 'that', 'he', 'his', 'for', 'they', 'be', 'is']


def texts(num_documents, seed=0):
  rng = random.Random(seed)
  return [
      f'{i}: ' + ' '.join(rng.choices(WORDS, k=rng.randint(1, 60))) + ' ▁ÿ\n'
      for i in range(num_documents)
  ]


def write_corpus(path, documents, damaged=True):
  lines = [json.dumps({'text': text}) for text in documents]
  if damaged:
    for place, line in ((5, '{'), (6, '{"text": ""}'), (40, '{}'), (90, '[')):
      lines.insert(place, line)
  path.write_text('\n'.join(lines) + '\n')
  return f'jsonl:{path}'


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp('corpus') / 'a', texts(120))


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
  """What a power failure would lose; a process that is killed loses nothing."""
  monkeypatch.setattr(os, 'fsync', lambda handle: None)


@pytest.fixture
def small_batches(monkeypatch):
  monkeypatch.setattr(rounds, '_BATCH_RECORDS', 7)


def run(output, source, **changes):
  lines = []
  options = {
      'vocab_size': 320,
      'validation_fraction': 0.2,
      'shard_tokens': 500,
      'report': lines.append,
  }
  meta = prepare.prepare(output, source, **(options | changes))
  return meta, lines


def contents(folder):
  return {
      str(path.relative_to(folder)): path.read_bytes()
      for path in sorted(folder.rglob('*'))
      if path.is_file()
  }


def documents_in(output, split):
  """Every document of a split, as tokens, read without `TokenData`."""
  meta = json.loads((output / 'meta.json').read_text())
  documents = []
  for i in range(len(meta['splits'][split]['shards'])):
    tokens = np.load(output / split / f'{i:05d}.tokens.npy')
    offsets = np.load(output / split / f'{i:05d}.offsets.npy')
    documents += np.split(tokens, offsets[1:-1])
  return documents


def test_every_document_is_there_once_and_decodes(
    tmp_path, corpus, small_batches
):
  meta, _ = run(tmp_path, corpus)
  tokenizer = Tokenizer((tmp_path / 'tokenizer.model').read_bytes())
  assert tokenizer.vocab_size == 320
  for split in shards.SPLITS:
    expected = [
        text
        for text in texts(120)
        if order.in_validation(text, 0.2, 0) == (split == 'validation')
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


def test_shard_size_moves_no_document(tmp_path, corpus, small_batches):
  for name, size in (('small', 300), ('large', 10**6)):
    run(tmp_path / name, corpus, shard_tokens=size)
  for split in shards.SPLITS:
    small = documents_in(tmp_path / 'small', split)
    large = documents_in(tmp_path / 'large', split)
    assert len(small) == len(large)
    for one, other in zip(small, large):
      np.testing.assert_array_equal(one, other)


def test_the_number_of_workers_makes_no_difference(
    tmp_path, corpus, small_batches
):
  options = {
      'filters': ['long_paragraphs:min_characters=9'],
      'text_key': 'text',
  }
  for limit, others in ((None, 3), (60, 2)):
    for number in (1, others):
      run(
          tmp_path / f'{limit}{number}',
          corpus,
          workers=number,
          max_documents=limit,
          **options,
      )
    expected = contents(tmp_path / f'{limit}1')
    assert contents(tmp_path / f'{limit}{others}') == expected


def test_continued_with_other_workers_it_ends_with_the_same_files(
    tmp_path, corpus, small_batches, monkeypatch
):
  run(tmp_path / 'whole', corpus)
  write_json, written = shards.write_json, 0

  def stop_after_4(path, value):
    nonlocal written
    written += 1
    if written == 4:
      raise Killed
    write_json(path, value)

  with monkeypatch.context() as patch:
    patch.setattr(shards, 'write_json', stop_after_4)
    with pytest.raises(Killed):
      run(tmp_path / 'a', corpus, workers=2)
  _, lines = run(tmp_path / 'a', corpus, workers=1)
  assert lines[0].startswith('Continuing in')
  assert contents(tmp_path / 'a') == contents(tmp_path / 'whole')


class Killed(BaseException):
  """Stands for kill -9: nothing in the program catches it."""


def test_killed_at_any_write_it_ends_with_the_same_files(
    tmp_path, corpus, small_batches, monkeypatch
):
  run(tmp_path / 'whole', corpus, shard_tokens=1500)
  expected = contents(tmp_path / 'whole')
  assert not any(name.endswith(('.tmp', 'progress.json')) for name in expected)
  replace = os.replace
  writes = 0

  def killed_at(number, before):
    def stop(*paths):
      nonlocal writes
      writes += 1
      if writes == number and before:
        raise Killed
      replace(*paths)
      if writes == number:
        raise Killed

    return stop

  number, finished = 0, False
  while not finished:
    number += 1
    for before in (True, False):
      output = tmp_path / f'{number}{before}'
      writes = 0
      monkeypatch.setattr(shards.os, 'replace', killed_at(number, before))
      try:
        run(output, corpus, shard_tokens=1500)
        finished = True
      except Killed:
        pass
      monkeypatch.setattr(shards.os, 'replace', replace)
      run(output, corpus, shard_tokens=1500)
      assert contents(output) == expected
      shutil.rmtree(output)
  # Settings, tokenizer, several rounds of four files and progress, meta.
  assert number > 15


@pytest.mark.parametrize('max_documents', [None, 100])
def test_killed_again_and_again_it_gets_there(
    tmp_path, corpus, small_batches, monkeypatch, max_documents
):
  run(tmp_path / 'whole', corpus, max_documents=max_documents)
  encode_batch = Tokenizer.encode_batch
  rng = random.Random(0)

  def unreliable(self, batch):
    if rng.random() < 0.3:
      raise Killed
    return encode_batch(self, batch)

  monkeypatch.setattr(Tokenizer, 'encode_batch', unreliable)
  deaths = 0
  while True:
    try:
      run(tmp_path / 'killed', corpus, max_documents=max_documents)
      break
    except Killed:
      deaths += 1
      assert deaths < 500
  assert deaths > 2
  assert contents(tmp_path / 'killed') == contents(tmp_path / 'whole')


def test_max_documents_is_the_beginning(tmp_path, small_batches):
  source = write_corpus(tmp_path / 'all', texts(120), damaged=False)
  head = write_corpus(tmp_path / 'head', texts(50), damaged=False)
  meta, _ = run(tmp_path / 'a', source, max_documents=50)
  run(tmp_path / 'b', head)
  a, b = contents(tmp_path / 'a'), contents(tmp_path / 'b')
  del a['meta.json'], b['meta.json']
  assert a == b
  assert sum(split['documents'] for split in meta['splits'].values()) == 50


def test_tokenizer_is_trained_on_the_training_split_only(tmp_path, corpus):
  run(tmp_path / 'a', corpus)
  train = [t for t in texts(120) if not order.in_validation(t, 0.2, 0)]
  source = write_corpus(tmp_path / 'train', train)
  run(tmp_path / 'b', source, validation_fraction=0)
  models = [(tmp_path / n / 'tokenizer.model').read_bytes() for n in 'ab']
  assert models[0] == models[1]
  # Fewer bytes train another one.
  run(tmp_path / 'c', corpus, tokenizer_bytes=3000)
  assert (tmp_path / 'c' / 'tokenizer.model').read_bytes() != models[0]


def test_given_tokenizer_is_used(tmp_path, corpus):
  first, _ = run(tmp_path / 'a', corpus)
  other = write_corpus(tmp_path / 'other', texts(60, seed=1))
  model = tmp_path / 'a' / 'tokenizer.model'
  second, _ = run(tmp_path / 'b', other, tokenizer=model, vocab_size=None)
  assert second['tokenizer_sha256'] == first['tokenizer_sha256']
  assert second['vocab_size'] == 320
  with pytest.raises(ValueError, match='320 word pieces, not vocab_size=330'):
    run(tmp_path / 'c', other, tokenizer=model, vocab_size=330)
  (tmp_path / 'garbage').write_bytes(b'garbage')
  with pytest.raises(ValueError, match='Cannot use the tokenizer'):
    run(tmp_path / 'c', other, tokenizer=tmp_path / 'garbage')
  assert not (tmp_path / 'c').exists()


def test_finished_data_are_left_alone(tmp_path, corpus):
  meta, _ = run(tmp_path, corpus)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  again, lines = run(tmp_path, corpus)
  assert again == meta
  assert lines == [f'{tmp_path} is prepared already; nothing to do.']
  after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  assert before == after


def interrupted(output, source, monkeypatch):
  """A preparation that was killed in its last round."""
  with monkeypatch.context() as patch:
    patch.setattr(rounds.RoundWriter, '_end_round', _killed)
    with pytest.raises(Killed):
      run(output, source)
  assert (output / 'progress.json').exists()


def _killed(self):
  raise Killed


@pytest.mark.parametrize('finished', [True, False])
def test_other_settings_are_refused_and_damage_nothing(
    tmp_path, corpus, monkeypatch, finished
):
  output = tmp_path / 'data'
  if finished:
    run(output, corpus)
  else:
    interrupted(output, corpus, monkeypatch)
  before = contents(output)
  for name, value in {
      'vocab_size': 321,
      'validation_fraction': 0.3,
      'seed': 1,
      'shard_tokens': 501,
      'max_documents': 100,
      'tokenizer_bytes': 10**6,
      'text_key': 'body',
      'max_document_bytes': 10**6,
      'filters': ['long_paragraphs'],
  }.items():
    with pytest.raises(ValueError, match=f'was prepared with {name}='):
      run(output, corpus, **{name: value})
  other = write_corpus(tmp_path / 'other', texts(50))
  with pytest.raises(ValueError, match='was prepared with source='):
    run(output, other)
  assert contents(output) == before
  run(output, corpus)


@pytest.mark.parametrize('finished', [True, False])
def test_changed_source_is_noticed(tmp_path, monkeypatch, finished):
  source = write_corpus(tmp_path / 'a', texts(50))
  if finished:
    run(tmp_path / 'data', source)
  else:
    interrupted(tmp_path / 'data', source, monkeypatch)
  write_corpus(tmp_path / 'a', texts(51))
  with pytest.raises(ValueError, match='have changed since'):
    run(tmp_path / 'data', source)


def test_a_swapped_tokenizer_is_noticed(tmp_path, corpus, monkeypatch):
  output = tmp_path / 'data'
  interrupted(output, corpus, monkeypatch)
  run(tmp_path / 'other', corpus, vocab_size=321)
  model = (output / 'tokenizer.model').read_bytes()
  shutil.copy(tmp_path / 'other' / 'tokenizer.model', output)
  with pytest.raises(ValueError, match='not the one that the preparation'):
    run(output, corpus)
  (output / 'tokenizer.model').write_bytes(model)
  run(output, corpus)


def test_finished_by_another_process_meanwhile(tmp_path, corpus, monkeypatch):
  exclusive = prepare.locks.exclusive

  def late(*arguments):
    with monkeypatch.context() as patch:
      patch.setattr(prepare.locks, 'exclusive', exclusive)
      run(tmp_path, corpus)
    return exclusive(*arguments)

  monkeypatch.setattr(prepare.locks, 'exclusive', late)
  _, lines = run(tmp_path, corpus)
  assert lines == [f'{tmp_path} is prepared already; nothing to do.']


@pytest.mark.parametrize('number', [1, 2])
def test_what_lies_behind_max_documents_is_no_error(
    tmp_path, corpus, small_batches, monkeypatch, number
):
  """However far ahead is read."""
  run(tmp_path / 'a', corpus)
  opened = prepare.sources.open_source

  def failing(*arguments, **options):
    source = opened(*arguments, **options)

    def raw(start):
      for n, record in enumerate(source.raw(start), start):
        if n == 40:
          raise OSError('the network is gone')
        yield record

    return source._replace(raw=raw)

  monkeypatch.setattr(prepare.sources, 'open_source', failing)
  options = {
      'tokenizer': tmp_path / 'a' / 'tokenizer.model',
      'vocab_size': None,
      'workers': number,
  }
  run(tmp_path / 'b', corpus, max_documents=30, **options)
  with pytest.raises(OSError, match='the network is gone'):
    run(tmp_path / 'c', corpus, **options)


def test_finished_data_outlive_their_source(tmp_path):
  source = write_corpus(tmp_path / 'a', texts(50))
  meta, _ = run(tmp_path / 'data', source)
  (tmp_path / 'a').unlink()
  assert run(tmp_path / 'data', source)[0] == meta


def test_directory_of_somebody_else_is_refused(tmp_path, corpus):
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(ValueError, match=r'holds thesis.tex, but no prep'):
    run(tmp_path, corpus)
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


def test_failed_start_leaves_no_settings_behind(tmp_path, corpus):
  with pytest.raises(ValueError, match='at most'):
    run(tmp_path, corpus, vocab_size=5000)
  assert list(tmp_path.iterdir()) == []
  run(tmp_path, corpus)


def test_two_at_a_time_are_refused(tmp_path, corpus):
  handle = os.open(tmp_path, os.O_RDONLY)
  fcntl.flock(handle, fcntl.LOCK_EX)
  try:
    with pytest.raises(ValueError, match='Another process is preparing'):
      run(tmp_path, corpus)
  finally:
    os.close(handle)
  run(tmp_path, corpus)


def test_empty_splits_are_explained(tmp_path, corpus):
  source = write_corpus(tmp_path / 'a', texts(60), damaged=False)
  with pytest.raises(ValueError, match='0 into the validation split'):
    run(tmp_path / 'data', source, validation_fraction=1e-9)
  meta, _ = run(tmp_path / 'none', source, validation_fraction=0)
  assert meta['splits']['validation']['documents'] == 0
  with pytest.raises(ValueError, match=r'validation split of .* is empty'):
    shards.open_tokens(tmp_path / 'none', 'validation')


def test_source_without_documents_says_what_was_rejected(tmp_path):
  (tmp_path / 'a').write_text('no json\n{}\nnor this\n')
  with pytest.raises(ValueError, match='2 bad_json, 1 no_text'):
    run(tmp_path / 'data', f'jsonl:{tmp_path}/a')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'validation_fraction': 1.0}, r'in \[0, 1\); got 1.0'),
        ({'validation_fraction': float('nan')}, 'got nan'),
        ({'vocab_size': 0}, 'vocab_size must be 1 or more; got 0'),
        ({'max_documents': 0}, 'max_documents must be 1'),
        ({'shard_tokens': 0}, 'shard_tokens must be 1'),
        ({'seed': -1}, 'seed must be 0 or more'),
        ({'workers': 0}, 'workers must be 1 or more'),
        ({'max_document_bytes': 0}, 'max_document_bytes must be 1'),
        ({'filters': ['french']}, "no filter 'french'"),
        ({'paragraph_unit': 'word'}, 'one of line, record'),
        ({'paragraphs': 'none.csv'}, 'no file'),
        ({'paragraphs_sha256': 'ab'}, 'no list of paragraphs'),
    ],
)
def test_bad_arguments(tmp_path, corpus, changes, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    run(tmp_path / 'data', corpus, **changes)
  assert not (tmp_path / 'data').exists()


def strip_meta(output):
  """Makes of prepared data what an earlier version would have written."""
  path = output / 'meta.json'
  meta = json.loads(path.read_text())
  del meta['records']
  for name in (
      'filters',
      'max_document_bytes',
      'paragraph_ids',
      'paragraph_unit',
  ):
    del meta['config'][name]
  for split in meta['splits'].values():
    for shard in split['shards']:
      del shard['tokens_sha256'], shard['offsets_sha256']
  path.write_text(json.dumps(meta))


def test_data_of_before_open_and_count_as_prepared(tmp_path, corpus):
  run(tmp_path, corpus)
  strip_meta(tmp_path)
  meta, lines = run(tmp_path, corpus)
  assert lines == [f'{tmp_path} is prepared already; nothing to do.']
  assert 'rejected records: 2 bad_json' in prepare_summary.summary(meta)
  assert len(shards.open_tokens(tmp_path, 'train')) > 50
  found = shards.verify(tmp_path)
  assert found.files == 1 and found.unknown == 4
  with pytest.raises(ValueError, match=r'with filters=\[\], now it is'):
    run(tmp_path, corpus, filters=['long_paragraphs'])


def test_every_shard_has_its_checksum(tmp_path, corpus, small_batches):
  meta, _ = run(tmp_path, corpus)
  for split in shards.SPLITS:
    for i, shard in enumerate(meta['splits'][split]['shards']):
      for kind in ('tokens', 'offsets'):
        content = (tmp_path / split / f'{i:05d}.{kind}.npy').read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert shard[f'{kind}_sha256'] == digest
  files = [path for path in tmp_path.rglob('*') if path.is_file()]
  files.remove(tmp_path / 'meta.json')
  found = shards.verify(tmp_path)
  assert found.files == len(files) and found.unknown == 0
  assert found.size == sum(path.stat().st_size for path in files)


def test_filters_are_counted_and_part_of_the_settings(tmp_path):
  long = ['lines of text that are long enough ' * 9, 'also long ' * 30]
  documents = [f'{n} menu\n{n} {long[n % 2]}' for n in range(60)]
  source = write_corpus(tmp_path / 'a', [*documents, 'short', 'x', 'y'])
  meta, _ = run(tmp_path / 'data', source, filters=['long_paragraphs'])
  full = 'long_paragraphs:min_characters=200,min_words=0'
  assert meta['config']['filters'] == [full]
  assert meta['rejects']['short'] == 3 and meta['records'] == 67
  tokenizer = Tokenizer((tmp_path / 'data' / 'tokenizer.model').read_bytes())
  for split in shards.SPLITS:
    for document in documents_in(tmp_path / 'data', split):
      assert 'menu' not in tokenizer.decode(document)
  run(tmp_path / 'data', source, filters=[full])
  assert 'of 67: 3 bad_json' not in prepare_summary.summary(meta)
  assert 'rejected records of 67: 2 bad_json' in prepare_summary.summary(meta)


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
  meta, _ = run(tmp_path / 'data', f'wet:{path}', paragraphs=listed)
  tokenizer = Tokenizer((tmp_path / 'data' / 'tokenizer.model').read_bytes())
  found = [
      tokenizer.decode(document)
      for split in shards.SPLITS
      for document in documents_in(tmp_path / 'data', split)
  ]
  assert sorted(found) == sorted(lines[i].strip() for i in wanted)
  digest = hashlib.sha256((tmp_path / 'list.csv').read_bytes()).hexdigest()
  assert meta['config']['paragraph_ids'] == digest
  with pytest.raises(ValueError, match='prepared with paragraph_ids='):
    run(tmp_path / 'data', f'wet:{path}')
  with pytest.raises(ValueError, match='SHA-256'):
    run(
        tmp_path / 'other',
        f'wet:{path}',
        paragraphs=listed,
        paragraphs_sha256='0' * 64,
    )
  assert not (tmp_path / 'other').exists()


def test_damage_is_counted_and_never_fatal(tmp_path):
  pytest.importorskip('fastwarc')
  parts = packed(wet(*texts(60), b'\xff', b' ', 'z' * 5000))
  parts[3] = parts[3][:40]
  last = packed(wet('cut short'))[1][:-20]
  (tmp_path / 'a.wet.gz').write_bytes(b''.join(parts) + last)
  meta, _ = run(
      tmp_path / 'data',
      f'wet:{tmp_path}/a.wet.gz',
      max_document_bytes=4999,
      workers=2,
  )
  assert meta['rejects'] == {
      'damaged_record': 2,
      'empty': 1,
      'not_utf8': 1,
      'too_long': 1,
  }
  assert meta['records'] == 64
  documents = sum(split['documents'] for split in meta['splits'].values())
  assert documents == 59


def test_checksums_of_the_source(tmp_path, corpus):
  source = write_corpus(tmp_path / 'a', texts(60))
  digest = hashlib.sha256((tmp_path / 'a').read_bytes()).hexdigest()
  (tmp_path / 'good').write_text(f'{digest}  a\n')
  (tmp_path / 'bad').write_text(f'{digest[::-1]}  a\n')
  with pytest.raises(ValueError, match='has the SHA-256'):
    run(tmp_path / 'data', source, source_checksums=str(tmp_path / 'bad'))
  assert not (tmp_path / 'data').exists()
  _, lines = run(
      tmp_path / 'data', source, source_checksums=str(tmp_path / 'good')
  )
  assert 'checksums agree' in lines[0]
  with pytest.raises(ValueError, match='no files of its own'):
    run(tmp_path / 'b', 'hf:a/b', source_checksums=str(tmp_path / 'good'))


class TestRealFiles:
  """Samples of public corpora, which are no part of the project."""

  @pytest.fixture(autouse=True)
  def there(self):
    if not SHARED.is_dir():
      pytest.skip(f'there is no {SHARED}')

  def test_a_wet_file(self, tmp_path):
    source = f'wet:{SHARED}/wet/whirlwind.warc.wet.gz'
    meta, _ = run(tmp_path, source, vocab_size=600, validation_fraction=0)
    assert meta['splits']['train']['documents'] == 1
    assert meta['rejects'] == {}

  def test_c4(self, tmp_path):
    source = f'jsonl:{SHARED}/c4-samples/c4_demo.jsonl'
    meta, _ = run(tmp_path, source, vocab_size=800, tokenizer_bytes=10**5)
    assert sum(s['documents'] for s in meta['splits'].values()) == 300
    assert meta['rejects'] == {}

  def test_common_crawl_with_filters(self, tmp_path):
    pytest.importorskip('py3langid')
    source = f'jsonl:{SHARED}/commoncrawl-dolma-2019-30/CC-MAIN*.gz'
    meta, _ = run(
        tmp_path,
        source,
        vocab_size=1000,
        tokenizer_bytes=10**5,
        filters=['long_paragraphs', 'english'],
    )
    rejects, documents = meta['rejects'], meta['splits']['train']['documents']
    assert rejects['empty'] == 27 and meta['records'] == 697
    assert rejects['short'] > 100 and rejects['not_english'] > 100
    assert documents > 50


# --- the binary ---


def command(python, *flags):
  return [python, '-m', 'experiments.prepare_data', *flags]


# Suspends itself as soon as that training shard is written: at a random moment
# it might be done before a test, on a busy machine, has struck.
HALTS = """
import os, signal, sys, time
from codistill_jax.data import shards
halt_after = int(sys.argv.pop(1))
write_shard = shards.write_shard
def write_and_halt(data_dir, split, shard, *rest):
  found = write_shard(data_dir, split, shard, *rest)
  if (split, shard) == ('train', halt_after):
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(float(os.environ.get('WORK_LEFT', 0)))
  return found
shards.write_shard = write_and_halt
from experiments import cli, prepare_data
if __name__ == '__main__':
  cli.run(prepare_data.main)
"""


# Gets SIGTERM from the system while it trains a tokenizer: after so much work
# (processor time), not at a time when it might be done.
TRAINS = """
import ctypes, sentencepiece, signal
trainer = sentencepiece.SentencePieceTrainer
train = trainer.train
def train_and_be_signalled(**kwargs):
  libc, timer = ctypes.CDLL(None), ctypes.c_void_p()
  event = (ctypes.c_long * 8)(0, signal.SIGTERM)
  seconds = (ctypes.c_long * 4)(0, 0, 1, 0)
  cpu_time = 2  # CLOCK_PROCESS_CPUTIME_ID
  assert not libc.timer_create(cpu_time, event, ctypes.byref(timer))
  assert not libc.timer_settime(timer, 0, seconds, None)
  train(**kwargs)
trainer.train = train_and_be_signalled
from experiments import cli, prepare_data
if __name__ == '__main__':
  cli.run(prepare_data.main)
"""


def halting(python, shard, *flags):
  return [python, '-c', HALTS, str(shard), *flags]


def until_halted(process):
  def halted():
    assert process.poll() is None
    stat = pathlib.Path(f'/proc/{process.pid}/stat').read_text()
    return stat.rpartition(')')[2].split()[0] == 'T'

  until(halted)


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """A corpus for the binary: its flags, and what they should lead to."""
  folder = tmp_path_factory.mktemp('large')
  source = write_corpus(folder / 'a', texts(12_000))
  run(folder / 'model', source, max_documents=200)
  options = {
      'tokenizer': folder / 'model' / 'tokenizer.model',
      'vocab_size': None,
      'shard_tokens': 1000,
  }
  run(folder / 'whole', source, **options)
  flags = [
      f'--source={source}',
      f'--tokenizer={options["tokenizer"]}',
      '--validation_fraction=0.2',
      '--shard_tokens=1000',
  ]

  def finish(output):
    _, lines = run(output, source, **options)
    assert lines[0].startswith('Continuing in')
    assert contents(output) == contents(folder / 'whole')

  return flags, finish


def test_kill_9_and_the_same_command_again(tmp_path, large, python):
  flags, finish = large
  output = tmp_path / 'killed'
  process = subprocess.Popen(
      halting(python, 1, f'--output={output}', *flags),
      cwd=ROOT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
  )
  try:
    until_halted(process)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert not (output / 'meta.json').exists()
  finish(output)


def is_gone(session):
  """Whether no process of a session is left."""
  try:
    os.killpg(session, 0)
  except ProcessLookupError:
    return True
  return False


def workers_of(parent):
  """The worker processes of a process, from /proc."""
  children = []
  for path in pathlib.Path(f'/proc/{parent}/task').glob('*/children'):
    children += path.read_text().split()
  return [
      int(child)
      for child in children
      if b'spawn_main' in pathlib.Path(f'/proc/{child}/cmdline').read_bytes()
  ]


def test_a_killed_worker_is_a_clear_error_and_costs_nothing(
    tmp_path, large, python
):
  flags, finish = large
  output = tmp_path / 'out'
  with subprocess.Popen(
      halting(python, 0, f'--output={output}', '--workers=2', *flags),
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
  ) as process:
    until_halted(process)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=PATIENCE)
  assert process.returncode == 75
  assert errors.startswith('error: A worker process ended by signal 9')
  assert len(errors.splitlines()) == 1
  until(lambda: is_gone(process.pid))
  finish(output)


@pytest.mark.skipif(sys.platform != 'linux', reason='timers, and /proc')
@pytest.mark.parametrize('phase', ['training', 'documents'])
def test_a_signal_ends_it_at_once(tmp_path, large, python, phase):
  """In C++, where a tokenizer is trained, and in Python."""
  flags, _ = large
  source = tmp_path / 'a'
  if phase == 'training':
    words = [
        f'{n:x}' * 3 for n in random.Random(0).sample(range(10**9), 300_000)
    ]
    documents = [' '.join(words[n : n + 20]) for n in range(0, 300_000, 20)]
    write_corpus(source, documents)
    flags, start = ['--vocab_size=30000'], [python, '-c', TRAINS]
  else:
    source = pathlib.Path(flags[0].partition(':')[2])
    start = halting(python, 0)
  # What is left to do takes longer than to leave, on any machine.
  environment = os.environ | {'WORK_LEFT': '1000'}
  with subprocess.Popen(
      [
          *start,
          *flags,
          f'--source=jsonl:{source}',
          f'--output={tmp_path}/out',
          '--workers=2',
      ],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
  ) as process:
    try:
      if phase == 'documents':
        until_halted(process)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
      output, _ = process.communicate(timeout=PATIENCE)
    finally:
      process.kill()
  assert process.returncode == 143
  until(lambda: is_gone(process.pid))
  assert output.splitlines()[-1].startswith('stopped; the same command goes on')
  assert not (tmp_path / 'out' / 'meta.json').exists()


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory, python):
  """Runs the binary on lists of flags, in one process: by name."""

  def of(cases):
    folder = tmp_path_factory.mktemp('cases')
    (folder / 'in.json').write_text(json.dumps(cases))
    script = ROOT / 'tests' / 'run_cases.py'
    subprocess.run(
        [python, script, 'prepare_data', folder / 'in.json', folder / 'out'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        check=True,
    )
    return json.loads((folder / 'out').read_text())

  return of


def test_the_binary_prints_a_summary_and_verifies(tmp_path, corpus, outcomes):
  for name in 'ab':
    run(tmp_path / name, corpus)
  path = tmp_path / 'b' / 'train' / '00000.tokens.npy'
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  shards.open_tokens(tmp_path / 'b', 'train')  # Which compares sizes only.
  found = outcomes(
      {
          'again': [
              f'--output={tmp_path}/a',
              f'--source={corpus}',
              '--vocab_size=320',
              '--validation_fraction=0.2',
              '--shard_tokens=500',
          ],
          'good': [f'--output={tmp_path}/a', '--verify'],
          'damaged': [f'--output={tmp_path}/b', '--verify'],
      }
  )
  status, output = found['again']
  assert status == 0 and 'nothing to do' in output
  for part in ('train: ', 'pieces per word', '2 bad_json', '320 word pieces'):
    assert part in output
  status, output = found['good']
  assert status == 0 and 'as they were written' in output
  status, output = found['damaged']
  assert status == 1
  assert output.startswith(f'error: {path} is damaged (SHA-256')


BAD_FLAGS = {
    'no output': ([], '--output is missing'),
    'stray': (['--output={}/o', 'stray'], "unexpected argument 'stray'"),
    'source': (['--output={}/o', '--source=ftp:a'], "Unknown source 'ftp:a'"),
    'no file': (['--output={}/o', '--source=text:{}/none'], 'There is no file'),
    'tokenizer': (['--output={}/o', '--tokenizer={}/none'], 'No such file'),
    'file': (['--output={}/file/o'], 'Not a directory'),
    'filter': (['--output={}/o', '--filter=x'], "no filter 'x'"),
    'list': (['--output={}/o', '--paragraph_ids={}/file'], 'selects from WET'),
    'verify': (['--output={}/o', '--verify'], 'holds no prepared data'),
    'hub': (['--output={}/o', '--source=hf:a/b'], 'Cannot read hf:a/b'),
}


@pytest.fixture(scope='module')
def refused(tmp_path_factory, outcomes):
  folder = tmp_path_factory.mktemp('bad')
  (folder / 'file').touch()
  return outcomes(
      {
          name: [flag.format(folder) for flag in given]
          for name, (given, _) in BAD_FLAGS.items()
      }
  )


@pytest.mark.parametrize('name', BAD_FLAGS)
def test_bad_input_is_one_line_and_status_1(refused, name):
  status, output = refused[name]
  assert status == 1
  assert output.startswith('error: ') and BAD_FLAGS[name][1] in output
  assert len(output.splitlines()) == 1


def test_an_unknown_flag_is_status_1(python):
  done = subprocess.run(
      command(python, '--vocabulary=3'),
      cwd=ROOT,
      capture_output=True,
      text=True,
  )
  assert done.returncode == 1
  assert "Unknown command line flag 'vocabulary'" in done.stderr
  assert 'Traceback' not in done.stderr
