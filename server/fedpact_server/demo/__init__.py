"""The demo: a real federation on one machine, made with the public commands."""
