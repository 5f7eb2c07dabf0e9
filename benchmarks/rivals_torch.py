"""The models of `benchmarks.rivals` in PyTorch, and a process that times them.

Written as one would write them for speed: the input product of a layer outside
the loop over time, gates split once, one table for all categories, channels
last, fused optimisers, no gradient for teachers, and one log softmax for both
terms of the loss. `python -m benchmarks.rivals_torch` reads requests, a JSON
object a line, and answers each by a line; `benchmarks.rivals` starts it.

Shape suffixes: B rows, T tokens, E embedding, D units, V vocabulary, K
categories.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Arrays = Mapping[str, np.ndarray]  # By path, 'lstm_0/x_kernel'.
_EPSILON = 1e-6


class Lstm(nn.Module):
  """A layer of `codistill_jax.models.lstm` over a window."""

  def __init__(self, arrays: Arrays, name: str):
    super().__init__()
    take = lambda key: _parameter(arrays[f'{name}/{key}'])
    self.x_weight = take('x_kernel')
    self.h_weight = take('h_kernel')
    self.x_scale = take('x_norm_scale')
    self.bias = take('bias')
    self.h_scale = take('h_norm_scale')
    self.c_scale = take('c_norm_scale')
    self.c_shift = take('c_norm_shift')
    self.cell = _cell

  def forward(self, x_TBE, carry, keep_TB1):
    """`(h_TBD, (c_BD, h_BD))`."""
    product = F.linear(x_TBE, self.x_weight)
    size = self.bias.shape
    inputs_TBF = F.layer_norm(product, size, self.x_scale, self.bias, _EPSILON)
    own = (self.h_weight, self.h_scale, self.c_scale, self.c_shift)
    c, h = carry
    outputs = []
    # Unbind, whose gradient is one stack; an index would add up T arrays.
    for inputs, keep in zip(inputs_TBF.unbind(0), keep_TB1.unbind(0)):
      c, h = self.cell(inputs, keep, c, h, *own)
      outputs.append(h)
    return torch.stack(outputs), (c, h)


def _cell(inputs_BF, keep_B1, c, h, h_weight, h_scale, c_scale, c_shift):
  """One token."""
  units = len(c_scale)
  c, h = c * keep_B1, h * keep_B1
  product = F.linear(h, h_weight)
  normed = F.layer_norm(product, h_scale.shape, h_scale, None, _EPSILON)
  gates, g = (normed + inputs_BF).split((3 * units, units), -1)
  f, i, o = gates.sigmoid().chunk(3, -1)
  c = f * c + i * g.tanh()
  out = F.layer_norm(c, c_scale.shape, c_scale, c_shift, _EPSILON)
  return c, o * out.tanh()


class LanguageModel(nn.Module):
  """`codistill_jax.models.lstm.LstmLanguageModel`."""

  def __init__(self, arrays: Arrays):
    super().__init__()
    self.embedding = _parameter(arrays['Embed_0/embedding'], transpose=False)
    count = sum(key.endswith('/h_kernel') for key in arrays)
    self.layers = nn.ModuleList(Lstm(arrays, f'lstm_{i}') for i in range(count))
    self.head_weight = _parameter(arrays['head_kernel'])
    self.head_bias = _parameter(arrays['head_bias'])

  def start(self, batch: dict[str, torch.Tensor]) -> list:
    """The carry before the first token."""
    shape = (batch['inputs'].shape[1], self.head_weight.shape[1])
    zeros = lambda: self.head_weight.new_zeros(shape)
    return [(zeros(), zeros()) for _ in self.layers]

  def forward(self, batch: dict[str, torch.Tensor], carry: list):
    """Logits (T B, V) and the new carry; the batch has time first."""
    x_TBD = F.embedding(batch['inputs'], self.embedding)
    after = []
    for layer, state in zip(self.layers, carry):
      x_TBD, state = layer(x_TBD, state, batch['keep'])
      after.append(state)
    logits = F.linear(x_TBD.flatten(0, 1), self.head_weight, self.head_bias)
    return logits, [(c.detach(), h.detach()) for c, h in after]


class ClickModel(nn.Module):
  """`codistill_jax.models.dnn.ClickModel`, whose tables are of one width."""

  def __init__(self, arrays: Arrays):
    super().__init__()
    count = sum(key.startswith('table_') for key in arrays)
    tables = [arrays[f'table_{k}'] for k in range(count)]
    self.table = _parameter(np.concatenate(tables), transpose=False)
    starts = np.cumsum([0] + [len(table) for table in tables[:-1]])
    self.register_buffer('starts', torch.tensor(starts))
    hidden = sum(key.endswith('kernel') for key in arrays) - 1
    names = [f'hidden_{i}' for i in range(hidden)] + ['logit']
    self.weights = nn.ParameterList(
        _parameter(arrays[f'{name}/kernel']) for name in names
    )
    self.biases = nn.ParameterList(
        _parameter(arrays[f'{name}/bias']) for name in names
    )

  def start(self, batch: dict[str, torch.Tensor]) -> list:
    """There is none."""
    del batch
    return []

  def forward(self, batch: dict[str, torch.Tensor], carry: list):
    """Logits (B,)."""
    found = F.embedding(batch['categories'] + self.starts, self.table)
    x = torch.cat([batch['integers'], found.flatten(1)], -1)
    for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
      x = F.relu(F.linear(x, weight, bias))
    return F.linear(x, self.weights[-1], self.biases[-1])[:, 0], carry


class Block(nn.Module):
  """`codistill_jax.models.resnet.Plain`."""

  def __init__(self, arrays: Arrays, name: str, stride: int):
    super().__init__()
    self.conv1 = _parameter(arrays[f'{name}/conv1/kernel'])
    self.conv2 = _parameter(arrays[f'{name}/conv2/kernel'])
    self.norm1 = _norm(arrays, f'{name}/norm1')
    self.norm2 = _norm(arrays, f'{name}/norm2')
    self.stride = stride

  def forward(self, x):
    y = F.conv2d(x, self.conv1, stride=self.stride, padding=1)
    y = F.relu(self.norm1(y), inplace=True)
    y = self.norm2(F.conv2d(y, self.conv2, padding=1))
    if self.stride > 1:
      missing = y.shape[1] - x.shape[1]
      x = x[:, :, :: self.stride, :: self.stride]
      x = F.pad(x, (0, 0, 0, 0, 0, missing))
    return F.relu(x + y)


class Bottleneck(nn.Module):
  """`codistill_jax.models.resnet.Bottleneck`."""

  def __init__(self, arrays: Arrays, name: str, stride: int):
    super().__init__()
    convs = [_parameter(arrays[f'{name}/conv{i}/kernel']) for i in (1, 2, 3)]
    self.conv1, self.conv2, self.conv3 = convs
    self.norm1 = _norm(arrays, f'{name}/norm1')
    self.norm2 = _norm(arrays, f'{name}/norm2')
    self.norm3 = _norm(arrays, f'{name}/norm3')
    self.stride = stride
    self.widens = f'{name}/shortcut_conv/kernel' in arrays
    if self.widens:
      self.shortcut = _parameter(arrays[f'{name}/shortcut_conv/kernel'])
      self.shortcut_norm = _norm(arrays, f'{name}/shortcut_norm')

  def forward(self, x):
    y = F.relu(self.norm1(F.conv2d(x, self.conv1)), inplace=True)
    y = F.conv2d(y, self.conv2, stride=self.stride, padding=1)
    y = F.relu(self.norm2(y), inplace=True)
    y = self.norm3(F.conv2d(y, self.conv3))
    if self.widens:
      x = self.shortcut_norm(F.conv2d(x, self.shortcut, stride=self.stride))
    return F.relu(x + y)


class ResNet(nn.Module):
  """`resnet20` and `resnet50` of `codistill_jax.models.resnet`."""

  def __init__(self, arrays: Arrays):
    super().__init__()
    self.stem = _parameter(arrays['stem_conv/kernel'])
    self.norm = _norm(arrays, 'stem_norm')
    names = sorted({k.split('/')[0] for k in arrays if k.startswith('stage')})
    self.large = 'stage1_block1/conv3/kernel' in arrays
    make = Bottleneck if self.large else Block
    strided = {f'stage{i}_block1' for i in (2, 3, 4)}
    self.blocks = nn.Sequential(
        *(make(arrays, name, 2 if name in strided else 1) for name in names)
    )
    self.head_weight = _parameter(arrays['head/kernel'])
    self.head_bias = _parameter(arrays['head/bias'])

  def start(self, batch: dict[str, torch.Tensor]) -> list:
    """There is none."""
    del batch
    return []

  def forward(self, batch: dict[str, torch.Tensor], carry: list):
    """Logits (B, C)."""
    stride, padding = (2, 3) if self.large else (1, 1)
    x = F.conv2d(batch['inputs'], self.stem, stride=stride, padding=padding)
    x = F.relu(self.norm(x))
    if self.large:
      x = F.max_pool2d(x, 3, stride=2, padding=1)
    x = self.blocks(x).mean((2, 3))
    return F.linear(x, self.head_weight, self.head_bias), carry


def _parameter(array: np.ndarray, transpose: bool = True) -> nn.Parameter:
  """Returns a parameter; kernels are laid out as torch has them."""
  tensor = torch.tensor(array)
  if tensor.ndim == 4:
    tensor = tensor.permute(3, 2, 0, 1)
    return nn.Parameter(tensor.contiguous(memory_format=torch.channels_last))
  kernel = transpose and tensor.ndim == 2
  return nn.Parameter(tensor.T.contiguous() if kernel else tensor)


def _norm(arrays: Arrays, name: str) -> nn.BatchNorm2d:
  norm = nn.BatchNorm2d(len(arrays[f'{name}/scale']), eps=1e-5, momentum=0.1)
  norm.weight = _parameter(arrays[f'{name}/scale'])
  norm.bias = _parameter(arrays[f'{name}/bias'])
  return norm


def _adam(model: nn.Module) -> torch.optim.Optimizer:
  return torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-8, fused=True)


def _momentum_sgd(model: nn.Module) -> torch.optim.Optimizer:
  kernels = [p for p in model.parameters() if p.ndim > 1]
  others = [p for p in model.parameters() if p.ndim <= 1]
  groups = [
      {'params': kernels, 'weight_decay': 1e-4},
      {'params': others, 'weight_decay': 0.0},
  ]
  return torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True)


def _softmax_loss(logits, labels, teacher_logits):
  if teacher_logits is None:
    return F.cross_entropy(logits, labels)
  log_q = F.log_softmax(logits, -1)
  soft_target = F.softmax(teacher_logits, -1)
  distill = -(soft_target * log_q).sum(-1).mean()
  return F.nll_loss(log_q, labels) + distill


def _sigmoid_loss(logits, labels, teacher_logits):
  loss = F.binary_cross_entropy_with_logits
  if teacher_logits is None:
    return loss(logits, labels)
  # Linear in the target: one pass for both terms would do, and is no faster.
  return loss(logits, labels) + loss(logits, teacher_logits.sigmoid())


_KINDS = {
    'lstm': (LanguageModel, _adam, _softmax_loss),
    'dnn': (ClickModel, _adam, _sigmoid_loss),
    'resnet': (ResNet, _momentum_sgd, _softmax_loss),
}


class Trainer:
  """A model and its teacher, and updates of it."""

  def __init__(self, kind: str, path: str, device: str):
    """Reads the parameters and the batch that `rivals` has written."""
    arrays = dict(np.load(path))
    part = lambda name: {
        key.removeprefix(f'{name}/'): x
        for key, x in arrays.items()
        if key.startswith(f'{name}/')
    }
    make, self._optimizer, self._loss = _KINDS[kind]
    self._new = lambda: make(part('student')).to(device)
    self._new_teacher = lambda: make(part('teacher')).to(device).eval()
    self._batch = {
        key: torch.tensor(x).to(device) for key, x in part('batch').items()
    }
    if kind == 'resnet':
      self._batch['inputs'] = self._batch['inputs'].contiguous(
          memory_format=torch.channels_last
      )

  def updates(self, teach: bool, compiled: bool) -> Callable[[], Any]:
    """`call()` does one more update from the start; gives loss and module."""
    model = self._new()
    optimizer = self._optimizer(model)
    batch, teacher, loss_of = self._batch, self._new_teacher(), self._loss
    carry, teacher_carry = model.start(batch), teacher.start(batch)

    def ask(carry):
      return teacher(batch, carry)

    def objective(carry, teacher_logits):
      logits, carry = model(batch, carry)
      return loss_of(logits, batch['labels'], teacher_logits), carry

    if compiled and isinstance(model, LanguageModel):
      # Not the loop, which would be unrolled: some 64 cells take minutes.
      cell, loss_of = torch.compile(_cell), torch.compile(loss_of)
      for layer in [*model.layers, *teacher.layers]:
        layer.cell = cell
    elif compiled:
      ask, objective = torch.compile(ask), torch.compile(objective)

    def call():
      nonlocal carry, teacher_carry
      teacher_logits = None
      if teach:
        with torch.no_grad():
          teacher_logits, teacher_carry = ask(teacher_carry)
      loss, carry = objective(carry, teacher_logits)
      optimizer.zero_grad(set_to_none=True)
      loss.backward()
      optimizer.step()
      return loss.detach(), model

    return call


def check(call: Callable[[], Any], steps: int) -> dict[str, list[float]]:
  """Loss and norm of the gradient of the first updates."""
  losses, norms = [], []
  for _ in range(steps):
    loss, model = call()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
    losses.append(float(loss))
  return {'losses': losses, 'grad_norms': norms}


def time_calls(call: Callable[[], Any], times: int, device: str) -> float:
  """Seconds that so many updates take."""
  wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
  wait()
  start = time.perf_counter()
  for _ in range(times):
    call()
  wait()
  return time.perf_counter() - start


def profile(call: Callable[[], Any], times: int) -> list[dict[str, Any]]:
  """Returns the share of the time of the operators that take most of it."""
  activity = torch.profiler.ProfilerActivity.CPU
  with torch.profiler.profile(activities=[activity]) as found:
    for _ in range(times):
      call()
  events = found.key_averages()
  total = sum(e.self_cpu_time_total for e in events)
  events = sorted(events, key=lambda e: -e.self_cpu_time_total)[:8]
  return [
      {
          'name': e.key,
          'share': round(e.self_cpu_time_total / total, 3),
          'calls': e.count // times,
      }
      for e in events
  ]


class Server:
  """Answers requests: `open`, `check`, `time`, `profile`."""

  def __init__(self, threads: int, device: str):
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(
        'high' if device == 'cuda' else 'highest'
    )
    self._device = device
    self._trainer = None
    self._arms = {}

  def open(self, kind: str, path: str) -> dict[str, Any]:
    """Begins with a model; forgets the last one."""
    self._arms.clear()
    self._trainer = Trainer(kind, path, self._device)
    return {'torch': torch.__version__, 'threads': torch.get_num_threads()}

  def check(self, teach: bool, compiled: bool, steps: int) -> dict[str, Any]:
    """First losses and norms; the time, too, which has compilation in it."""
    start = time.perf_counter()
    call = self._trainer.updates(teach, compiled)
    found = check(call, steps)
    self._arms[teach, compiled] = call
    return {**found, 'seconds': time.perf_counter() - start}

  def time(self, teach: bool, compiled: bool, times: int) -> dict[str, Any]:
    """Seconds of so many updates."""
    call = self._arms[teach, compiled]
    return {'seconds': time_calls(call, times, self._device)}

  def profile(self, teach: bool, times: int) -> dict[str, Any]:
    """Operators of eager updates."""
    return {'operators': profile(self._arms[teach, False], times)}


def main() -> None:
  # What libraries print must not mix with the answers.
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  threads, device = int(sys.argv[1]), sys.argv[2]
  server = Server(threads, device)
  for line in sys.stdin:
    request = json.loads(line)
    try:
      answer = getattr(server, request.pop('do'))(**request)
    except Exception as e:  # Whatever a compiler raises; the caller tells it.
      answer = {'error': f'{type(e).__name__}: {str(e).splitlines()[0][:300]}'}
    print(json.dumps(answer), file=answers)


if __name__ == '__main__':
  main()
