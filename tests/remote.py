"""A bucket in memory, behind `s3://` paths: fsspec's, stricter.

Like an object store it has no directories, cannot rename, shows an object only
when its writer has closed it, and its client remembers listings.
"""

import contextlib
import importlib
import io
from typing import ClassVar

import fsspec
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from codistill_jax.storage import files


class Bucket(MemoryFileSystem):
  """All of it is one dict: `Bucket.store`.

  Attributes:
    request: Called with each request and its path; may raise, or take a while.
    lag: So many listings do not yet show an object.
    conditional: Whether it takes the condition that there be no object.
  """

  protocol = 's3'
  store: ClassVar = {}
  pseudo_dirs: ClassVar = ['']
  listings: ClassVar = {}
  request = staticmethod(lambda kind, path: None)
  lag = 0
  conditional = True
  unseen: ClassVar = {}

  @classmethod
  def _strip_protocol(cls, path):
    path = str(path).removeprefix('s3://').strip('/')
    return '/' + path if path else ''

  def mkdir(self, path, create_parents=True, **kwargs):
    """There are no directories."""

  def makedirs(self, path, exist_ok=False):
    """There are no directories."""

  def ls(self, path, detail=True, **kwargs):
    key = self._strip_protocol(path)
    if key not in self.listings or not self.dircache.use_listings_cache:
      self.request('list', key)
      self.listings[key] = [
          entry
          for entry in super().ls(path, detail=True, **kwargs)
          if not self._is_unseen(entry['name'])
      ]
    found = self.listings[key]
    return found if detail else sorted(entry['name'] for entry in found)

  def _is_unseen(self, path):
    left = self.unseen.get(path, 0)
    self.unseen[path] = left - 1
    return left > 0

  def info(self, path, **kwargs):
    self.request('look', path)
    return super().info(path, **kwargs)

  def rm_file(self, path):
    self.request('delete', path)
    super().rm_file(path)

  def invalidate_cache(self, path=None):
    self.listings.clear()

  def _open(self, path, mode='rb', **kwargs):
    path = self._strip_protocol(path)
    if mode == 'rb':
      self.request('read', path)
      if path not in self.store:
        raise FileNotFoundError(path)
      return _Download(self.store[path].getvalue())
    assert mode == 'wb', mode
    return _Upload(self, path)

  def pipe_file(self, path, value, mode='overwrite', **kwargs):
    path = self._strip_protocol(path)
    self.request('write', path)
    if mode == 'create' and self.conditional and path in self.store:
      raise FileExistsError(path)
    self.unseen.setdefault(path, self.lag)
    self.store[path] = MemoryFile(self, path, value)

  def rename(self, *args, **kwargs):
    raise NotImplementedError('a bucket cannot rename')

  mv = mv_file = move = rename


class _Download(io.BytesIO):

  def readline(self):
    """Takes no limit, as fsspec's files of real stores."""
    return super().readline()


class _Upload(io.BytesIO):

  def __init__(self, bucket, path):
    super().__init__()
    self._bucket, self._path = bucket, path

  def close(self):
    if self.closed:
      return
    data = self.getvalue()
    # First, as fsspec does: what is refused would be written once more when
    # Python collects it, which may be in the midst of another test.
    super().close()
    self._bucket.pipe_file(self._path, data)


def files_of(directory):
  """The files below a directory on any backend, by their path below it."""
  found = {}
  for name in files.names(directory):
    path = epath.Path(directory) / name
    if path.is_dir():
      found |= {f'{name}/{x}': p for x, p in files_of(path).items()}
    else:
      found[name] = path
  return found


@contextlib.contextmanager
def bucket(monkeypatch):
  """Makes `epath` open `s3://` paths in an empty `Bucket`; gives it."""
  registry = importlib.import_module('fsspec.registry')
  with monkeypatch.context() as patch:
    patch.setitem(registry._registry, 's3', Bucket)
    # With TensorFlow installed, epath would ask that, and that a cloud.
    patch.setattr(gpath, '_is_tf_installed', lambda: False)
    backend.fsspec_backend._get_filesystem.cache_clear()
    Bucket.store.clear()
    Bucket.listings.clear()
    Bucket.clear_instance_cache()
    Bucket.unseen.clear()
    try:
      yield fsspec.filesystem('s3')
    finally:
      backend.fsspec_backend._get_filesystem.cache_clear()
      Bucket.store.clear()
      Bucket.listings.clear()
