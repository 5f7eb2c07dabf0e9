"""Files that can be trusted: what is written, by whom, and whether it is whole.

From the bottom up: `files` and `remote` (small files, any backend), `records`,
`steps` and `trees` (checkpoints with a digest of everything), `checkpoint`
(resume); beside them who may write (`leases`, `holders`, `locks`) and what goes
on beside training (`background`).
"""
