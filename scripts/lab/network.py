"""Latency, loss and bandwidth of a board's link, by the netem of the board's own kernel, in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: Of the board's: where its SSH server listens, and the beginning of the road to it (lab/road.py).
PLAIN_PORT, ROAD_PORT = 22, 2200
ROAD = Path(__file__).with_name("road.py").read_text("utf-8")
#: The road: a veth pair into a network namespace. Packets are lost one by one, so that none is larger than a frame.
BUILD = f"""
if ! ip link show near >/dev/null 2>&1; then
  set -e
  ip netns add road
  ip link add near gso_max_segs 1 type veth peer name far netns road
  ip -n road link set far gso_max_segs 1 up
  ip -n road address add 10.9.0.2/30 dev far
  ip address add 10.9.0.1/30 dev near
  ip link set near up
  python3 - <<'END'
{ROAD}END
fi
"""
CLEAR = "tc qdisc del dev near root 2>/dev/null; tc -n road qdisc del dev far root 2>/dev/null; true"


@dataclass(frozen=True)
class Link:
    """``latency_ms``: there and back. ``loss``: the share of packets lost each way. ``bandwidth``: bits a second."""

    latency_ms: float = 0
    loss: float = 0
    bandwidth: int | None = None

    @property
    def port(self) -> int:
        """The board's port that connections are to go to."""
        return PLAIN_PORT if self == Link() else ROAD_PORT

    def commands(self) -> str:
        """A shell script for root on the board, which takes effect at once; the default restores the plain link."""
        if self == Link():
            return CLEAR
        netem = f"netem limit 10000 delay {self.latency_ms / 2:g}ms loss {self.loss * 100:g}%"
        if self.bandwidth:
            netem += f" rate {self.bandwidth}bit"
        return f"{BUILD}set -e\ntc qdisc replace dev near root {netem}\ntc -n road qdisc replace dev far root {netem}"
