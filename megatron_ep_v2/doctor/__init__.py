"""Diagnosis of this environment: gathers facts (facts.py, host.py, imports.py), then checks them (software.py,
hardware.py)."""
