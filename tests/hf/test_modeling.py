"""Fathom's decoder in Transformers: the native network bit for bit, and what Transformers does with it."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import fathom.hf as hf
from fathom.cli import main
from fathom.errors import UserError
from fathom.hf.export import from_native
from fathom.inference.load import load_run
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.residuals import RULES
from tests.hf.networks import checkpoint_layers

CPU = torch.device("cpu")


def native(rule: str = "block", *, seed: int = 1, **settings: object) -> Transformer:
    """A small native model whose every parameter is random, queries too."""
    blocks = {"num_blocks": 2} if rule in ("block", "delta") else {}
    residual = ResidualConfig(rule=rule, **blocks)  # type: ignore[arg-type]
    values = {
        "vocab_size": 40,
        "dim": 16,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "context": 32,
        **settings,
    }
    model = Transformer(ModelConfig(residual=residual, head_std=1.0, **values), end_of_text=0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("rule", ["prenorm", "block", "full", *RULES])
def test_logits_are_the_native_ones_bit_for_bit_under_every_rule(rule: str) -> None:
    model = native(rule)
    assert torch.equal(from_native(model)(tokens(2, 20)).logits, model(tokens(2, 20)))


@pytest.mark.parametrize(
    "settings", [{"qk_norm": False}, {"num_kv_heads": None}, {"head_dim": 6}, {"tie_embeddings": True}, {"mlp_dim": 24}]
)
def test_logits_are_the_native_ones_under_every_setting(settings: dict[str, object]) -> None:
    model = native(**settings)
    assert torch.equal(from_native(model)(tokens(2, 20)).logits, model(tokens(2, 20)))


def test_documents_stay_apart_and_a_cache_that_cannot_keep_them_apart_is_refused() -> None:
    model = native(document_mask=True)
    exported, text = from_native(model), tokens(2, 20)
    text[0, [4, 9]] = 0
    torch.testing.assert_close(exported(text).logits, model(text))
    assert (exported(text).logits - from_native(native())(text).logits).abs().max() > 0.1
    with pytest.raises(UserError, match="inside one document"):
        exported.generate(text, max_new_tokens=2)
    assert exported.generate(text[1:], max_new_tokens=2, do_sample=False).shape == (1, 22)


def test_gradients_are_the_native_ones() -> None:
    model = native()
    twin, text = from_native(copy.deepcopy(model)).train(), tokens(2, 20)
    model.loss(text[:, :-1], text[:, 1:]).backward()
    twin(text, labels=text).loss.backward()
    for name, parameter in model.named_parameters():
        other = twin.get_parameter(name if name.startswith("head") else f"model.{name}")
        torch.testing.assert_close(other.grad, parameter.grad)


@pytest.mark.parametrize("rule", ["block", "full", "value_residual"])
def test_checkpointing_keeps_the_gradients(rule: str) -> None:
    plain = from_native(native(rule)).train()
    saved = copy.deepcopy(plain)
    checkpoint_layers(saved)
    counted = 0

    def count(*_: object) -> None:
        nonlocal counted
        counted += 1

    saved.model.sublayers[1].gate_up.register_forward_hook(count)
    for model in (plain, saved):
        model(tokens(2, 20), labels=tokens(2, 20), use_cache=False).loss.backward()
    assert counted == 2  # once forward, once more in the backward pass
    for one, other in zip(plain.parameters(), saved.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def greedy(model: Transformer, prompt: Tensor, count: int) -> list[int]:
    """Token by token through the native network, without any cache."""
    text = prompt.clone()
    for _ in range(count):
        text = torch.cat((text, model(text)[:, -1:].argmax(-1)), dim=-1)
    return text[0].tolist()


@pytest.mark.parametrize("cache", [None, "static", "dynamic"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_generation_is_the_native_networks(cache: str | None, attention: str) -> None:
    model = native()
    exported = from_native(model)
    exported.set_attn_implementation(attention)
    made = exported.generate(
        tokens(1, 7), max_new_tokens=15, do_sample=False, cache_implementation=cache, eos_token_id=None, use_cache=True
    )
    assert made[0].tolist() == greedy(model, tokens(1, 7), 15)


def test_left_padding_changes_no_row() -> None:
    model = native()
    exported, long = from_native(model), tokens(1, 9)
    short = long[:, -5:]
    batch = torch.cat((long, torch.nn.functional.pad(short, (4, 0))))
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    made = exported.generate(
        batch, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert made[0].tolist() == greedy(model, long, 10)
    assert made[1, 4:].tolist() == greedy(model, short, 10)


def test_beams_and_samples() -> None:
    """Three beams find a likelier text than one; a fixed seed draws one text, of the temperature asked for."""
    exported = from_native(native())
    settings = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}

    def log_likelihood(text: Tensor) -> float:
        picked = exported(text).logits[:, 6:-1].log_softmax(-1).gather(-1, text[:, 7:, None])
        return float(picked.detach().sum())

    one, beams = (exported.generate(tokens(1, 7), num_beams=n, **settings) for n in (1, 4))
    assert log_likelihood(beams) >= log_likelihood(one)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(exported.generate(tokens(1, 7), **(settings | {"do_sample": True, "temperature": 2.0})))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_run_goes_out_and_comes_back_bit_for_bit(run: Path, tmp_path: Path) -> None:
    out = hf.export(run, tmp_path / "out")
    model, tokenizer = load_run(run, CPU)
    assert model.stream.query.abs().max() > 0  # type: ignore[union-attr, operator]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert type(loaded) is hf.FathomForCausalLM
    for name, parameter in model.named_parameters():
        other = loaded.get_parameter(name if name.startswith("head") else f"model.{name}")
        assert other.dtype == parameter.dtype and torch.equal(other, parameter), name
    text = AutoTokenizer.from_pretrained(out)("The state of the Union is", return_tensors="pt")
    assert text["input_ids"][0].tolist() == tokenizer.encode("The state of the Union is").ids
    assert torch.equal(loaded(**text).logits, model(text["input_ids"]))
    torch.testing.assert_close(
        AutoModel.from_pretrained(out)(**text)[0], model.hidden(text["input_ids"]), rtol=0, atol=0
    )
    card = (out / "README.md").read_text()
    assert "validation loss" in card and "nats per token" in card and "import fathom.hf" in card
    with pytest.raises(UserError, match="exists already"):
        hf.export(run, out)


def test_shards_come_back(run: Path, tmp_path: Path) -> None:
    exported = from_native(load_run(run, CPU)[0])
    exported.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in exported.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


@pytest.mark.parametrize("rule", ["mhc_lite", "muddformer", "lr_attnres"])
def test_a_rule_comes_back_with_its_buffers(rule: str, tmp_path: Path) -> None:
    """mHC-lite's permutations are in no file, and Transformers builds a model without data before it loads one."""
    exported = from_native(native(rule))
    exported.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(tokens(2, 9)).logits, exported(tokens(2, 9)).logits
    )


def test_hidden_states_and_attentions() -> None:
    model = native()
    exported = from_native(model)
    exported.set_attn_implementation("eager")
    outputs = exported(tokens(2, 20), output_hidden_states=True, output_attentions=True)
    reads: list[Tensor] = []

    def note(site: int, state: object, output: Tensor | None) -> None:
        if site < 6 and site % 2 == 0:
            reads.append(model.stream.read(state, site, lambda h: h)[0])  # type: ignore[arg-type]

    single = native()
    single.stream.schedule = "single_pass"  # type: ignore[assignment]
    model = single
    last = single.hidden(tokens(2, 20), observe=note)
    for got, expected in zip(outputs.hidden_states, [*reads, last], strict=True):
        torch.testing.assert_close(got, expected)
    assert [tuple(weights.shape) for weights in outputs.attentions] == 3 * [(2, 4, 20, 20)]
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 4, 20))


def test_a_fresh_model_starts_as_the_table_of_initialize_says() -> None:
    config = hf.FathomConfig.from_model_config(ModelConfig(dim=64, num_layers=2, residual=ResidualConfig(num_blocks=2)))
    model = AutoModelForCausalLM.from_config(config)
    reference = Transformer(config.model_config())
    for name, parameter in reference.state_dict().items():
        other = model.state_dict()[name if name.startswith("head") else f"model.{name}"]
        spread = 0.25 * float(parameter.std()) + 1e-9
        assert abs(float(other.std() - parameter.std())) < spread, name
        assert abs(float(other.mean() - parameter.mean())) < spread, name


def test_config_survives_the_disk_and_names_what_is_wrong(tmp_path: Path) -> None:
    config = hf.FathomConfig.from_model_config(ModelConfig(residual=ResidualConfig(block_size=3)), eos_token_id=0)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.model_config() == config.model_config() and loaded.residual["block_size"] == 3
    for wrong, name in (
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"num_attention_heads": 3}, "num_heads"),
        ({"residual": {"rule": "sum"}}, "residual.rule"),
        ({"residual": {"blocks": 3}}, "residual.blocks"),
        ({"document_mask": True}, "eos_token_id"),
    ):
        with pytest.raises(ValueError, match=name):
            hf.FathomConfig(**wrong)
    with pytest.raises(ValueError, match="block_size is 99"):
        hf.FathomForCausalLM(hf.FathomConfig(residual={"rule": "block", "block_size": 99}))


def test_the_command_exports(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.residual["num_blocks"] == 2
    assert main(["export", str(run), str(tmp_path / "other"), "--checkpoint", "3"]) == 2
    assert "has no checkpoint of step 3" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_without_transformers_one_line_names_the_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['transformers'] = None; from fathom.cli import main; sys.exit(main(['export', 'a', 'b']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr
        == "fathom: fathom.hf needs transformers, which is not installed; pip install 'fathom-attnres[hf]'\n"
    )
