"""From ``--data`` to windows of characters: sources, what they hold, streams of it."""
