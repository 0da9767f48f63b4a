"""How weights reach the engines: ``weights`` orders a sync and counts versions, ``payload`` is the CPU wire form."""
