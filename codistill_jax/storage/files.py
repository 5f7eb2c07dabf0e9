"""Small files on any backend of `etils.epath`, as on a file system.

A file is replaced as a whole. A bucket has no directories, cannot rename, and
its clients raise errors of their own and remember listings: here a missing file
is a FileNotFoundError, whatever else a backend refuses is an OSError, and a
look is a look.

Buckets are reached through fsspec (`s3fs`, `gcsfs`), also where TensorFlow is
installed, which epath would prefer and which does not know all of them.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, NoReturn

from etils import epath

PathLike = str | os.PathLike[str]

# Read by epath when it meets its first bucket.
os.environ.setdefault('EPATH_USE_TF', '0')

# JSON has no such numbers; these strings stand for them.
_NON_FINITE = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}
_CHUNK_BYTES = 4 << 20
SMALL_BYTES = 32 << 20  # Of a file that is read as a whole.
_DEEPEST = 50  # JSON in JSON.
# Mistakes of a caller or an installation: no later try will do better.
_MISTAKES = (
    ImportError,
    TypeError,
    AttributeError,
    NotImplementedError,
    ValueError,
)

_CODES = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
    NotADirectoryError: errno.ENOTDIR,
    IsADirectoryError: errno.EISDIR,
    TimeoutError: errno.ETIMEDOUT,
    OSError: errno.EIO,
}


class RefusedError(ValueError):
  """A file is not read, as it is not what may be read."""


class Digest(NamedTuple):
  """Identity of the content of a file: its size in bytes, and SHA-256."""

  size: int
  sha256: str


# What epath knows: the packages behind it, and our extra that installs them.
_STORES = {
    's3': ('s3fs', "'codistill_jax[s3]'"),
    'gs': ('gcsfs', "'codistill_jax[gcs]'"),
    'az': ('adlfs', 'adlfs'),
    'hf': ('huggingface_hub', 'huggingface_hub'),
}


def is_remote(path: PathLike) -> bool:
  """Returns whether a path names an object store (`gs://...`), not a disk."""
  return '://' in os.fspath(path)


def absolute(path: PathLike) -> str:
  """Returns a path that means the same everywhere on this machine.

  `~` is the home directory; the name of an object store is left alone.

  Raises:
    ValueError: If it is neither a path nor an object in a store that can be
      reached: `s3:/lab/run` (one slash), `s4://lab/run`, `/s3/lab`.
  """
  path = os.fspath(path)
  if not is_remote(path):
    path = os.path.abspath(os.path.expanduser(path))
    for part in path.split('/'):
      if part.removesuffix(':') in _STORES and part.endswith(':'):
        raise ValueError(
            f'{path} has a directory called {part!r}; for an object store write'
            f' {part}//<bucket>/<path>, and call a directory something else'
        )
    if path.split('/')[1] in _STORES:
      raise ValueError(
          f'{path} would be taken for {path.split("/")[1]}://...: write that'
          ' for an object store, or choose another directory'
      )
    return path
  scheme, _, rest = path.partition('://')
  if scheme not in _STORES or not rest.strip('/'):
    raise ValueError(
        f'{path} is no place that is known; write'
        f' {", ".join(f"{s}://<bucket>/<path>" for s in ("s3", "gs"))}, or a'
        ' path of a disk'
    )
  _connect(scheme)
  return path


def on_disk(path: PathLike) -> pathlib.Path:
  """Returns an absolute path of what is mapped into memory.

  Raises:
    ValueError: If it is in an object store.
  """
  path = absolute(path)
  if is_remote(path):
    raise ValueError(
        f'{path} is in an object store, but has to be on a disk of this machine'
        ' (it is mapped into memory); give a directory, and copy it'
    )
  return pathlib.Path(path)


@functools.cache
def _connect(scheme: str) -> None:
  """Prepares for a store: its client is there, and remembers no listing.

  Else a reader would not see what another process writes, or only a part: the
  size of an object is taken from a listing, too.
  """
  import fsspec  # Here: nobody else waits for it.

  package, extra = _STORES[scheme]
  try:
    protocols = fsspec.get_filesystem_class(scheme).protocol
  except ImportError:
    raise ValueError(
        f'{package} is missing, without which {scheme}:// is out of reach; pip'
        f' install {extra}'
    ) from None
  for name in (protocols,) if isinstance(protocols, str) else protocols:
    settings = fsspec.config.conf.setdefault(name, {})
    settings.setdefault('use_listings_cache', False)


def _path(path: PathLike) -> epath.Path:
  """Returns a path of any backend, ready for use."""
  if is_remote(path):
    _connect(os.fspath(path).partition('://')[0])
  return epath.Path(path)


def make_directory(path: PathLike) -> None:
  """Makes a directory, if it is missing; an object store has none."""
  if not is_remote(path):
    epath.Path(path).mkdir(parents=True, exist_ok=True)


def check_writable(directory: PathLike) -> None:
  """Makes a directory; raises ValueError if that will never be possible.

  What may pass, such as a full disk, is no error.
  """
  directory = _path(directory)
  try:
    make_directory(directory)
    probe = directory / '.probe'
    with as_os_errors():
      probe.write_bytes(b'')
    remove(probe)
  except OSError as e:
    if isinstance(e, _REFUSED) or e.errno in (errno.EROFS, errno.ENAMETOOLONG):
      raise ValueError(
          f'{directory} cannot be written ({one_line(e)}); choose another'
          ' directory, or see to its permissions'
      ) from e


_REFUSED = (
    PermissionError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
)

# --- Errors ------------------------------------------------------------------


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
  """Turns what a backend raises (of TensorFlow, of a cloud) into OSError."""
  try:
    yield
  except OSError as e:
    if e.errno is None:  # Of a client: it has words only.
      code = next((n for kind, n in _CODES.items() if isinstance(e, kind)))
      raise OSError(code, one_line(e)) from e
    raise
  except _MISTAKES:
    raise
  except Exception as e:
    reason = one_line(e)
    if type(e).__name__ in ('NotFoundError', 'NotFound'):
      raise FileNotFoundError(errno.ENOENT, reason) from e
    raise OSError(errno.EIO, reason) from e


def one_line(error: BaseException) -> str:
  """Returns what an error says, without line breaks."""
  if isinstance(error, OSError) and error.strerror:
    return ' '.join(str(error.strerror).split())
  text = str(error).partition('[tensorstore_spec=')[0]  # A page of JSON.
  return ' '.join(text.split()) or type(error).__name__


# --- Files -------------------------------------------------------------------


def names(directory: PathLike) -> list[str]:
  """Returns the names in a directory; [] if there is no such directory.

  Raises:
    OSError: If the file system does not tell.
  """
  directory = _path(directory)
  try:
    with as_os_errors():
      return [path.name for path in directory.iterdir()]
  except (FileNotFoundError, NotADirectoryError):
    return []


def is_step(name: str) -> bool:
  """Returns whether a name is that of a directory of a step.

  No state has done more updates than an int32 counts.
  """
  return bool(re.fullmatch('0|[1-9][0-9]{0,9}', name)) and int(name) < 1 << 31


def exists(path: PathLike) -> bool:
  """Returns whether a file is there.

  Raises:
    OSError: If the file system does not tell. (`Path.exists` says no then; a
      checkpoint must not be deleted for that.)
  """
  path = _path(path)
  if is_remote(path):
    with as_os_errors():
      return path.exists()
  try:
    os.stat(path)
  except OSError as e:
    if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
      return False
    raise
  return True


@contextlib.contextmanager
def opened(path: PathLike, most: int | None = None) -> Iterator[BinaryIO]:
  """Opens a file that others may have made, for reading.

  Args:
    path: A link to a file is none; what would block (a FIFO) neither.
    most: The size in bytes beyond which it is not read.

  Raises:
    RefusedError: If it is no regular file, or larger.
    OSError: If it is not there, or the file system refuses to give it.
  """
  path = _path(path)
  with as_os_errors():
    if is_remote(path):
      # fsspec's own `readline` takes no limit.
      file = io.BufferedReader(path.open('rb'))
    else:
      mode, size = _mode_and_size(os.lstat(path))
      if stat.S_ISREG(mode):
        # Whatever has come in its place meanwhile.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.fdopen(os.open(path, flags), 'rb')
        mode, size = _mode_and_size(os.fstat(file.fileno()))
      if not stat.S_ISREG(mode):
        raise RefusedError(f'{os.fspath(path)} is no regular file')
      if most is not None and size > most:
        file.close()
        raise _too_large(path, most)
    with file:
      yield file


def _mode_and_size(status: os.stat_result) -> tuple[int, int]:
  return status.st_mode, status.st_size


def _too_large(path: PathLike, most: int) -> RefusedError:
  return RefusedError(
      f'{os.fspath(path)} has more than the {most} bytes that are read of it'
  )


def read_bytes(path: PathLike, most: int = SMALL_BYTES) -> bytes:
  """Reads all of a small file; raises as `opened`."""
  with opened(path, most) as f:
    data = f.read(most + 1)
  if len(data) > most:
    raise _too_large(path, most)
  return data


def read_text(path: PathLike) -> str:
  """Reads a text of at most a million bytes.

  Raises:
    ValueError: If it is larger or no text; and as `opened`.
    OSError: As of `opened`.
  """
  try:
    return read_bytes(path, 1_000_000).decode()
  except UnicodeDecodeError as e:
    raise RefusedError(f'{os.fspath(path)} is no text: {e}') from None


def content(path: PathLike) -> bytes:
  """Returns all of a file of our own or of the user's, through a link too."""
  with as_os_errors():
    return _path(path).read_bytes()


def size(path: PathLike) -> int:
  """Returns the size of a file in bytes; raises OSError as `exists`."""
  with as_os_errors():
    return _path(path).stat().length


def modified(path: PathLike) -> float:
  """Returns when a file was written, Unix seconds; 0 if it is not there."""
  path = _path(path)
  client = _client(path)
  with as_os_errors(), contextlib.suppress(FileNotFoundError):
    if client is None:
      return os.stat(path).st_mtime
    return client.modified(os.fspath(path)).timestamp()
  return 0.0


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
  """Turns errors into OSError; one of a missing object means its bucket."""
  try:
    with as_os_errors():
      yield
  except FileNotFoundError as e:
    if not is_remote(path):
      raise
    bucket = '/'.join(os.fspath(path).split('/')[:3])
    raise FileNotFoundError(
        errno.ENOENT,
        f'there is no bucket {bucket}, or none that this process may see; make'
        f' it, or choose another ({one_line(e)})',
    ) from e


def write_bytes(path: PathLike, data: bytes, *, sync: bool = False) -> None:
  """Replaces a file as a whole: a reader sees the old bytes or the new ones.

  Args:
    path: Which; the directories that it needs are made.
    data: All of it.
    sync: Whether that also holds after a power cut; takes a disk some time.
  """
  path = _path(path)
  with _writing(path):
    make_directory(path.parent)
    if is_remote(path):
      # An object appears as a whole, and cannot be renamed at one stroke.
      path.write_bytes(data)
      return
    # A name of its own per call: two writers must not share a temporary file.
    temporary = path.parent / f'.{path.name}.{secrets.token_hex(4)}.tmp'
    try:
      with temporary.open('wb') as f:
        f.write(data)
      if sync:
        to_disk(temporary)
      temporary.replace(path)
      if sync:
        to_disk(path.parent)
    except BaseException:
      with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
      raise


def create(path: PathLike, data: bytes) -> bool | None:
  """Creates an object unless it is there, however many try at once.

  Returns:
    Whether this call did. None where that cannot be relied on: on a disk, and
    in a store that takes no such condition (or says nothing of it); there it
    may have been written over.
  """
  path = _path(path)
  name = os.fspath(path)
  client = _client(path)
  if client is None or not name.startswith(('s3://', 'gs://')):
    return None
  for again in (False, True):
    try:
      with _writing(path):
        client.pipe_file(name, data, mode='create')
    except FileExistsError:
      return again  # The second time it has to be refused.
    except OSError as e:
      if 'not implemented' in str(e).lower():
        return None
      raise
  return None


def to_disk(path: PathLike) -> None:
  """Waits until a local file, or the names in a directory, are on the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  except OSError as e:
    if e.errno != errno.EINVAL:  # There is nothing to wait for.
      raise
  finally:
    os.close(handle)


def remove_leftovers(directory: PathLike, older_than: float = 0.0) -> int:
  """Deletes what writers that were killed left half-written; counts it.

  Only a lease is renewed at any time, so what may be one under way stays.

  Args:
    directory: Where this process alone writes.
    older_than: Seconds; for a directory where others may be writing now.
  """
  found = [
      path
      for path in (epath.Path(directory) / name for name in names(directory))
      if re.fullmatch(r'\.(?!lease\.).+\.[0-9a-f]{8}\.tmp', path.name)
      and not (older_than and time.time() - path.stat().mtime < older_than)
  ]
  for path in found:
    remove(path)
  return len(found)


def remove(path: PathLike) -> None:
  """Deletes a file, if it is there."""
  path = _path(path)
  client = _client(path)
  with as_os_errors(), contextlib.suppress(FileNotFoundError):
    if client is None:
      path.unlink()
    else:  # Its `rm`, as that of `epath`, takes brackets for a pattern.
      client.rm_file(os.fspath(path))


def remove_tree(path: PathLike) -> None:
  """Deletes a directory and all in it, if it is there."""
  path = _path(path)
  client = _client(path)
  with as_os_errors():
    if client is None:
      path.rmtree(missing_ok=True)
    else:  # As above.
      for name in client.find(os.fspath(path)):
        client.rm_file(name)


def digest(
    path: PathLike, into: PathLike | None = None, most: int | None = None
) -> Digest:
  """Reads a file once, in pieces.

  Args:
    path: The file; of others, if there is a `most`.
    into: Where it is copied on the way, if anywhere.
    most: As of `opened`, which raises likewise.
  """
  sha256, size = hashlib.sha256(), 0
  with as_os_errors(), contextlib.ExitStack() as stack:
    source = stack.enter_context(
        _path(path).open('rb') if most is None else opened(path, most)
    )
    sink = None
    if into is not None:
      into = _path(into)
      make_directory(into.parent)
      sink = stack.enter_context(into.open('wb'))
    while chunk := source.read(_CHUNK_BYTES):
      sha256.update(chunk)
      size += len(chunk)
      if most is not None and size > most:
        raise _too_large(path, most)
      if sink is not None:
        sink.write(chunk)
  return Digest(size, sha256.hexdigest())


def _client(path: epath.Path) -> Any:
  """Returns the client of fsspec behind a path that is not local, if any."""
  file_system = getattr(getattr(path, '_backend', None), 'fs', None)
  if not is_remote(path) or file_system is None:
    return None
  with as_os_errors():
    return file_system(path)


# --- JSON --------------------------------------------------------------------


def write_json(path: PathLike, tree: Any, *, sync: bool = False) -> None:
  """Replaces a file by `tree` as JSON; NaN and infinities become strings.

  `sync` as of `write_bytes`.
  """
  write_bytes(path, as_json(tree), sync=sync)


def as_json(tree: Any) -> bytes:
  """Returns a tree as JSON; NaN and infinities become strings."""
  text = json.dumps(_encode_numbers(tree), indent=2, allow_nan=False)
  return (text + '\n').encode()


class Kind(NamedTuple):
  """What a value of parsed JSON has to be: its name, and the test."""

  name: str
  test: Callable[[Any], bool]


WHOLE = Kind('a whole number >= 0', lambda x: type(x) is int and x >= 0)
NUMBER = Kind('a finite number', lambda x: _is_number(x) and math.isfinite(x))
VALUE = Kind('a number', lambda x: _is_number(x))  # Also one like NaN.
TIME = Kind('Unix seconds', lambda x: _is_number(x) and abs(x) < _LAST_SECOND)
TEXT = Kind('a text', lambda x: isinstance(x, str))
PLACE = Kind('a path', lambda x: isinstance(x, str) and _is_place(x))
ANY = Kind('anything', lambda x: True)
_LAST_SECOND = 253402300800.0  # Of the year 9999.

# A list of one kind; an object with kinds by key, where `...` stands for all
# keys that are not named, which are left out otherwise.
Kinds = Kind | list | Mapping


def _is_place(x: str) -> bool:
  scheme = x.partition('://')[0] if is_remote(x) else 's3'
  with contextlib.suppress(UnicodeEncodeError):
    return scheme in _STORES and b'\0' not in os.fsencode(x)
  return False


def _is_number(x: Any) -> bool:
  return type(x) in (int, float)


def read_json(
    path: PathLike, kinds: Mapping[Any, Kinds] | None = None
) -> dict[str, Any] | None:
  """Reads a JSON object, by whoever it was written; None without such a file.

  Args:
    path: The file.
    kinds: What its values are; None: anything. Null is as good as no value.

  Raises:
    ValueError: If the file holds anything but one such object; names it.
    RefusedError: As of `opened`.
  """
  try:
    data = read_bytes(path)
  except (FileNotFoundError, NotADirectoryError):
    return None
  try:
    tree = parse_json(data)
  except ValueError as e:  # Also of bytes that are no text.
    raise ValueError(f'Expected JSON in {os.fspath(path)}, but: {e}.') from None
  if not isinstance(tree, dict):
    raise ValueError(
        f'Expected a JSON object in {os.fspath(path)}, got'
        f' {type(tree).__name__}.'
    )
  return tree if kinds is None else _checked(tree, kinds, os.fspath(path))


def _checked(tree: Any, kind: Kinds, where: str) -> Any:
  """Returns parsed JSON of a kind, without nulls; raises ValueError if not."""
  if isinstance(kind, Mapping) and isinstance(tree, dict):
    return {
        k: _checked(v, kind.get(k) or kind[...], f'{where}: {k[:40]}')
        for k, v in tree.items()
        if v is not None and (k in kind or ... in kind)
    }
  if isinstance(kind, list) and isinstance(tree, list):
    return [_checked(x, kind[0], where) for x in tree]
  if kind is TEXT and type(tree) is float:
    tree = encode_number(tree)  # A text that `parse_json` took for a number.
  if isinstance(kind, Kind) and kind.test(tree):
    return tree
  name = kind.name if isinstance(kind, Kind) else _CONTAINERS[type(kind)]
  raise ValueError(f'{where} is {str(tree)[:30]!r}, expected {name}')


_CONTAINERS = {dict: 'an object', list: 'a list'}


def parse_json(data: bytes) -> Any:
  """Parses what `write_json` may have written.

  Raises:
    ValueError: If it is no JSON, or too deep; or has a number that is not
      finite or beyond 64 bits, but for what `encode_number` gives.
  """
  try:
    return _decoded(_JSON.decode(data.decode()), 0)
  except RecursionError:
    raise ValueError('it is too deep') from None


def _refuse(constant: str) -> NoReturn:
  raise ValueError(f'{constant} is no JSON')


def _whole(digits: str) -> int:
  number = int(digits)
  if not -(1 << 63) < number < 1 << 63:
    raise ValueError('a number of it has more than 64 bits')
  return number


_JSON = json.JSONDecoder(parse_constant=_refuse, parse_int=_whole)


def _decoded(tree: Any, depth: int) -> Any:
  """Undoes `encode_number` in a tree of JSON values, which it checks."""
  if isinstance(tree, str):
    return _NON_FINITE.get(tree, tree)
  if isinstance(tree, dict | list) and depth > _DEEPEST:
    raise ValueError('it is too deep')
  if isinstance(tree, dict):
    values = tree.values()
    if {*map(type, values)} <= {float, int} and all(map(math.isfinite, values)):
      return tree  # Nearly every record.
    return {k: _decoded(v, depth + 1) for k, v in tree.items()}
  if isinstance(tree, list):
    return [_decoded(v, depth + 1) for v in tree]
  if type(tree) is float and not math.isfinite(tree):
    raise ValueError('a number of it is not finite')
  return tree


def encode_number(value: float) -> float | str:
  """Returns a number as JSON can hold it: NaN and infinities become strings."""
  if math.isnan(value):
    return 'NaN'
  if math.isinf(value):
    return 'Infinity' if value > 0 else '-Infinity'
  return value


def _encode_numbers(tree: Any) -> Any:
  if isinstance(tree, float):
    return encode_number(tree)
  if isinstance(tree, Mapping):
    return {k: _encode_numbers(v) for k, v in tree.items()}
  if isinstance(tree, list | tuple):
    return [_encode_numbers(v) for v in tree]
  return tree
