"""Engines: how the units of a run are spread over processes, machines and schedulers.

An engine knows nothing of models. It is given a :class:`Job` (what a worker has to open) and :class:`Item` (units of
work, named by their content), and gives back what each item became, in any order. An item may be done twice: it gives
the same bytes, and the second is thrown away. So a worker that dies costs the item it held, and nothing else.
"""

from dynprobe.engines._contract import Done, Engine, Item, Job, Seat, content_key
from dynprobe.engines._local import Local
from dynprobe.engines._ray import Ray
from dynprobe.engines._registry import ENGINES
from dynprobe.engines._schedule import Schedule
from dynprobe.engines._slurm import Slurm

__all__ = ["ENGINES", "Done", "Engine", "Item", "Job", "Local", "Ray", "Schedule", "Seat", "Slurm", "content_key"]
