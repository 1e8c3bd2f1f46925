"""Parameter counts equal the published ones to the last digit."""

from pathlib import Path

from modelspec.plan import plan
from modelspec.validate import load

SPECS = Path(__file__).parents[2] / "specs"


def test_v3_is_counted_as_published() -> None:
    counts = plan(load(SPECS / "deepseek-v3.yaml")).parameters
    assert counts.total == 671_026_419_200
    assert counts.active == 37_552_297_472
    assert counts.mtp == 11_610_068_224
    assert counts.parts["selection_biases"] == 14_848
    assert counts.parts["routed_experts"] == 653_908_770_816
    assert counts.parts["shared_experts"] == 2_554_331_136
    assert counts.parts["routers"] == 106_430_464
    assert counts.parts["embedding"] == counts.parts["head"] == 926_679_040
    assert counts.parts["dense_ffn"] == 1_189_085_184
    # Latent norms count as norms here, so attention is short of 187,107,328 a layer by 1,536 + 512.
    assert counts.parts["attention"] == 61 * (187_107_328 - 2_048)
    assert sum(counts.parts.values()) == counts.total


def test_counts_follow_the_formulas_of_a_plain_variant() -> None:
    spec = load(
        SPECS / "deepseek-v3-nano.yaml",
        ["model.tie_embeddings=true", "model.attention.mla.q_lora_rank=null", "model.ffn.moe.shared_experts.num=2"],
    )
    d, vocab, heads, kv, nope, rope, v = 256, 4096, 4, 64, 32, 16, 32
    attention = d * heads * (nope + rope) + d * (kv + rope) + kv + kv * heads * (nope + v) + heads * v * d
    moe = (16 + 2) * 3 * d * 128 + 16 * d + 16
    layer_norms = 2 * d
    assert plan(spec).parameters.total == vocab * d + 4 * (attention + layer_norms) + 3 * d * 768 + 3 * moe + d


def test_the_plan_is_plain_data() -> None:
    data = plan(load(SPECS / "deepseek-v3-nano.yaml")).as_json()
    assert data["parameters"]["total"] == 8_166_320
