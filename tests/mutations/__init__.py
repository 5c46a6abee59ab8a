"""Tables of seeded bugs, one module per kernel family. See mutants.py."""
