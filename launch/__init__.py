"""The programs a person runs. The only user of hydra and wandb."""
