"""agentark_jax: distil multi-agent debate into one language model, in JAX."""
