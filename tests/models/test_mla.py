import pytest
import torch

from fathom.models.kimi_config import KimiConfig
from fathom.models.layers import Context
from fathom.models.mla import MLA

EMPTY = torch.empty(0)


def layer(**options) -> MLA:
    config = KimiConfig(dim=12, num_heads=3, head_dim=4, kv_rank=6, shared_key_dim=2, **options)
    mla = MLA(config).double()
    generator = torch.Generator().manual_seed(4)
    for parameter in mla.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return mla


def by_hand(mla: MLA, x: torch.Tensor) -> torch.Tensor:
    """The equation, head by head and token by token."""
    outputs = []
    for row in x:
        queries = mla.query(row).unflatten(-1, (3, 6))
        latent, shared = mla.latent(row).split((6, 2), dim=-1)
        latent = latent / (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mla.latent_norm.weight
        own, value = mla.expand(latent).unflatten(-1, (3, 8)).chunk(2, dim=-1)
        tokens = []
        for t in range(len(row)):
            heads = []
            for h in range(3):
                keys = torch.cat((own[: t + 1, h], shared[: t + 1]), dim=-1)
                heads.append(torch.softmax(keys @ queries[t, h] / 6**0.5, 0) @ value[: t + 1, h])
            tokens.append(torch.cat(heads))
        mixed = torch.stack(tokens)
        outputs.append(mla.out(mixed if mla.gate is None else mixed * torch.sigmoid(mla.gate(row))))
    return torch.stack(outputs)


@pytest.mark.parametrize("options", [{}, {"query_rank": 5, "mla_gate": True}])
def test_equals_the_equation(options: dict):
    mla, x = layer(**options), torch.randn(2, 7, 12).double()
    torch.testing.assert_close(mla(x, Context(EMPTY, EMPTY, None)), by_hand(mla, x))


def test_the_absorbed_form_is_the_same_with_gradients():
    mla = layer()
    x, query = torch.randn(2, 5, 12).double(), torch.randn(2, 3, 5, 6).double().requires_grad_()
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    mask[1, :, 3:, :2] = False
    results = []
    for form in (mla.expanded, mla.absorbed):
        output = form(query, mla.compress(x), mask)
        parts = (query, mla.expand.weight, mla.latent.weight)
        results.append([output, *torch.autograd.grad(output.sin().sum(), parts)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a)
    one = mla.absorbed(query[:, :, 4:], mla.compress(x), None)
    torch.testing.assert_close(one[0], results[0][0][0, :, 4:])


def test_a_mask_keeps_documents_apart():
    mla, x = layer(), torch.randn(1, 6, 12).double()
    numbers = torch.tensor([0, 0, 0, 1, 1, 1])
    mask = (numbers[:, None] == numbers).tril()[None, None]
    output = mla(x, Context(EMPTY, EMPTY, mask))
    torch.testing.assert_close(output[:, 3:], mla(x[:, 3:], Context(EMPTY, EMPTY, None)))
