"""Hot records in a device's own memory, in front of any service's tables; needs torch.

tier = HbmTier([client.table("deepseek-v4.1.layer1")], budget_bytes=8 << 30, device="cuda")
hot = tier.table("deepseek-v4.1.layer1")
keys = mapping.on_device("cuda").ngram_keys(token_ids, layer_id=1)
rows = hot.lookup_ngrams(keys)              # uint8 [..., H, row_bytes], on the device
"""

from engram_client.hbm.handle import HbmHandle
from engram_client.hbm.misses import Misses
from engram_client.hbm.table import HbmTable
from engram_client.hbm.tier import HbmTier

__all__ = ["HbmHandle", "HbmTable", "HbmTier", "Misses"]
