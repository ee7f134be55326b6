"""The model, on one device. Imports torch and moesaic.kernels; never torch.distributed, deepspeed, hydra or wandb."""
