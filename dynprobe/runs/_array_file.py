"""One array or tensor from a file that somebody else wrote.

NumPy's and safetensors' readers raise whatever their parsers meet (a tokenizer's error, an overflow, a lack of memory
for a shape that the file only claims to have), so the claim is checked against the size of the file first, and every
failure becomes one error that names the file.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import UsageError

__all__ = ["load_npy", "load_tensors", "physical_memory"]


def load_npy(path: Path) -> NDArray[Any]:
    """Read a ``.npy`` file; nothing in it is ever run.

    Raises:
        UsageError: It cannot be read, is none, is cut short, or holds Python objects.
    """
    try:
        with path.open("rb") as file:
            major, _ = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            if dtype.hasobject:
                raise UsageError(f"{path} holds pickled objects, which run code when they are read; store numbers")
            wanted, found = math.prod(shape) * dtype.itemsize, path.stat().st_size - file.tell()
        if min(shape, default=0) < 0 or wanted != found:
            raise UsageError(f"{path} is cut short or damaged: its header tells of {wanted} bytes, {found} follow it")
        array = np.load(path, allow_pickle=False)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise UsageError(f"{path} is no .npy file of numbers ({error}); write it with np.save") from error
    return np.asarray(array)


def load_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Read all tensors of a ``.safetensors`` file as arrays.

    Raises:
        UsageError: It cannot be read, is none, or has a dtype that NumPy lacks.
    """
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise UsageError(f"{path} is no .safetensors file that NumPy can hold ({error})") from error


def physical_memory() -> float:
    """Bytes of memory this machine has; infinite where the system does not say.

    What an archive claims to unpack to is compared with it: some kilobytes of zeros can claim to be a terabyte.
    """
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf
