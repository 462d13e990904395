"""Boards that learn apart meet again: runs of one network become one, which has exactly κ connections.

`rule` is the arithmetic, on arrays; `members` reads the runs and says which of them cannot take part;
`merging` makes a run of them; `rounds` exchanges runs through a folder.
"""
