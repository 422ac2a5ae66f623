"""Who generates text: the contract and the embedded JAX engine."""
