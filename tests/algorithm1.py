"""Algorithm 1 of Anil et al. 2018 by hand: numpy, float64, no project code.

theta is {'Dense_0': {'kernel', 'bias'}, 'Dense_1': {...}}, the classifier
softmax(tanh(x W + b) V + c), so `toy.TwoLayers`. Gradients are written out.

Shape suffixes: B examples, D features, H hidden units, C classes.
"""

import numpy as np


def as_float64(tree):
  """The same nested dicts, in float64."""
  if isinstance(tree, dict):
    return {key: as_float64(value) for key, value in tree.items()}
  return np.array(tree, np.float64)


def predict(theta, x_BD):
  """F(theta, x): probabilities (B, C), and the hidden layer (B, H)."""
  first, second = theta['Dense_0'], theta['Dense_1']
  h_BH = np.tanh(x_BD @ first['kernel'] + first['bias'][None])
  z_BC = h_BH @ second['kernel'] + second['bias'][None]
  e_BC = np.exp(z_BC - z_BC.max(axis=1, keepdims=True))
  return e_BC / e_BC.sum(axis=1, keepdims=True), h_BH


def losses(theta, batch, peers=()):
  """Weighted means over the batch of phi and of psi, in nats."""
  q_BC, _ = predict(theta, batch['inputs'].astype(np.float64))
  share_B = _shares(batch)
  rows = np.arange(len(share_B))
  phi = -np.sum(share_B * np.log(q_BC[rows, batch['labels']]))
  if not peers:
    return phi, 0.0
  p_BC = _aggregated(peers, batch)
  return phi, -np.sum(share_B[:, None] * p_BC * np.log(q_BC))


def gradient(theta, batch, peers=(), weight=1.0):
  """Gradient of phi + weight * psi with respect to theta alone."""
  x_BD = batch['inputs'].astype(np.float64)
  q_BC, h_BH = predict(theta, x_BD)
  # The derivative of -sum p log softmax(z) by z is softmax(z) - p.
  dz_BC = q_BC - np.eye(q_BC.shape[1])[batch['labels']]
  if peers:
    dz_BC = dz_BC + weight * (q_BC - _aggregated(peers, batch))
  dz_BC = dz_BC * _shares(batch)[:, None]
  dh_BH = (dz_BC @ theta['Dense_1']['kernel'].T) * (1 - h_BH**2)
  return {
      'Dense_0': {'kernel': x_BD.T @ dh_BH, 'bias': dh_BH.sum(axis=0)},
      'Dense_1': {'kernel': h_BH.T @ dz_BC, 'bias': dz_BC.sum(axis=0)},
  }


def update(theta, batch, peers=(), weight=1.0, learning_rate=1.0):
  """theta after one step of gradient descent."""
  grad = gradient(theta, batch, peers, weight)
  return {
      layer: {
          name: value - learning_rate * grad[layer][name]
          for name, value in leaves.items()
      }
      for layer, leaves in theta.items()
  }


def train(
    thetas,
    batch_of,
    *,
    num_steps,
    burn_in_steps,
    every,
    weight,
    learning_rate,
    staleness=0,
):
  """All groups; `batch_of(group, step)`. Gives thetas and losses per step.

  The peers of an update are stale copies: as they were at the last multiple of
  `every`, or `staleness` steps before that. Nothing is exchanged at step 0.
  """
  history = [thetas]
  reported = []
  for step in range(num_steps):
    seen = step // every * every - staleness
    now = history[-1]
    after, values = [], []
    for i, theta in enumerate(now):
      peers = []
      if step >= burn_in_steps and seen > 0:
        peers = [history[seen][j] for j in range(len(now)) if j != i]
      batch = batch_of(i, step)
      values.append(losses(theta, batch, peers))
      after.append(update(theta, batch, peers, weight, learning_rate))
    history.append(after)
    reported.append(values)
  return history[-1], reported


def _aggregated(peers, batch):
  x_BD = batch['inputs'].astype(np.float64)
  return sum(predict(theta, x_BD)[0] for theta in peers) / len(peers)


def _shares(batch):
  """What each example contributes to a mean over the batch."""
  ones = np.ones(len(batch['labels']))
  weights = np.asarray(batch.get('weights', ones), np.float64)
  return weights / weights.sum()
