"""YAML only: what to run. This file exists because Hydra looks for one."""
