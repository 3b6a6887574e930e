"""Memory that has been freed stays with the process, for the next call of the network."""
import ctypes

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
STEP = 1 << 28  # bytes by which the heap grows


def reuse_memory() -> None:
    """Keep what is freed in place of giving it back to the system.

    By default glibc maps every large tensor anew, and the system fills each of its pages with zeros when it
    is touched: up to a quarter of the time of a UNet call on a CPU (see docs/performance.md). Does
    nothing where the C library is another one, and nothing to a GPU's memory.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # not Linux, or another C library
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, STEP)):
        set_option(option, value)
