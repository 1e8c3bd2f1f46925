"""Relations inside the architecture. One check is one function; its docstring says what must hold."""

from collections.abc import Iterator

from modelspec.checks.finding import Finding, Path, did_you_mean, divisors, legal
from modelspec.schema import (
    GQA,
    MAX_LAYERS,
    MLA,
    GatedDeltaNet,
    LayerPattern,
    LayerRun,
    Lightning,
    Llama3,
    ModelSpec,
    MoE,
    Yarn,
)

Findings = Iterator[Finding]


def _runs(spec: ModelSpec) -> Iterator[tuple[Path, LayerRun]]:
    """Every run of layers as it is written, with its path."""
    for index, entry in enumerate(spec.model.layers):
        path: Path = ("model", "layers", index)
        if isinstance(entry, LayerPattern):
            for inner, run in enumerate(entry.pattern):
                yield (*path, "pattern", inner), run
        else:
            yield path, entry


def _moes(spec: ModelSpec) -> Iterator[tuple[Path, MoE]]:
    for name, ffn in spec.model.ffn.items():
        if isinstance(ffn, MoE):
            yield ("model", "ffn", name), ffn


def _yarns(spec: ModelSpec) -> Iterator[tuple[Path, Yarn]]:
    for name, attention in spec.model.attention.items():
        if attention.rope != "none" and isinstance(attention.rope.scaling, Yarn):
            yield ("model", "attention", name, "rope", "scaling"), attention.rope.scaling


def layers_within_bound(spec: ModelSpec) -> Findings:
    """A model has at most 10,000 layers."""
    if spec.model.num_layers > MAX_LAYERS:
        yield Finding(
            ("model", "layers"),
            f"{spec.model.num_layers:,} layers are more than the {MAX_LAYERS:,} that a spec may have",
            "lower `repeat`",
        )


def layer_names_exist(spec: ModelSpec) -> Findings:
    """Layers and MTP blocks name variants that exist under model.attention and model.ffn."""
    named: list[tuple[Path, str, str]] = []
    for path, run in _runs(spec):
        named += [(path, "attention", run.attention), (path, "ffn", run.ffn)]
    if spec.model.mtp is not None and spec.model.mtp.layer is not None:
        block = spec.model.mtp.layer
        named += [(("model", "mtp", "layer"), key, getattr(block, key)) for key in ("attention", "ffn")]
    for path, key, name in named:
        variants = getattr(spec.model, key)
        if name not in variants:
            yield Finding(
                (*path, key),
                f"no variant '{name}' under model.{key}",
                did_you_mean(name, variants),
                ((("model", key), "the variants are here"),),
                choices=tuple(variants),
            )


def variants_are_used(spec: ModelSpec) -> Findings:
    """Every variant under model.attention and model.ffn is picked by some layer."""
    blocks = [run for _, run in _runs(spec)]
    used = {(key, getattr(run, key)) for run in blocks for key in ("attention", "ffn")}
    if spec.model.mtp is not None and spec.model.mtp.layer is not None:
        used |= {("attention", spec.model.mtp.layer.attention), ("ffn", spec.model.mtp.layer.ffn)}
    for key in ("attention", "ffn"):
        for name in getattr(spec.model, key):
            if (key, name) not in used:
                yield Finding(
                    ("model", key, name),
                    f"no layer uses the variant '{name}'",
                    "remove it, or name it in model.layers",
                    severity="warning",
                    inherited_severity="info",
                )


def rope_dims_are_even(spec: ModelSpec) -> Findings:
    """Rotary embedding turns pairs of elements, so the rotated width is even."""
    for name, attention in spec.model.attention.items():
        if attention.rope == "none":
            continue
        match attention:
            case MLA(qk_rope_head_dim=width):
                key = "qk_rope_head_dim"
            case GQA(rotated=width):
                key = "head_dim" if attention.rope_head_dim is None else "rope_head_dim"
        if width % 2:
            yield Finding(
                ("model", "attention", name, key),
                f"rope rotates pairs of elements, and {width} is odd",
                legal([width - 1, width + 1], width),
            )


def rope_fits_the_head(spec: ModelSpec) -> Findings:
    """The rotated part is no wider than the head that it is a part of."""
    for name, attention in spec.model.attention.items():
        path: Path = ("model", "attention", name)
        part: GQA | Lightning
        match attention:
            case GQA():
                part = attention
            case MLA(indexer=Lightning() as indexer):
                path, part = (*path, "indexer"), indexer
            case _:
                continue
        if (part.rope_head_dim or 0) > part.head_dim:
            yield Finding(
                (*path, "rope_head_dim"),
                f"{part.rope_head_dim} elements with position do not fit a head of {part.head_dim}",
                f"at most {part.head_dim}",
                (((*path, "head_dim"), f"head_dim {part.head_dim}"),),
            )


def kv_heads_divide_heads(spec: ModelSpec) -> Findings:
    """Every head of keys and values serves the same number of query heads."""
    for name, attention in spec.model.attention.items():
        if isinstance(attention, GQA) and attention.num_heads % attention.num_kv_heads:
            path = ("model", "attention", name)
            yield Finding(
                (*path, "num_kv_heads"),
                f"{attention.num_kv_heads} heads of keys and values do not divide {attention.num_heads} query heads",
                legal(divisors(attention.num_heads), attention.num_kv_heads),
                (((*path, "num_heads"), f"{attention.num_heads} query heads"),),
            )


def qk_heads_divide_v_heads(spec: ModelSpec) -> Findings:
    """Every head of queries and keys of a gated DeltaNet serves the same number of heads of values."""
    for name, attention in spec.model.attention.items():
        if isinstance(attention, GatedDeltaNet) and attention.num_v_heads % attention.num_qk_heads:
            path = ("model", "attention", name)
            heads = attention.num_v_heads
            yield Finding(
                (*path, "num_qk_heads"),
                f"{attention.num_qk_heads} heads of queries and keys do not divide {heads} heads of values",
                legal(divisors(heads), attention.num_qk_heads),
                (((*path, "num_v_heads"), f"{heads} heads of values"),),
            )


def indexer_reads_a_latent(spec: ModelSpec) -> Findings:
    """A lightning indexer makes its queries from the query latent, and shares attention's rotary tables."""
    for name, attention in spec.model.attention.items():
        if not isinstance(attention, MLA) or attention.indexer is None:
            continue
        path = ("model", "attention", name)
        if attention.q_lora_rank is None:
            yield Finding(
                (*path, "indexer"),
                "a lightning indexer makes its queries from the query latent, and there is none",
                "set q_lora_rank",
            )
        if attention.indexer.rope_head_dim != attention.qk_rope_head_dim:
            yield Finding(
                (*path, "indexer", "rope_head_dim"),
                f"the indexer rotates by attention's own tables, which are for {attention.qk_rope_head_dim} elements",
                f"rope_head_dim: {attention.qk_rope_head_dim}",
                (((*path, "qk_rope_head_dim"), f"qk_rope_head_dim {attention.qk_rope_head_dim}"),),
            )


def stacked_biases_go_together(spec: ModelSpec) -> Findings:
    """Gate and up of the experts are one stacked tensor, so both have a bias or neither."""
    for path, moe in _moes(spec):
        if ("gate" in moe.bias) != ("up" in moe.bias):
            yield Finding(
                (*path, "bias"),
                "in a mixture of experts gate and up have a bias together or not at all",
                "bias: [gate, up] or none of the two",
            )


def groups_divide_experts(spec: ModelSpec) -> Findings:
    """Groups of experts are of equal size."""
    for path, moe in _moes(spec):
        groups = moe.router.selection.groups
        if groups is not None and moe.num_experts % groups.num:
            yield Finding(
                (*path, "router", "selection", "groups", "num"),
                f"{groups.num} groups do not divide {moe.num_experts} experts",
                legal(divisors(moe.num_experts)[1:], groups.num),
                (((*path, "num_experts"), f"{moe.num_experts} experts"),),
            )


def groups_are_several(spec: ModelSpec) -> Findings:
    """One group limits nothing."""
    for path, moe in _moes(spec):
        groups = moe.router.selection.groups
        if groups is not None and groups.num == 1:
            yield Finding(
                (*path, "router", "selection", "groups", "num"),
                "one group of experts limits nothing",
                "leave `groups` out (`groups: null` removes an inherited one)",
            )


def chosen_groups_exist(spec: ModelSpec) -> Findings:
    """A token cannot use more groups than there are."""
    for path, moe in _moes(spec):
        groups = moe.router.selection.groups
        if groups is not None and groups.topk > groups.num:
            yield Finding(
                (*path, "router", "selection", "groups", "topk"),
                f"a token may use {groups.topk} groups, but there are {groups.num}",
                legal(range(1, groups.num + 1), groups.topk),
                (((*path, "router", "selection", "groups", "num"), f"{groups.num} groups"),),
            )


def group_score_has_enough_experts(spec: ModelSpec) -> Findings:
    """The sum of a group's two best scores needs two experts in each group."""
    for path, moe in _moes(spec):
        groups = moe.router.selection.groups
        if groups is not None and groups.score == "top2_sum" and moe.num_experts // groups.num < 2:
            yield Finding(
                (*path, "router", "selection", "groups", "score"),
                f"top2_sum adds a group's two best scores, but {moe.num_experts} experts in {groups.num} groups "
                f"leave {moe.num_experts // groups.num} in each",
                "use fewer groups, or score: max",
                (((*path, "router", "selection", "groups", "num"), f"{groups.num} groups"),),
            )


def chosen_experts_exist(spec: ModelSpec) -> Findings:
    """A token finds as many experts as it uses, inside the groups that it may use."""
    for path, moe in _moes(spec):
        groups, wanted = moe.router.selection.groups, moe.num_experts_per_tok
        within = moe.num_experts if groups is None else min(groups.topk, groups.num) * (moe.num_experts // groups.num)
        if wanted > within:
            where = "" if groups is None else f" in the {groups.topk} groups that a token may use"
            yield Finding(
                (*path, "num_experts_per_tok"),
                f"a token uses {wanted} experts, but there are {within}{where}",
                legal(range(1, within + 1), wanted),
                (((*path, "num_experts"), f"{moe.num_experts} experts"),),
            )


def yarn_ramp_is_ordered(spec: ModelSpec) -> Findings:
    """YaRN's ramp runs from fast pairs to slow ones."""
    for path, yarn in _yarns(spec):
        if yarn.beta_fast < yarn.beta_slow:
            yield Finding(
                (*path, "beta_fast"),
                f"beta_fast {yarn.beta_fast:g} is below beta_slow {yarn.beta_slow:g}",
                f"at least {yarn.beta_slow:g}",
                (((*path, "beta_slow"), f"beta_slow {yarn.beta_slow:g}"),),
            )


def llama3_ramp_is_ordered(spec: ModelSpec) -> Findings:
    """The ramp of llama3's scaling runs from few turns to more."""
    for name, attention in spec.model.attention.items():
        scaling = None if attention.rope == "none" else attention.rope.scaling
        if isinstance(scaling, Llama3) and scaling.low_freq_factor >= scaling.high_freq_factor:
            path = ("model", "attention", name, "rope", "scaling")
            yield Finding(
                (*path, "low_freq_factor"),
                f"low_freq_factor {scaling.low_freq_factor:g} is not below high_freq_factor "
                f"{scaling.high_freq_factor:g}",
                f"below {scaling.high_freq_factor:g}",
                (((*path, "high_freq_factor"), f"high_freq_factor {scaling.high_freq_factor:g}"),),
            )


def positions_are_reached(spec: ModelSpec) -> Findings:
    """YaRN reaches factor times the original length; positions beyond it were never meant."""
    for path, yarn in _yarns(spec):
        # May be infinite.
        product = yarn.factor * yarn.original_max_position
        if spec.model.max_position > product:
            reach = int(product)
            yield Finding(
                ("model", "max_position"),
                f"positions up to {spec.model.max_position:,} go beyond the {reach:,} that yarn reaches",
                f"at most {reach:,}, or a larger factor",
                (((*path, "factor"), f"{yarn.factor:g} x {yarn.original_max_position:,}"),),
                severity="warning",
            )


def router_has_a_gradient(spec: ModelSpec) -> Findings:
    """With one expert per token, renormalising makes its weight constant, and the router learns nothing."""
    for path, moe in _moes(spec):
        if moe.router.renormalize and moe.num_experts_per_tok == 1:
            yield Finding(
                (*path, "router", "renormalize"),
                "with one expert per token the renormalised weight is always 1, so the router gets no gradient",
                "renormalize: false",
                severity="warning",
            )


def position_is_told(spec: ModelSpec) -> Findings:
    """Some layer knows the order of tokens: by a rope, or by reading them one after another."""
    used = {run.attention for _, run in _runs(spec)} & spec.model.attention.keys()
    if used and not any(spec.model.attention[name].tells_order for name in used):
        yield Finding(
            ("model", "attention"),
            "no attention variant has a rope, so the model sees the order of tokens through the causal mask alone",
            "give one variant a rope",
            severity="warning",
        )


def experts_fit_fp8_blocks(spec: ModelSpec) -> Findings:
    """Experts whose width is a multiple of the FP8 block fill every block."""
    if spec.precision.fp8 is None:
        return
    block = spec.precision.fp8.weight_block[0]
    for path, moe in _moes(spec):
        if moe.intermediate_size % block:
            below = moe.intermediate_size // block * block
            yield Finding(
                (*path, "intermediate_size"),
                f"an expert's width of {moe.intermediate_size} leaves FP8 blocks of {block} part empty",
                legal([value for value in (below, below + block) if value], moe.intermediate_size),
                ((("precision", "fp8", "weight_block"), f"blocks of {block}"),),
                severity="warning",
            )
