"""NVMe over TCP: both ends of the protocol as state machines without sockets, clocks or tasks."""
