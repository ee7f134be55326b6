"""The router: which experts a token visits, and with what weight.

Letters: T tokens, D model width, E experts, K experts per token, S slots, M tile rows, C capacity of an expert.

**Routing domain**: one rank's micro-batch. Whatever depends on which tokens are routed together (rounding, capacity, expert
choice, the micro-batch balance loss) is defined over the tokens of one call. Everything here runs in fp32 whatever the model
computes in: a bf16 score would decide ties by rounding.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels.rounding import Rounding, round_routing, token_weights
from moesaic.kernels.tiles import rounding_tile
from moesaic.kernels.topk import MOST_EXPERTS, MOST_K, keep_best_groups, ordered_keys, stable_topk
from moesaic.moe.config import ModelConfig
from moesaic.moe.experts import backend_for
from moesaic.moe.replay import once, replaying


@dataclass(frozen=True)
class Routing:
    """What a router decides, and all that an expert path may know of it. A slot pairs a token with one of its experts.

    token_S     int64, the token of each slot; within a token, slots are in the order in which its experts' outputs are added
    expert_S    int64, the expert of each slot; E where the slot is unused (dropped, or reserved and not needed)
    weights_S   fp32, what the expert's output is multiplied with; 0 where unused; carries the gradient to the router
    counts_E    int64, used slots of each expert
    chosen_S    int64, the experts before capacity and rounding, of the first slots of token_S: what balance is about
    tokens      T
    per_token   K, where the slots are those of token 0, then token 1, … with K each, all used; else 0
    dropped     int64 scalar, choices that capacity, rounding or a limit on a rank's load took away
    added       int64 scalar, choices beyond the top K that rounding made
    """

    token_S: Tensor
    expert_S: Tensor
    weights_S: Tensor
    counts_E: Tensor
    chosen_S: Tensor
    tokens: int
    per_token: int
    dropped: Tensor
    added: Tensor


@dataclass(frozen=True)
class Scores:
    """What the balance losses need: logits_TE, and shares_TE, the scores made to sum to 1 over experts (fp32, with gradient)."""

    logits_TE: Tensor
    shares_TE: Tensor


def topk_routing(experts_TK: Tensor, weights_TK: Tensor, n_experts: int) -> Routing:
    """The routing in which every token visits K experts and nothing is dropped."""
    tokens, k = experts_TK.shape
    none = torch.zeros((), dtype=torch.int64, device=experts_TK.device)
    token_S = torch.arange(tokens, device=experts_TK.device).repeat_interleave(k)
    counts_E = count_rows(experts_TK, n_experts)
    expert_S = experts_TK.flatten()
    return Routing(token_S, expert_S, weights_TK.flatten(), counts_E, expert_S, tokens, k, none, none)


def count_rows(experts: Tensor, n_experts: int) -> Tensor:
    """Rows per expert, int64 (E,), of ids of any shape. Unlike `bincount`, needs no synchronisation with the host."""
    ids = experts.flatten()
    return torch.zeros(n_experts, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))


def unrouted_tokens(routing: Routing) -> Tensor:
    """How many tokens have no expert, int64 scalar."""
    if routing.per_token:
        return torch.zeros_like(routing.dropped)
    unused_S = routing.expert_S == routing.counts_E.numel()
    token_S = routing.token_S.masked_fill(unused_S, routing.tokens)
    return (count_rows(token_S, routing.tokens + 1)[:-1] == 0).sum()


class Router(nn.Module):
    """x_TD -> (Routing, Scores). One matrix makes a logit per expert; `model.router.kind` says what follows.

    softmax_topk    scores softmax(logits); the K of the largest logits
    sigmoid_bias    scores sigmoid(logits); the K best of scores + bias, within the best groups; weights are the scores without
                    the bias. The bias is moved after each step by moesaic.moe.balance.update_bias, and is no parameter
    expert_choice   scores softmax(logits); each expert takes its T * K / E (rounded up) best tokens (arXiv 2202.09368). In
                    training only: whether a token is taken depends on later tokens, which generation does not have

    In training, `capacity_factor` or `rounding` may follow; evaluation uses the plain choice. Weights are divided by their sum
    over a token's experts where `renormalize` says so, then multiplied with `scale`.
    """

    bias_E: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.backend = config.router, config.experts_backend
        self.weight_ED = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        if self.config.kind == "sigmoid_bias":
            self.register_buffer("bias_E", torch.zeros(config.n_experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> tuple[Routing, Scores]:
        config = self.config
        logits_TE = F.linear(x_TD.float(), self.weight_ED.float())
        # What comes after the choice changes the weights: then they are divided and scaled only there.
        changed = self.training and (config.rounding != "none" or config.capacity_factor > 0)
        sigmoid, n_experts = config.kind == "sigmoid_bias", logits_TE.shape[1]
        kernels = backend_for(self.backend, logits_TE) == "triton" and config.kind != "expert_choice"
        if kernels and n_experts <= MOST_EXPERTS and config.top_k <= MOST_K:
            experts_TK, weights_TK, shares_TE = self._choose_by_kernel(logits_TE, final=not changed)
            if not changed:
                return topk_routing(experts_TK, weights_TK, n_experts), Scores(logits_TE, shares_TE)
            scores_TE = logits_TE.sigmoid() if sigmoid else shares_TE
        else:
            scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(dim=1)
            shares_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True) if sigmoid else scores_TE
            if config.kind == "expert_choice":
                return self._expert_choice(scores_TE), Scores(logits_TE, shares_TE)
            experts_TK = once("experts", lambda: self._choose(scores_TE if sigmoid else logits_TE))
            weights_TK = scores_TE.gather(1, experts_TK)

        scores = Scores(logits_TE, shares_TE)
        if self.training and config.rounding != "none":
            return self._rounded(scores_TE, experts_TK, kernels), scores
        if changed:
            return self._capped(experts_TK, weights_TK), scores
        return topk_routing(experts_TK, self._weights(weights_TK), n_experts), scores

    def _choose(self, preference_TE: Tensor) -> Tensor:
        """int64 (T, K): each token's K best experts."""
        config = self.config
        if config.kind == "sigmoid_bias":
            preference_TE = keep_best_groups(preference_TE + self.bias_E.float(), config.groups, config.groups_kept)
        return stable_topk(preference_TE, config.top_k)

    def _choose_by_kernel(self, logits_TE: Tensor, final: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(experts_TK, weights_TK, shares_TE), weights divided and scaled if `final`; all in one launch."""
        from moesaic.kernels.topk_triton import topk  # only here: where there is no GPU, it starts Triton's interpreter

        config = self.config
        bias_E = self.bias_E.float() if config.kind == "sigmoid_bias" else None
        given_TK = once("experts", lambda: None) if replaying() else None
        experts_TK, weights_TK, shares_TE = topk(
            logits_TE, bias_E, config.top_k, sigmoid=bias_E is not None, renormalize=final and config.renormalize,
            scale=config.scale if final else 1.0, groups=config.groups, kept=config.groups_kept, given_TK=given_TK,
        )  # fmt: skip
        if given_TK is None:
            once("experts", lambda: experts_TK)
        return experts_TK, weights_TK, shares_TE

    def _weights(self, weights_TK: Tensor) -> Tensor:
        if self.config.renormalize:
            # A token that lost all its experts has weights 0, not 0 / 0. 1e-20 as in DeepSeek's code.
            weights_TK = weights_TK / (weights_TK.sum(dim=1, keepdim=True) + 1e-20)
        return weights_TK * self.config.scale if self.config.scale != 1 else weights_TK

    def _expert_choice(self, scores_TE: Tensor) -> Routing:
        if not self.training:
            raise ValueError(
                "model.router.kind=expert_choice: works in training only; which tokens an expert takes depends on later tokens, "
                "so the model can't be evaluated or sampled token by token"
            )
        tokens, n_experts = scores_TE.shape
        capacity = min(tokens, -(-tokens * self.config.top_k // n_experts))
        token_EC = once("tokens", lambda: stable_topk(scores_TE.T, capacity))
        expert_EC = torch.arange(n_experts, device=token_EC.device)[:, None].expand_as(token_EC)
        if self.config.renormalize:
            # Over whole rows: adding up by token would be in no fixed order on CUDA.
            taken_ET = torch.zeros_like(scores_TE.T, dtype=torch.bool).scatter_(1, token_EC, True)
            scores_TE = torch.where(taken_ET.T, scores_TE, 0.0)
            scores_TE = scores_TE / (scores_TE.sum(dim=1, keepdim=True) + 1e-20)
        weights_EC = scores_TE.T.gather(1, token_EC)
        counts_E = torch.full((n_experts,), capacity, dtype=torch.int64, device=token_EC.device)
        none = torch.zeros((), dtype=torch.int64, device=token_EC.device)
        weights_S = (weights_EC * self.config.scale).flatten()
        expert_S = expert_EC.flatten()
        return Routing(token_EC.flatten(), expert_S, weights_S, counts_E, expert_S, tokens, 0, none, none)

    def _capped(self, experts_TK: Tensor, weights_TK: Tensor) -> Routing:
        """At most C = ceil(capacity_factor * T * K / E) rows an expert, those of highest score; ties to the earlier token."""
        tokens, k = experts_TK.shape
        n_experts = self.weight_ED.shape[0]
        # A hair less, for 1.1 * 10 is more than 11 in floating point.
        capacity = math.ceil(self.config.capacity_factor * tokens * k / n_experts - 1e-6)
        expert_S, counts_E = experts_TK.flatten(), count_rows(experts_TK, n_experts)

        def best() -> Tensor:
            by_score = ordered_keys(weights_TK.flatten()).argsort(descending=True, stable=True)
            slot_R = by_score[expert_S[by_score].argsort(stable=True)]
            place_R = (
                torch.arange(slot_R.numel(), device=slot_R.device) - (counts_E.cumsum(0) - counts_E)[expert_S[slot_R]]
            )
            return torch.zeros_like(expert_S, dtype=torch.bool).scatter_(0, slot_R, place_R < capacity)

        keep_S = once("kept", best)
        routing = topk_routing(experts_TK, self._weights(weights_TK * keep_S.view(tokens, k)), n_experts)
        kept_E = counts_E.clamp(max=capacity)
        dropped = (counts_E - kept_E).sum()
        expert_S = expert_S.masked_fill(~keep_S, n_experts)
        return dataclasses.replace(routing, expert_S=expert_S, counts_E=kept_E, per_token=0, dropped=dropped)

    def _rounded(self, scores_TE: Tensor, experts_TK: Tensor, kernels: bool) -> Routing:
        """Token rounding (SonicMoE, arXiv 2512.14080): every expert's rows a multiple of the tile; moesaic.kernels.rounding."""
        tokens, k = experts_TK.shape
        n_experts = scores_TE.shape[1]
        tile = rounding_tile(scores_TE.device, self.config.rounding_tile)

        def draw() -> Rounding:
            # From the CPU's generator, whose state checkpoints hold: a resumed run draws what the uninterrupted one would.
            seed = torch.randint(2**62, ())
            choose = round_routing
            if kernels:
                from moesaic.kernels.rounding_triton import round_routing as choose
            return choose(scores_TE, experts_TK, tile=tile, rule=self.config.rounding, seed=seed)

        rounded = once("rounded", draw)
        weights_TK, weights_EA = token_weights(scores_TE, experts_TK, rounded, self.config.renormalize)
        expert_TK = experts_TK.masked_fill(~rounded.keep_TK, n_experts)
        own_E1 = torch.arange(n_experts, device=experts_TK.device)[:, None]
        expert_EA = torch.where(rounded.added_EA, own_E1, n_experts)
        token_S = torch.arange(tokens, device=experts_TK.device).repeat_interleave(k)
        return Routing(
            torch.cat((token_S, rounded.added_token_EA.flatten())),
            torch.cat((expert_TK.flatten(), expert_EA.flatten())),
            torch.cat((weights_TK.flatten(), weights_EA.flatten())) * self.config.scale,
            rounded.counts_E, experts_TK.flatten(), tokens, 0, rounded.dropped, rounded.added,
        )  # fmt: skip
