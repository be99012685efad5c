"""Set before anything is imported: tests never reach for the network, and tiny tensors gain nothing from threads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

# Two threads on a shared machine spend their time waiting for each other: 20 times slower for tensors this small
torch.set_num_threads(1)
