"""What a plan of serving takes for granted, in numbers and in sentences."""

from modelspec.plan.runs import runs
from modelspec.plan.serving_machine import Machine
from modelspec.plan.serving_memory import MARGIN
from modelspec.schema import MLA, ModelSpec, MoE

# Tokens that a replica computes in one step of prefill, or one prompt where that is longer.
PREFILL_TOKENS = 16384


def assumptions(spec: ModelSpec, machine: Machine, acceptance: float | None, price: float | None) -> tuple[str, ...]:
    """Sentences: those that hold of every model, and those of this one on this machine."""
    use, layout, hardware, model = machine.efficiency, machine.layout, machine.hardware, spec.model
    used = [*runs(model), *([model.mtp_layer()] if acceptance is not None else [])]
    experts = any(isinstance(model.ffn[run.ffn], MoE) for run in used)
    form = (
        "FP8 with a scale for each block of 128 x 128; embedding, head, router and norms in BF16"
        if machine.precision == "fp8"
        else "BF16"
    )
    sentences = [
        f"Weights are in {form}; the cache is in BF16, and each sequence has its whole length in it all the time.",
        f"{MARGIN:.0%} of memory is left to activations and buffers.",
        f"Matrix products reach {use.products:.0%} of their peak, attention {use.attention:.0%}, memory "
        f"{use.memory:.0%} and links {use.network:.0%} of their bandwidth; each layer costs "
        f"{use.layer_latency * 1e6:.0f} us beside.",
        "A part of the model takes the longer of its arithmetic and of reading its weights and cache; parts follow "
        "one another.",
        f"Prefill and decoding have devices of their own that are always busy; prefill computes "
        f"{PREFILL_TOKENS:,} tokens, or one prompt, at once on each replica, none of them from a cache.",
    ]
    if layout.tensor > 1:
        sentences.append(
            f"{'All but experts is' if experts else 'Weights are'} cut evenly over {layout.tensor} devices, which add "
            "up their outputs after each half of a layer; heads of a cache are cut likewise."
        )
    if experts:
        sentences.append(
            "A token picks its experts evenly and independently of others; the busiest device has "
            f"{use.imbalance:g} times the mean of tokens and of experts to read."
        )
    if experts and layout.gpus > 1:
        sent = "in FP8 and return in BF16" if machine.precision == "fp8" else "and return in BF16"
        sentences.append(
            f"Tokens go to their experts {sent}, to each expert when decoding and to each node in prefill, "
            f"{use.exchange_latency * 1e6:.0f} us each way beside; {use.overlap:.0%} of the shorter of computing and "
            "exchanging hides behind the longer."
        )
    if any(isinstance(model.attention[run.attention], MLA) for run in used):
        sentences.append(
            "Latent attention decodes in its absorbed form, over the latents; prefill rebuilds keys and values."
        )
    if machine.precision == "fp8" and hardware.peak_flops.fp8 is None:
        sentences.append("The device has no FP8 unit: FP8 weights are read as such and multiplied at the rate of BF16.")
    if hardware.slowdown is not None:
        sentences.append(
            f"The slowdown of {hardware.name}, {hardware.slowdown:g}, was measured in training against a stack's "
            "rates, and is not used here."
        )
    if acceptance is not None:
        sentences.append(
            f"A draft is accepted with a chance of {acceptance:g} where all before it were; each step of the main "
            "model verifies all drafts, and each drafting module computes as many tokens."
        )
    if price is None:
        sentences.append(f"No price of {hardware.name} is known: costs need one.")
    else:
        sentences.append(f"A device costs ${price:g} an hour, idle hours, staff and profit not counted.")
    return tuple(sentences)
