"""How a step's sequences are dealt: to ranks in order, and each rank's share in micro-batches."""

from moesaic.launch.schema import TrainConfig

MICRO_BATCH_TOKENS = 16_384  # where `train.micro_batch` is null


def micro_batches(sequences: int, config: TrainConfig, rank: int, world: int) -> list[tuple[int, int]]:
    """(first, count) of each micro-batch of `rank`, of `sequences` dealt to all ranks in order.

    Every rank gets equally many micro-batches, for each is a collective: where a share is smaller, the last ones hold fewer
    sequences, or none.
    """
    largest = -(-sequences // world)
    micro = micro_batch(config, largest)
    first = rank * (sequences // world) + min(rank, sequences % world)
    end = first + sequences // world + (rank < sequences % world)
    return [
        (min(first + i * micro, end), max(0, min(micro, end - first - i * micro))) for i in range(-(-largest // micro))
    ]


def micro_batch(config: TrainConfig, share: int) -> int:
    """Sequences of a micro-batch, where the greatest share of a rank is `share` of them."""
    return config.micro_batch or -(-share // -(-share * config.seq_len // MICRO_BATCH_TOKENS))


def most_tokens(config: TrainConfig) -> int:
    """Tokens of a micro-batch, at most, in training and evaluation, whatever remains for the last batch."""
    micro = config.micro_batch
    if micro is None:
        micro = min(config.global_batch, max(1, MICRO_BATCH_TOKENS // config.seq_len))
    return micro * config.seq_len
