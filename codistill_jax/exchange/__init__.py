"""What travels between groups, and when.

`protocol` has the interface and the plan, `topology` who learns from whom;
`memory_exchange` serves groups of one process, `checkpoint_exchange` groups
that share a directory: it writes through `publisher` and reads through
`fetching` and `fetcher`, both on `publications`.
"""
