"""Sweeps: W&B's sweep file, run by agents of our own that share a folder and an Optuna storage and need no server.

`file` and `distributions` read what the file says, `space` makes settings of it, `search` chooses the next one,
`journal` is what has happened, `leases` who works on what, `agent` does the work and `status` shows it. Optuna is
imported by `search` and `status` alone, inside functions.
"""
