"""The formats of an export, one file each; :mod:`dynprobe.runs._export_formats` has the table."""
