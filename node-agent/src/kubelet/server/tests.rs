//! Over real TLS and WebSocket on loopback.
