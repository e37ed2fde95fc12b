"""What is wrong with this environment: facts are gathered (facts.py, host.py, imports.py), then judged (checks.py)."""
