"""A stage of a pipeline: the sublayers of a range of sites, cut out of a ``Transformer`` without changing it.

A stage keeps the names of the whole model's parameters; of the stream's it holds the rows of its own sites. Where a block
straddles stages, each computes phase 1 for its own sites of the block, and the next one is handed the partial sum, the
latest output added. Carrying phase 1 instead would make the hop longer by a tensor (and a log-denominator) for each of
those reads; computing it where it is read costs one more sweep over sources that the rank needs anyway.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fathom.block import BlockAttnRes, BlockState
from fathom.errors import UserError
from fathom.full import FullAttnRes
from fathom.models.layers import Context, RMSNorm, make_context
from fathom.models.transformer import Transformer
from fathom.parallel.config import Recompute
from fathom.parallel.plan import Plan
from fathom.stream import PreNorm, PreNormState, Stream

Sources = tuple[Tensor, ...]

KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
"""What selective recomputation keeps."""


class StageBlocks(BlockAttnRes):
    """Block AttnRes of the sites of one stage, counted from the stage's first; ``starts[0]`` is negative inside a block.

    The stage's last write ends its piece of a block: a sum that the block goes on from is then the last of the bank.
    With ``single_pass`` every read is for itself, so that between two sublayers there is nothing but bank and partial sum.
    """

    def __init__(
        self,
        whole: BlockAttnRes | FullAttnRes,
        starts: tuple[int, ...],
        sites: range,
        *,
        is_last: bool,
        single_pass: bool = False,
    ) -> None:
        two_phase = isinstance(whole, BlockAttnRes) and whole.schedule == "two_phase" and not single_pass
        super().__init__(
            len(sites), whole.dim, block_size=1, gain=whole.key_gain is not None, eps=whole.eps,
            schedule="two_phase" if two_phase else "single_pass",
            recompute=two_phase and isinstance(whole, BlockAttnRes) and whole.recompute,
        )  # fmt: skip
        begun = [start - sites.start for start in starts if start < sites.stop]
        self.starts = [max(start for start in begun if start <= 0), *(start for start in begun if start > 0)]
        self.block_of_site = [sum(start <= site for start in self.starts) - 1 for site in range(len(sites))]
        rows = slice(sites.start, sites.stop + is_last)
        self.query = nn.Parameter(whole.query.detach()[rows].clone())
        if whole.key_gain is not None:
            self.key_gain = nn.Parameter(whole.key_gain.detach()[rows].clone())

    def enter(self, bank: Sources, partial: Tensor | None) -> BlockState:
        """The state at the stage's first site."""
        state = self._begin(bank)
        if self.schedule == "single_pass" or partial is None:
            return state._replace(partial=partial)
        # The stage's first read is inside a block: it merges with the partial sum, as all but a block's first do.
        return self._phase_1(state, self._num_reads(*self._ranges()[0]), None, self.eps)._replace(pending=partial)


def _stage_stream(stream: nn.Module, plan: Plan, stage: int, *, single_pass: bool) -> PreNorm | StageBlocks:
    # Exact types: an ablation of AttnRes is a subclass whose state is another.
    if type(stream) is PreNorm:
        return PreNorm(len(plan.sites(stage)), stream.dim)
    if type(stream) in (BlockAttnRes, FullAttnRes):
        whole = cast(BlockAttnRes | FullAttnRes, stream)
        is_last = stage == plan.num_stages - 1
        return StageBlocks(whole, plan.starts, plan.sites(stage), is_last=is_last, single_pass=single_pass)
    raise UserError(
        f"{type(stream).__name__} has no pipeline: PreNorm, Full and Block AttnRes without switches have one"
    )


class Stage(nn.Module):
    """Stage ``index`` of ``plan``; shares the modules of ``model``, whose residual parameters are copied row by row.

    Called with the tensors of the hop into it, sources before the partial sum, and the tokens; returns those of the hop out
    of it, or the logits. A pipeline sets ``bank``, which makes the whole bank of what was received, and ``keep``, which at the
    stage's end is given the whole bank and what leaves the stage, and returns the latter.

    ``recompute``: what the backward pass computes again, by decoder layers. Of a layer ``"full"`` keeps the partial sum that it
    begins with; ``"selective"`` its matrix products and attention as well. The bank is outside: one copy of each source.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, model: Transformer, plan: Plan, index: int, *, recompute: Recompute = "none") -> None:
        super().__init__()
        if model.config.tie_embeddings:
            raise UserError(
                "model.tie_embeddings puts one matrix on the first and the last stage: untie it for a pipeline"
            )
        self.plan, self.index, self.config, self.end_of_text = plan, index, model.config, model.end_of_text
        self.is_first, self.is_last = index == 0, index == plan.num_stages - 1
        if self.is_first:
            self.embedding = model.embedding
        self.sublayers = nn.ModuleDict({str(site): model.sublayers[site] for site in plan.sites(index)})
        self.recompute = recompute
        self.stream = _stage_stream(model.stream, plan, index, single_pass=recompute != "none")
        if self.is_last:
            self.final_norm, self.head = model.final_norm, model.head
        self.register_buffer("cos", model.cos, persistent=False)
        self.register_buffer("sin", model.sin, persistent=False)
        self.bank: Callable[[int, Sources], Sources] = lambda stage, new: new
        self.keep: Callable[[int, Sources, Sources], Sources] = lambda stage, bank, leaving: leaving

    def rows(self) -> slice:
        """The rows of the whole model's ``stream.query`` and ``stream.key_gain`` that this stage holds."""
        sites = self.plan.sites(self.index)
        return slice(sites.start, sites.stop + self.is_last)

    def _enter(self, received: Sources, tokens: Tensor) -> Any:
        if self.is_first:
            embedding = self.embedding(tokens)
            if torch.is_autocast_enabled(embedding.device.type):
                embedding = embedding.to(torch.get_autocast_dtype(embedding.device.type))
            return self.stream.start(embedding)
        if isinstance(self.stream, PreNorm):
            return PreNormState(received[0])
        inside = self.plan.inside(self.index)
        bank = self.bank(self.index, received[:-1] if inside else received)
        return self.stream.enter(bank, received[-1] if inside else None)

    def _leave(self, state: Any) -> Sources:
        if isinstance(self.stream, PreNorm):
            return (state.hidden,)
        after = self.index + 1
        # Inside a block the bank ends with the partial sum, which goes along.
        bank, leaving = state.bank[: self.plan.finished(after)], state.bank[self.plan.held(after) :]
        return self.keep(self.index, bank, leaving)

    def forward(
        self, *received: Float[Tensor, "B T D"], tokens: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T V"] | tuple[Float[Tensor, "B T D"], ...]:
        context = make_context(self.config, tokens, self.cos, self.sin, self.end_of_text)
        state = self._enter(received, tokens)
        for sites in self._regions():
            state = self._again(self._run, state, sites, context)
        return (
            self.head(self._again(self.stream.finish, state, self.final_norm)) if self.is_last else self._leave(state)
        )

    def _again(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """``part`` of the arguments; computed again in the backward pass where that is asked for."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return part(*arguments)
        options: dict[str, Any] = {}
        if self.recompute == "selective":
            options["context_fn"] = lambda: create_selective_checkpoint_contexts(KEPT)
        return checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False, **options)

    def _regions(self) -> list[range]:
        """The stage's sites, counted from its first, in decoder layers or what of them lies in the stage."""
        first = self.plan.firsts[self.index]
        count = len(self.sublayers)
        cuts = [0, *(site for site in range(1, count) if (first + site) % 2 == 0), count]
        return [range(a, b) for a, b in pairwise(cuts)]

    def _run(self, state: Any, sites: range, context: Context) -> Any:
        stream: Stream = self.stream
        for site in sites:
            sublayer = self.sublayers[str(self.plan.firsts[self.index] + site)]
            x, state = stream.read(state, site, cast(RMSNorm, sublayer.norm))
            state = stream.write(state, site, sublayer(x, context))
        return state
