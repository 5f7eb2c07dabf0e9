"""Files on any backend of `etils.epath`, with the errors of a file system.

A bucket has no directories, cannot rename, and its clients raise errors of
their own and remember listings. Here a missing file is a FileNotFoundError,
whatever else the backend refuses is an OSError, and a look is a look.
"""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from codistill_jax.storage.files import is_remote

_CHUNK_BYTES = 4 << 20
_PROBE_BYTES = 1 << 20
# Mistakes of a caller or an installation: no later try will do better.
_MISTAKES = (
    ImportError,
    TypeError,
    AttributeError,
    NotImplementedError,
    ValueError,
)
# Something is not there, or is something else.
ABSENCE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_SAID = {
    'RESOURCE_EXHAUSTED|No space left': errno.ENOSPC,
    'Disk quota': errno.EDQUOT,
    'File too large': errno.EFBIG,
    'PERMISSION_DENIED|Permission denied': errno.EACCES,
    'Read-only file system': errno.EROFS,
    'NOT_FOUND|No such file': errno.ENOENT,
}


class Digest(NamedTuple):
  """What identifies the content of a file: its size in bytes, and SHA-256."""

  size: int
  sha256: str


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
  """Turns what a backend raises (of TensorFlow, of a cloud) into OSError."""
  try:
    yield
  except OSError:
    raise
  except _MISTAKES:
    raise
  except Exception as e:
    reason = one_line(e)
    if type(e).__name__ in ('NotFoundError', 'NotFound'):
      raise FileNotFoundError(errno.ENOENT, reason) from e
    raise OSError(errno.EIO, reason) from e


def one_line(error: BaseException) -> str:
  """What an error says, without line breaks."""
  if isinstance(error, OSError) and error.strerror:
    return ' '.join(str(error.strerror).split())
  text = str(error).partition('[tensorstore_spec=')[0]  # A page of JSON.
  return ' '.join(text.split()) or type(error).__name__


def refusal_of(error: BaseException, said: str) -> OSError | None:
  """The OSError that an error is or means, in one line that begins with `said`.

  What TensorStore raises of a full disk is a ValueError with the number in its
  text. None if the error has nothing to do with a file system.
  """
  text = one_line(error)
  if isinstance(error, OSError):
    missing = isinstance(error, FileNotFoundError)
    code = error.errno or (errno.ENOENT if missing else errno.EIO)
    return OSError(code, f'{said}: {text}')
  number = re.search(r"os_error_code='(\d+)'", text)
  if number:
    code = int(number[1])
    return OSError(code, f'{said}: {os.strerror(code)}')
  for pattern, code in _SAID.items():
    if re.search(pattern, text):
      return OSError(code, f'{said}: {text}')
  return None


def names(directory: epath.PathLike) -> list[str]:
  """The names in a directory; [] if there is no such directory.

  Raises:
    OSError: If the file system does not tell.
  """
  directory = epath.Path(directory)
  _forget(directory)
  with as_os_errors():
    try:
      return [path.name for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
      return []
    except Exception as e:
      # TensorFlow has an error of its own for a missing directory.
      if type(e).__name__ != 'NotFoundError':
        raise
      return []


def exists(path: epath.PathLike) -> bool:
  """Whether a file is there.

  Raises:
    OSError: If the file system does not tell. (`Path.exists` says no then; a
      checkpoint must not be deleted for that.)
  """
  path = epath.Path(path)
  if is_remote(path):
    _forget(path.parent)
    with as_os_errors():
      return path.exists()
  try:
    os.stat(path)
  except (FileNotFoundError, NotADirectoryError):
    return False
  return True


def read_bytes(path: epath.PathLike) -> bytes:
  """All of a small file."""
  with as_os_errors():
    return epath.Path(path).read_bytes()


def write_bytes(path: epath.PathLike, data: bytes) -> None:
  """Writes a small file, and the directories that it needs."""
  path = epath.Path(path)
  with as_os_errors():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def remove(path: epath.PathLike) -> None:
  """Deletes a file, if it is there."""
  with as_os_errors():
    epath.Path(path).unlink(missing_ok=True)


def remove_tree(path: epath.PathLike) -> None:
  """Deletes a directory and all in it, if it is there."""
  _forget(epath.Path(path))
  with as_os_errors():
    epath.Path(path).rmtree(missing_ok=True)


def why_not_writable(directory: epath.PathLike) -> OSError | None:
  """What the file system says to a file in a local directory."""
  path = os.path.join(directory, '.probe')
  try:
    with open(path, 'wb') as f:
      f.write(bytes(_PROBE_BYTES))
    os.unlink(path)
  except OSError as e:
    with contextlib.suppress(OSError):
      os.unlink(path)
    return e
  return None


def digest(path: epath.PathLike, into: epath.PathLike | None = None) -> Digest:
  """Reads a file once, in pieces; copies it on the way if told where to."""
  path = epath.Path(path)
  sha256, size = hashlib.sha256(), 0
  with as_os_errors(), contextlib.ExitStack() as stack:
    source = stack.enter_context(path.open('rb'))
    sink = None
    if into is not None:
      into = epath.Path(into)
      into.parent.mkdir(parents=True, exist_ok=True)
      sink = stack.enter_context(into.open('wb'))
    while chunk := source.read(_CHUNK_BYTES):
      sha256.update(chunk)
      size += len(chunk)
      if sink is not None:
        sink.write(chunk)
  return Digest(size, sha256.hexdigest())


def _forget(path: epath.Path) -> None:
  """Makes a client of fsspec look again, instead of remembering a listing.

  Else a reader would never see what another process writes. There is no public
  way to it through `epath`; without it, nothing is forgotten.
  """
  file_system = getattr(getattr(path, '_backend', None), 'fs', None)
  if is_remote(path) and file_system is not None:
    with as_os_errors():
      file_system(path).invalidate_cache()
