"""`python -m rlhf` is the `rlhf` command."""

from rlhf.cli import main

main()
