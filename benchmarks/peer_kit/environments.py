"""Where the peers' environments are made from: `miaotui.measure.peers.environments`, under its former name."""

from miaotui.measure.peers.environments import DEFAULT, PEERS, Peer, PeerUnavailableError, install

__all__ = ["DEFAULT", "PEERS", "Peer", "PeerUnavailableError", "install"]
