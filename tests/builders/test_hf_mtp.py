"""Multi-token prediction in the files of families other than DeepSeek-V3: it loads, trains, and goes back.

The reference is the report's equations for one module (arXiv 2412.19437, 21 to 25), on transformers' own layers. The
names in the files are written out here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpLayer, MtpModel

from modelspec.builders import LossWeights
from modelspec.builders.hf import from_pretrained, save_pretrained

LAYERS, EXPERTS, VOCABULARY = 2, 6, 53
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 64,
    "intermediate_size": 20,
    "moe_intermediate_size": 7,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"},
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "Glm4Moe": COMMON
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "attention_bias": True, "use_qk_norm": True}
    | {"rope_parameters": {"rope_theta": 1000.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
    "DeepseekV32": COMMON
    | {"num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 10, "kv_lora_rank": 8, "v_head_dim": 5}
    | {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "index_n_heads": 5, "index_head_dim": 6, "index_topk": 7},
}


class Reference(NamedTuple):
    """transformers' model and the module of multi-token prediction that it does not load by itself."""

    model: Any
    module: Any

    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.model.parameters(), *self.module.parameters()]

    def save(self, path: Path) -> Path:
        """A directory as the hub has them: the module is a layer after the last, its experts one by one."""
        self.model.save_pretrained(path)
        tensors = load_file(path / "model.safetensors")
        layer = f"model.layers.{self.model.config.num_hidden_layers}."
        for name, tensor in self.module.state_dict().items():
            name = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
            match name:
                case "mlp.experts.gate_up_proj":
                    for expert, both in enumerate(tensor):
                        for projection, rows in zip(("gate", "up"), both.chunk(2), strict=True):
                            tensors[f"{layer}mlp.experts.{expert}.{projection}_proj.weight"] = rows.clone()
                case "mlp.experts.down_proj":
                    for expert, rows in enumerate(tensor):
                        tensors[f"{layer}mlp.experts.{expert}.down_proj.weight"] = rows.clone()
                case _:
                    tensors[layer + name] = tensor.clone()
        tensors[f"{layer}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{layer}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
        return path

    def losses(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies of the next token, and of the one after it on the positions that have one."""
        trunk, length = self.model.model, tokens.shape[1] - 1
        hidden = trunk(tokens, use_cache=False).last_hidden_state
        lm = F.cross_entropy(self.model.lm_head(hidden).flatten(0, 1), targets.flatten())
        ahead = trunk.embed_tokens(tokens[:, 1:])
        joined = torch.cat((self.module.enorm(ahead), self.module.hnorm(hidden[:, :-1])), dim=-1)
        positions = trunk.rotary_emb(joined, torch.arange(length)[None])
        mask = torch.full((length, length), float("-inf")).triu(1).expand(len(tokens), 1, -1, -1)
        block = self.module.mtp_block(
            self.module.eh_proj(joined), position_embeddings=positions, attention_mask=mask, position_ids=None
        )
        logits = self.model.lm_head(self.module.post_norm(block))
        return lm, F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())


def make(family: str, randomize: Callable[[torch.nn.Module], None], layers: int = LAYERS) -> Reference:
    config = getattr(transformers, f"{family}Config")(**CONFIGS[family] | {"num_hidden_layers": layers})
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    block, norm = type(model.model.layers[-1]), type(model.model.norm)
    module = MtpLayer(model.config, block, norm, layers - 1).eval()
    for part in (model, module):
        randomize(part)
    return Reference(model, module)


@pytest.mark.parametrize("family", CONFIGS)
def test_it_loads_and_every_gradient_follows_the_equations(
    family: str, randomize: Callable[[torch.nn.Module], None], tmp_path: Path
) -> None:
    reference = make(family, randomize)
    ours = from_pretrained(reference.save(tmp_path / "saved"))
    tokens, targets = torch.randint(0, VOCABULARY, (2, 2, 17))

    output = ours(tokens, targets=targets, loss_weights=LossWeights(mtp=0.3))
    lm, mtp = reference.losses(tokens, targets)
    torch.testing.assert_close(output.losses.lm, lm, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.losses.mtp, mtp, rtol=1e-5, atol=0)
    output.loss.backward()
    (lm + 0.3 * mtp).backward()

    for parameter in reference.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    wanted = dict(from_pretrained(reference.save(tmp_path / "gradients")).named_parameters())
    for name, parameter in ours.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (found - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name
        assert found.any() or "indexer" in name, name


@pytest.mark.parametrize("family", CONFIGS)
def test_it_goes_back_bit_for_bit(family: str, randomize: Callable[[torch.nn.Module], None], tmp_path: Path) -> None:
    saved = make(family, randomize).save(tmp_path / "saved")
    save_pretrained(from_pretrained(saved), tmp_path / "ours")
    mine, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "ours", saved))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == mine[name].dtype and torch.equal(tensor, mine[name]), name
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_transformers_finds_every_tensor_of_it(randomize: Callable[[torch.nn.Module], None], tmp_path: Path) -> None:
    # It knows these weights only behind 46 or 92 layers. It raises where one is missing.
    reference = make("Glm4Moe", randomize, layers=46)
    save_pretrained(from_pretrained(reference.save(tmp_path / "saved")), tmp_path / "ours")
    module: Any = MtpModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")).layers[0]
    found, wanted = module.state_dict(), reference.module.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name
