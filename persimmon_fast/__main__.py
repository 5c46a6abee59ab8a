"""`python -m persimmon_fast`: the command line."""

from persimmon_fast.cli import main

main()
