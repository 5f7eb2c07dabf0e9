"""Something to configure, for gin_utils_test.py."""


def leaf(size=1, name='x'):
  return (size, name)


def unused(size=1):
  return size


def strict(size):
  if size < 0:
    raise ValueError(f'size={size} is negative; set it to 0 or more')
  return size


class Root:

  def __init__(self, value=None, other=0):
    self.value, self.other = value, other
