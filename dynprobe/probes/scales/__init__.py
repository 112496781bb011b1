"""The noise scales, one file each; :mod:`dynprobe.probes._scales` has the contract and the table."""
