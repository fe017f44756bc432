"""Latency, loss and bandwidth of a board's link, by the netem of the board's own kernel, in both directions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """``latency_ms``: there and back. ``loss``: the share of packets lost each way. ``bandwidth``: bits a second."""

    latency_ms: float = 0
    loss: float = 0
    bandwidth: int | None = None

    def commands(self) -> str:
        """A shell script for root on the board, which takes effect at once; the default restores the plain link."""
        clear = "tc qdisc del dev eth0 root; tc qdisc del dev eth0 ingress; tc qdisc del dev ifb0 root"
        lines = [f"({clear}) 2>/dev/null || true"]
        if self != Link():
            netem = f"netem limit 10000 delay {self.latency_ms / 2:g}ms loss {self.loss * 100:g}%"
            if self.bandwidth:
                netem += f" rate {self.bandwidth}bit"
            lines += [
                "set -e",
                "ip link set ifb0 up",
                f"tc qdisc add dev ifb0 root {netem}",
                "tc qdisc add dev eth0 ingress",
                "tc filter add dev eth0 parent ffff: protocol all matchall action mirred egress redirect dev ifb0",
                f"tc qdisc add dev eth0 root {netem}",
            ]
        return "\n".join(lines)
