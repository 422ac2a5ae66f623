"""The network: configuration, the one decoder, weights in and out."""
