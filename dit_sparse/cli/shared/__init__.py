"""What all commands share: the options --config, --json, --quiet and --verbose."""
