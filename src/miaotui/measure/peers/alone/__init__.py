"""The folder that a peer's Python is given to import from: `peer_runners` alone, nothing of miaotui."""
