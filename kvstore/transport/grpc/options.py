"""Channel and server options, in one place because both sides must agree.

Measured on loopback: streams of 1 MiB chunks with a look-ahead of 16 MiB move a byte for a third of what
unary calls cost; a message of 16 MiB falls off a cliff. A server bounds what one message may hold.
"""

from __future__ import annotations

from typing import Final

MESSAGE_NBYTES_MAX: Final = 8 << 20
LOOKAHEAD_NBYTES: Final = 16 << 20
KEEPALIVE_MS: Final = 30_000
PING_INTERVAL_MIN_MS: Final = 15_000
RECONNECT_MS: Final = (200, 2_000)  # first and longest wait: a shard that is back is found within seconds

Options = list[tuple[str, int | str]]

_SIZES: Final[Options] = [
    ("grpc.max_send_message_length", MESSAGE_NBYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_NBYTES_MAX),
]


def channel_options(traffic: str) -> Options:
    """`traffic` ("control" or "bulk") keeps the two classes on connections of their own."""
    return [
        *_SIZES,
        ("kvstrata.traffic", traffic),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.lookahead_bytes", LOOKAHEAD_NBYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS[0]),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MS[1]),
        ("grpc.enable_retries", 0),  # retries are ours: they know the caller's deadline
    ]


def server_options() -> Options:
    return [
        *_SIZES,
        ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a coin toss
        ("grpc.http2.lookahead_bytes", LOOKAHEAD_NBYTES),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MIN_MS),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
