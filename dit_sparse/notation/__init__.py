"""The text form of methods: grammar, syntax tree and type checks of settings."""
