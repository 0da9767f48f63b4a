"""How weights reach the engines: ``weights`` orders a sync and keeps the version; ``payload`` is the wire form on CPU."""
