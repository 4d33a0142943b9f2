"""The server: an engine on a thread of its own behind OpenAI's HTTP interface."""
