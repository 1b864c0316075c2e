"""The bytes of a shard on one's own host: its arena mapped read-only, found out by a handshake."""
