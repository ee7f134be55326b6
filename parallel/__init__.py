"""How the model is spread over ranks, clipped and saved. Imports moesaic.moe."""
