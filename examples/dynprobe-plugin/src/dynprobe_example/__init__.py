"""One of everything that another package can add to dynprobe, one file each."""
