"""How a model is spread over ranks: the knobs, their rules."""

from dataclasses import dataclass

from moesaic.moe.config import require


@dataclass
class ParallelConfig:
    """How the model is spread.

    expert        ranks over which the experts are divided; auto: the largest divisor of both the world size and n_experts
    replicate     copies of the dense parameters, each sharded over world / replicate neighbouring ranks; experts are copied as
                  far as `expert` allows, see moesaic.parallel.mesh
    expert_path   local: every rank computes all experts, and expert is 1; all_to_all: rows travel to their experts;
                  auto: local where expert comes to 1
    """

    expert: str = "auto"
    replicate: int = 1
    expert_path: str = "auto"

    def __post_init__(self) -> None:
        expert, path = self.expert, self.expert_path
        require(self.replicate >= 1, f"parallel.replicate={self.replicate}: must be at least 1")
        require(path in ("auto", "local", "all_to_all"),
                f"parallel.expert_path={path}: must be one of auto, local, all_to_all")  # fmt: skip
        if expert != "auto":
            require(
                expert.isdecimal() and int(expert) >= 1, f"parallel.expert={expert}: must be auto or a positive number"
            )
            require(path != "local" or int(expert) == 1,
                    f"parallel.expert={expert}: must be 1 or auto with parallel.expert_path=local")  # fmt: skip
