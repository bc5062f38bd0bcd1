"""The DRAM tier for the machine's other processes: they read it in place and ask for what it lacks."""

from tierstore.shm.offer import SharedMemory, offer_shared_memory

__all__ = ["SharedMemory", "offer_shared_memory"]
