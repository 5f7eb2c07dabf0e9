"""Files that can be trusted: what is written, by whom, and whether it is whole.

`files`: small files on any backend. `checkpoints`: the one format of
checkpoints, with a digest of everything. `resume`: what a restart needs.
`background`: one writer beside training. `leases`: who may write.
"""
