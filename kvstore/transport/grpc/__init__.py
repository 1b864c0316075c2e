"""The gRPC transport: control calls and bulk streams, on channels of their own."""
