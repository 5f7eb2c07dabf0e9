"""What the page of the benchmarks shows of each: goal, words, columns."""

from typing import NamedTuple


class Figure(NamedTuple):
  """A section of the page.

  Attributes:
    benchmark: Its module.
    title: Of the section.
    goal: In words; '' if there is none.
    text: What the reader needs to know of the columns.
    columns: (heading, key of a row), beside the name and the goal.
  """

  benchmark: str
  title: str
  goal: str
  text: str
  columns: tuple[tuple[str, str], ...]


FIGURES = (
    Figure(
        'step_cost',
        'What teachers cost a step',
        'at most 1.05 of the limit 1 + P x (forward share)',
        'Time of a codistilled update over a plain one. The forward share is'
        ' a pass in eval mode up to the logits, over the plain update (in the'
        ' next column, up to the features only); operations are those of the'
        ' programs as they are written. `of the floor`: over plain, the forward'
        ' passes, and what the teachers add to the losses by themselves.',
        (
            ('plain, ms', 'plain_ms'),
            ('ratio', 'ratio'),
            ('forward share', 'forward_share'),
            ('to the features', 'feature_share'),
            ('limit', 'limit'),
            ('operations', 'operations_ratio'),
            ('of the floor', 'of_floor'),
        ),
    ),
    Figure(
        'prediction_exchange',
        'Predictions in place of a second forward pass',
        'at most 1.05 of plain training for any G',
        'Groups in one program that see the same batch: an update of all with'
        ' distillation over one without. Last but one, a plain update of all'
        ' over G times that of one group by itself.',
        (
            ('plain, ms', 'plain_ms'),
            ('codistilled, ms', 'codistilled_ms'),
            ('ratio', 'ratio'),
            ('operations', 'operations_ratio'),
            ('of G programs', 'of_single'),
            ('bytes to a peer', 'bytes_to_peer'),
        ),
    ),
    Figure(
        'loss',
        'The loss over blocks of tokens',
        'memory at most 1/8 of the plain loss; not slower at V = 24,006',
        'Task loss and one teacher, from features of 1,024 values to the'
        ' gradients, in MB of temporary memory or milliseconds.',
        (
            ('fused, MB', 'fused_mb'),
            ('plain, MB', 'plain_mb'),
            ('fused, ms', 'fused_ms'),
            ('plain, ms', 'plain_ms'),
            ('fused / plain', 'ratio'),
        ),
    ),
    Figure(
        'rivals',
        'Against the same in PyTorch',
        'ahead of both: PyTorch takes at least as long; ResNets at most 1.5'
        ' times as long as PyTorch',
        'Losses and gradient norms of the first updates agree before anything'
        ' is timed (`deviation`). PyTorch has a process of its own with as'
        ' many threads. Ratios are the time of PyTorch over that of JAX.',
        (
            ('JAX, ms', 'jax_ms'),
            ('eager, ms', 'eager_ms'),
            ('compiled, ms', 'compiled_ms'),
            ('eager / JAX', 'eager_ratio'),
            ('compiled / JAX', 'compiled_ratio'),
            ('deviation', 'deviation'),
            ('not compiled because', 'not_compiled'),
        ),
    ),
    Figure(
        'utilisation',
        'Utilisation',
        'at least 60 % of a large matrix product at 512 units',
        'GFLOP/s of a plain update, of whose work only matrix products count,'
        ' against those of the fastest of some square products.',
        (
            ('update, ms', 'step_ms'),
            ('GFLOP/s', 'gflops'),
            ('product, GFLOP/s', 'peak_gflops'),
            ('share', 'share'),
        ),
    ),
    Figure(
        'scaling',
        'How the cost grows',
        '',
        'Milliseconds of an update along a size; `exponent` is that of a power'
        ' of the size, `slope` and `intercept` those of a straight line in'
        ' milliseconds, `residual` the relative distance from it. `groups`: one'
        ' update in a round of lockstep of so many groups in one process.',
        (
            ('at', 'along'),
            ('plain, ms', 'plain_ms'),
            ('plain line', 'plain_line'),
            ('codistilled, ms', 'codistilled_ms'),
            ('codistilled line', 'codistilled_line'),
        ),
    ),
    Figure(
        'cold_start',
        'Cold start',
        'import under 3 s; first line of the demo under 8 s; a group in under'
        ' 300 MB of its own',
        'Seconds of fresh processes, the start of the interpreter included; no'
        ' compiled program is kept, as when a machine starts for the first'
        ' time, or all are, as ever after. Memory: `own` is what no process'
        ' could share with it, `resident` has the pages of library files too.',
        (
            ('seconds', 'seconds'),
            ('own, MB', 'own_mb'),
            ('resident, MB', 'resident_mb'),
        ),
    ),
    Figure(
        'input',
        'Loading, beside training',
        'at least 450 JPEG images a second and core, and more than other'
        ' loaders',
        'Units are tokens, clicks or images. A core is a second of processor'
        ' time, of all threads; `a step takes` is one update of the configured'
        ' model on one device, without teachers, and `headroom` what is loaded'
        ' meanwhile, over that; 2,500 images a second stand for an accelerator.'
        ' Other loaders read random parts of the same files, and `deviation`'
        ' is that of their pixels, of 255.',
        (
            ('batch', 'batch'),
            ('units/s', 'per_sec'),
            ('units/s per core', 'per_core'),
            ('of the other, per core', 'their_per_core'),
            ('ours / other', 'ratio'),
            ('deviation', 'deviation'),
            ('a step takes/s', 'step_needs_per_sec'),
            ('headroom', 'headroom'),
            ('cores for 2,500/s', 'cores_needed'),
        ),
    ),
    Figure(
        'records',
        'A look at a long run',
        'status within 0.5 s, report within 5 s',
        'Fresh processes that read 200,000 records of two groups.',
        (
            ('seconds', 'seconds'),
            ('of processors', 'processor_seconds'),
            ('MB', 'megabytes'),
        ),
    ),
    Figure(
        'exchange_stall',
        'What an exchange costs the training loop',
        'holds the loop for at most 1 % of the interval',
        'Dense layers and SGD, an exchange every 50 steps with one peer;'
        ' `off`: teachers that never change. One core computes, another has'
        ' the threads of the exchange. Extra memory is in copies of the'
        ' parameters.',
        (
            ('interval, s', 'interval_s'),
            ('loop held, ms', 'stall_ms'),
            ('share', 'stall_share'),
            ('slower than `off` by, ms', 'lost_ms'),
            ('waits for the disk, ms', 'sync_ms'),
            ('extra copies', 'extra_copies'),
            ('published, MB', 'megabytes'),
        ),
    ),
    Figure(
        'overlap',
        "The teacher's next pass beside the step",
        '',
        'Below 1 it would pay to ask the teacher about the next batch while the'
        ' step runs.',
        (
            ('teacher inside, ms', 'inside_ms'),
            ('apart, ms', 'apart_ms'),
            ('beside, ms', 'beside_ms'),
            ('beside / inside', 'ratio'),
        ),
    ),
)
