"""OpenAI's interface: what its requests mean, and what its answers look like. No HTTP, no event loop."""
