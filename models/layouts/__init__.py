"""Every published layout of checkpoints under our names: renaming, the table, which network it is."""
