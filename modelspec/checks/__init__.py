"""Cross-field checks: relations between values that are each legal by themselves.

A check is a function from a spec to findings, and has one code. The table below is the list of them; the docstring of
a function says what it requires.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from modelspec.checks import cuts, model, parallel, precision, training
from modelspec.checks.finding import Finding
from modelspec.schema import ModelSpec

Check = Callable[[ModelSpec], Iterator[Finding]]

# Checks that bound the work of the others; these run first and, if one speaks, alone.
BOUNDS: Mapping[str, Check] = MappingProxyType({"MS301": model.layers_within_bound})

CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "MS302": model.layer_names_exist,
        "MS303": model.rope_dims_are_even,
        "MS304": model.groups_divide_experts,
        "MS305": model.groups_are_several,
        "MS306": model.chosen_groups_exist,
        "MS307": model.group_score_has_enough_experts,
        "MS308": model.chosen_experts_exist,
        "MS309": model.yarn_ramp_is_ordered,
        "MS310": model.variants_are_used,
        "MS311": model.positions_are_reached,
        "MS312": model.router_has_a_gradient,
        "MS313": model.position_is_told,
        "MS314": model.experts_fit_fp8_blocks,
        "MS315": model.rope_fits_the_head,
        "MS316": model.kv_heads_divide_heads,
        "MS317": model.indexer_reads_a_latent,
        "MS318": model.stacked_biases_go_together,
        "MS319": model.llama3_ramp_is_ordered,
        "MS320": model.qk_heads_divide_v_heads,
        "MS321": precision.fp8_blocks_have_kernels,
        "MS322": precision.fp8_products_are_not_fp64,
        "MS323": precision.fp8_blocks_are_filled,
        "MS401": parallel.degrees_divide_world,
        "MS402": parallel.replicas_divide_data,
        "MS403": parallel.experts_divide_ranks,
        "MS404": parallel.experts_divide_evenly,
        "MS405": parallel.experts_are_there,
        "MS406": parallel.groups_stand_on_nodes,
        "MS407": parallel.heads_divide_evenly,
        "MS408": parallel.stages_have_layers,
        "MS409": parallel.stages_per_rank_fit_schedule,
        "MS410": parallel.sequences_divide,
        "MS411": parallel.batches_divide,
        "MS412": parallel.microbatches_fill_pipeline,
        "MS413": cuts.tensor_divides_widths,
        "MS414": cuts.attention_can_be_cut,
        "MS415": parallel.tensor_ranks_share_a_node,
        "MS416": parallel.nodes_are_filled,
        "MS501": training.stages_have_one_length,
        "MS502": training.stage_names_differ,
        "MS503": training.phases_have_ends,
        "MS504": training.schedules_reach_the_end,
        "MS505": training.phases_begin_in_time,
        "MS506": training.sequences_fit_positions,
        "MS507": training.scaling_is_needed,
        "MS508": training.mtp_and_its_weight_go_together,
        "MS509": training.bias_speed_has_a_bias,
        "MS510": training.bias_has_a_speed,
        "MS511": training.balance_loss_has_experts,
        "MS512": training.tokenizer_fits_embedding,
    }
)

# Codes of checks whose findings are advice: no spec is refused for one.
ADVICE = frozenset(
    (
        *("MS310", "MS311", "MS312", "MS313", "MS314", "MS321", "MS323"),
        *("MS406", "MS415", "MS416", "MS505", "MS507", "MS510"),
    )
)


def check(spec: ModelSpec) -> Iterator[Finding]:
    """Every finding of every check, with its code."""
    bounds = list(_run(BOUNDS, spec))
    yield from bounds or _run(CHECKS, spec)


def _run(checks: Mapping[str, Check], spec: ModelSpec) -> Iterator[Finding]:
    for code, function in checks.items():
        for finding in function(spec):
            yield replace(finding, code=code)
