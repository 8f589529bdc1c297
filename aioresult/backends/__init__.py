"""The backends. Each module is imported only when its backend is named; see `aioresult.registry`."""
