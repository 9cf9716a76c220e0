"""FlashFuse."""
