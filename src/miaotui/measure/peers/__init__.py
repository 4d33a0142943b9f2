"""Other engines beside this one: each in its own environment and process, in runs that alternate with ours."""
