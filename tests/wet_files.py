"""WET files as Common Crawl makes them, written by hand, for tests."""

import gzip

INFO = b'Software-Info: a test\r\n'


def record(content, kind='conversion', uri='http://a/', length=None):
  """One WARC record; `length` is a Content-Length that is not true."""
  content = content if isinstance(content, bytes) else content.encode()
  length = len(content) if length is None else length
  head = (
      f'WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\n'
      'WARC-Date: 2017-03-23T00:00:00Z\r\n'
      'WARC-Record-ID: <urn:uuid:12345678-1234-1234-1234-123456789012>\r\n'
      f'Content-Type: text/plain\r\nContent-Length: {length}\r\n\r\n'
  )
  return head.encode() + content + b'\r\n\r\n'


def wet(*contents):
  """The records of a WET file: warcinfo and a conversion for each content."""
  return [record(INFO, 'warcinfo'), *map(record, contents)]


def packed(records):
  """As Common Crawl compresses them: a gzip member for each record."""
  return [gzip.compress(one) for one in records]


def write_wet(path, *contents):
  records = wet(*contents)
  records = packed(records) if path.suffix == '.gz' else records
  path.write_bytes(b''.join(records))
  return path
