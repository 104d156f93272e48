"""The enterprise agent: guard, executor and trainer, each a process of its own (docs/adr/0006)."""
