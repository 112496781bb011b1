"""How the loops of known model families are found, one file each; :mod:`dynprobe.probes._adapters` has the table."""
