"""Other libraries as `benchmarks.subject.Subject`, with their default settings, each in an environment of its own."""
