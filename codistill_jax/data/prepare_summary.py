"""What a preparation of text says about its result."""

from typing import Any


def counts_text(rejects: dict[str, int]) -> str:
  """'3 bad_json, 1 empty', or 'none'."""
  counts = (f'{rejects[reason]:,} {reason}' for reason in sorted(rejects))
  return ', '.join(counts) or 'none'


def summary(meta: dict[str, Any]) -> str:
  """A few lines about prepared data.

  Args:
    meta: What `meta.json` holds.
  """
  lines = []
  for name, split in meta['splits'].items():
    # <s> and </s> are pieces of no word.
    pieces = split['tokens'] - 2 * split['documents']
    lines.append(
        f'{name}: {split["documents"]:,} documents, {split["words"]:,} words,'
        f' {split["bytes"]:,} bytes, {pieces:,} pieces'
        f' ({pieces / max(1, split["words"]):.3f} pieces per word),'
        f' {split["tokens"]:,} tokens, {len(split["shards"])} shards'
    )
  # Data prepared before records were counted have no such number.
  of = f' of {meta["records"]:,}' if 'records' in meta else ''
  lines.append(f'rejected records{of}: {counts_text(meta["rejects"])}')
  lines.append(
      f'tokenizer: {meta["vocab_size"]:,} word pieces, sha256'
      f' {meta["tokenizer_sha256"][:12]}'
  )
  return '\n'.join(lines)
