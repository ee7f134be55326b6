"""How a model is spread over ranks: the knobs, their rules."""

import math
from dataclasses import dataclass

from moesaic.moe.config import ModelConfig, require


@dataclass
class ParallelConfig:
    """How the model is spread.

    engine        fsdp: PyTorch's FSDP2 for all parameters; deepspeed: ZeRO for the dense ones, FSDP2 for the experts
    zero_stage    of deepspeed: 0 to 3, what the ranks divide: nothing, moments, gradients too, weights too (null: 2)
    expert        ranks over which the experts are divided; auto: the largest divisor of both the world size and n_experts
    replicate     copies of the dense parameters, each sharded over world / replicate neighbouring ranks; experts are copied as
                  far as `expert` allows, see moesaic.parallel.mesh
    expert_path   local: every rank computes all experts, and expert is 1; all_to_all: tokens travel to their experts;
                  two_hop: the same, but between nodes once for each node; fused: one kernel forward and one backward stores rows
                  into the memory of other ranks of the node, between nodes as two_hop, see moesaic.parallel.fused; auto: local
                  where expert comes to 1, else all_to_all
    node_size     neighbouring ranks in one node, with fast links; must divide the expert degree, or be a multiple of it.
                  auto: what torchrun started on this machine
    reshard       whether weights gathered for forward are let go before backward, which then gathers them again. auto: those of
                  blocks and experts are, those of embedding, norm and head are kept; always: all are; never: all are kept
    remat         activations computed again in backward: none, selective (all but the routed experts') or full; see
                  moesaic.parallel.remat
    max_recv_tokens_factor   most rows that a rank's experts may get in a call of a layer, in training, as a multiple of an even
                  load, see moesaic.parallel.overload (null: any number; of no effect with expert_path=local)
    overload      what is above it. error: the run ends with a line; drop: rows of the lowest router weights are left out
    fused_once    fused: a row crosses once to each rank that needs it, however many experts it visits there; false: once for each
    fused_keep    fused: rows that came are kept for backward, else they are sent again
    fused_shared  fused: the shared expert's products are tasks of the same kernels, as experts of width d_expert that each rank
                  has for its own tokens, before any that waits for rows of others; d_shared must be a multiple of d_expert
    comm_sms      fused: multiprocessors that its persistent kernels leave to the collectives of FSDP (of no effect on a CPU)
    timeout       seconds without the begin or end of a collective, on any rank, after which the run ends and says who waits for
                  whom, see moesaic.parallel.trace; fused: also, about, of a wait inside a kernel
    """

    engine: str = "fsdp"
    zero_stage: int | None = None
    expert: str = "auto"
    replicate: int = 1
    expert_path: str = "auto"
    node_size: str = "auto"
    reshard: str = "auto"
    remat: str = "none"
    max_recv_tokens_factor: float | None = None
    overload: str = "error"
    fused_once: bool = True
    fused_keep: bool = False
    fused_shared: bool = False
    comm_sms: int = 16
    timeout: float = 600.0

    def __post_init__(self) -> None:
        require(self.engine in ("fsdp", "deepspeed"),
                f"parallel.engine={self.engine}: must be one of fsdp, deepspeed")  # fmt: skip
        stage = self.zero_stage
        require(stage is None or self.engine == "deepspeed",
                f"parallel.zero_stage={stage}: must be null with parallel.engine={self.engine}")  # fmt: skip
        require(stage is None or 0 <= stage <= 3, f"parallel.zero_stage={stage}: must be one of 0, 1, 2, 3")
        if self.engine == "deepspeed" and stage is None:
            self.zero_stage = 2
        expert, path = self.expert, self.expert_path
        require(self.replicate >= 1, f"parallel.replicate={self.replicate}: must be at least 1")
        for name, only in (("replicate", 1), ("reshard", "auto")):
            require(getattr(self, name) == only or self.engine == "fsdp",
                    f"parallel.{name}={getattr(self, name)}: must be {only} with parallel.engine=deepspeed")  # fmt: skip
        require(self.reshard in ("auto", "always", "never"),
                f"parallel.reshard={self.reshard}: must be one of auto, always, never")  # fmt: skip
        require(self.remat in ("none", "selective", "full"),
                f"parallel.remat={self.remat}: must be one of none, selective, full")  # fmt: skip
        require(path in ("auto", "local", "all_to_all", "two_hop", "fused"),
                f"parallel.expert_path={path}: must be one of auto, local, all_to_all, two_hop, fused")  # fmt: skip
        for name, usual in (("fused_once", True), ("fused_keep", False), ("fused_shared", False)):
            require(path == "fused" or getattr(self, name) == usual,
                    f"parallel.{name}={str(not usual).lower()}: must be {str(usual).lower()} with "
                    f"parallel.expert_path={path}")  # fmt: skip
        require(self.comm_sms >= 0, f"parallel.comm_sms={self.comm_sms}: must not be negative")
        node = self.node_size
        require(node == "auto" or (node.isdecimal() and int(node) >= 1),
                f"parallel.node_size={node}: must be auto or a positive number")  # fmt: skip
        factor, overload = self.max_recv_tokens_factor, self.overload
        require(factor is None or 1 <= factor < math.inf,
                f"parallel.max_recv_tokens_factor={factor}: must be at least 1, which an even load takes, and finite, "
                "or null")  # fmt: skip
        require(1 <= self.timeout <= 1e7, f"parallel.timeout={self.timeout}: must lie in 1..1e7 seconds")
        require(overload in ("error", "drop"), f"parallel.overload={overload}: must be one of error, drop")
        require(overload == "error" or factor is not None,
                f"parallel.overload={overload}: needs a limit, parallel.max_recv_tokens_factor")  # fmt: skip
        if expert != "auto":
            require(
                expert.isdecimal() and int(expert) >= 1, f"parallel.expert={expert}: must be auto or a positive number"
            )
            require(path != "local" or int(expert) == 1,
                    f"parallel.expert={expert}: must be 1 or auto with parallel.expert_path=local")  # fmt: skip


def shared_experts(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Experts of width d_expert that the shared expert is in the fused kernels; 0 where it is beside them. Raises ValueError."""
    if not parallel.fused_shared:
        return 0
    wide, each, told = model.d_shared, model.d_expert, "with parallel.fused_shared=true"
    require(wide > 0, f"model.d_shared={wide}: must be positive {told}")
    require(wide % each == 0, f"model.d_shared={wide}: must be a multiple of model.d_expert={each} {told}")
    require(model.activation == "swiglu",
            f"model.activation={model.activation}: must be swiglu, the shared expert's, {told}")  # fmt: skip
    return wide // each


def check_shared(nodes: int) -> None:
    """Raises ValueError where an expert group of `nodes` can't have the shared expert in its kernels."""
    require(nodes == 1,
            f"parallel.fused_shared=true: must be false where an expert group is in {nodes} nodes, whose ranks compute each "
            "other's tokens")  # fmt: skip
